"""Against numbers that the released code of the methods returned for the same inputs, on every backend.

Recorded on a CPU in float32, of Leonnnnnn929/VEPO 4247308, MikeWangWZHL/PAPO fb63bf4, Sammy20207109/DyCo-RL c73247f,
handsome-rich/VA-OPD 16a26a4, huaixuheqing/VPPO-RL a23c54b and xzxxntxdy/PEPO 2b1e788. Batches were one micro-batch on
one device. No two scores of a response were equal, of which most of that code selects any; VA-OPD's takes the first.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from vgpo_kernels import (
    ShapingConfig,
    ViewTerm,
    attention_shift,
    linear_divergence,
    policy_loss,
    shape_tokens,
    visual_focus,
)

FLOOR = 2e-6
IMAGE = slice(1, 4)  # positions of the image before every response
PROMPT = 5
VOCABULARY = 5


@dataclass(frozen=True)
class Inputs:
    """Of a padded batch of responses, drawn from a seed; what stands off the mask is drawn too."""

    mask: Tensor  # [B, T]
    groups: Tensor  # [B]
    advantages: Tensor  # [B]
    old_logp: Tensor  # [B, T], as the two that follow
    logp: Tensor
    spoilt_logp: Tensor  # without the image, or with a spoilt one
    logits: Tensor  # [B, T, VOCABULARY]
    spoilt_logits: Tensor
    layers: Tensor  # hidden states [2, B, PROMPT + T, 4]

    def to(self, device: torch.device) -> Inputs:
        return Inputs(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def draw(*lengths: int) -> Inputs:
    source = random.Random(7)
    batch, longest = len(lengths), max(lengths)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.tensor([source.uniform(low, high) for _ in range(count)]).reshape(shape)

    old_logp = uniform(-3.0, -0.1, batch, longest)
    logits = uniform(-2.0, 2.0, batch, longest, VOCABULARY)
    return Inputs(
        mask=torch.arange(longest) < torch.tensor(lengths)[:, None],
        groups=torch.arange(batch) // 2,
        advantages=uniform(-1.0, 1.0, batch),
        old_logp=old_logp,
        logp=old_logp + uniform(-0.3, 0.3, batch, longest),
        spoilt_logp=old_logp + uniform(-2.0, 2.0, batch, longest),
        logits=logits,
        spoilt_logits=logits + uniform(-1.0, 1.0, batch, longest, VOCABULARY),
        layers=uniform(-1.0, 1.0, 2, batch, PROMPT + longest, 4),
    )


def k3(given: Inputs) -> Tensor:
    difference = given.spoilt_logp - given.old_logp
    return (difference.exp() - difference - 1).clamp(0, 10)


def gradient_of(loss: Tensor, logp: Tensor, mask: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logp)[0][mask]


def agree(found: Tensor, recorded: Any, floor: float = FLOOR) -> None:
    assert_close(found.detach(), torch.tensor(recorded, dtype=torch.float64, device=found.device), floor=floor)


def places(selected: Tensor, mask: Tensor) -> list[list[int]]:
    """Ordinals of the selected tokens of each response."""
    return [row[valid].nonzero()[:, 0].tolist() for row, valid in zip(selected, mask, strict=True)]


# fmt: off
# Lengths; of the released code the selected ordinals, the factors of responses, the loss and its gradient.
VPPO = [
    (
        (7, 1, 12, 4),
        [[1, 4, 5], [0], [0, 1, 2, 6, 11], [1, 2]],
        [1.096183, 1.099716, 0.9, 0.9041008],
        -0.133423,
        [0.0, -0.005250936, 0.0, 0.0, -0.004208086, -0.006018384, 0.0, -0.05111192, -0.02124506, -0.02286925,
         -0.02913582, 0.0, 0.0, 0.0, -0.01909692, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.03628226, 0.0, 0.0],
    ),
    (
        (5, 0, 9),
        [[3, 4], [], [0, 3, 6, 8]],
        [0.9, 1.0, 1.1],
        0.2731313,
        [0.0, 0.0, 0.0, 0.02772986, 0.02601142, 0.05872875, 0.0, 0.0, 0.06800825, 0.0, 0.0, 0.04824045, 0.0,
         0.04441262],
    ),
    ((6,), [[0, 4, 5]], [1.0], -0.1826531, [-0.05757679, 0.0, 0.0, 0.0, -0.05332601, -0.07175029]),
]
# fmt: on


@pytest.mark.parametrize(("lengths", "selected", "factors", "loss", "gradient"), VPPO)
def test_vppo(
    backend_name: str,
    device: torch.device,
    lengths: tuple[int, ...],
    selected: list[list[int]],
    factors: list[float],
    loss: float,
    gradient: list[float],
) -> None:
    given = draw(*lengths).to(device)
    shaping = shape_tokens(k3(given), given.mask, given.groups, ShapingConfig.vppo())
    assert places(shaping.selected, given.mask) == selected
    agree(shaping.response_factor, factors)
    logp = given.logp.requires_grad_()
    found = policy_loss(
        logp,
        given.old_logp,
        given.advantages,
        given.mask,
        factors=shaping.factors,
        epsilon_high=0.28,
        dual_clip=3.0,
    ).loss
    agree(found, loss)
    agree(gradient_of(found, logp, given.mask), gradient)


# fmt: off
# Lengths; of the released code the divergences, the selected ordinals, the loss and its gradient at these tokens.
VEPO = [
    (
        (7, 1, 12, 4),
        [0.01051398, 0.01989463, 0.01623452, 0.0257838, 0.007311789, 0.02019878, 0.0529555, 0.01222314, 0.001311645,
         0.06204408, 0.06204773, 0.02439793, 0.0376393, 0.02827708, 0.0157419, 0.04273716, 0.01427056, 0.008344553,
         0.04465485, 0.06876384, 0.004001527, 0.001990117, 0.03244897, 0.02436063],
        [[3, 6], [0], [1, 2, 11], [2]],
        -0.4184381,
        [-0.01455346, -0.02016215, 0.0, -0.08712097, -0.1109936, 0.0, 0.0],
    ),
    (
        (6,),
        [0.04014738, 0.03788871, 0.01363082, 0.01332631, 0.06800035, 0.03729252],
        [[0, 4]],
        -0.3327084,
        [-0.1727304, -0.159978],
    ),
]
# fmt: on


@pytest.mark.parametrize(("lengths", "divergences", "selected", "loss", "gradient"), VEPO)
def test_vepo(
    backend_name: str,
    device: torch.device,
    lengths: tuple[int, ...],
    divergences: list[float],
    selected: list[list[int]],
    loss: float,
    gradient: list[float],
) -> None:
    given = draw(*lengths).to(device)
    head = torch.eye(VOCABULARY, device=device)
    views = linear_divergence(given.logits, given.spoilt_logits, head, measures=("js", "entropy", "other_entropy"))
    agree(views.js[given.mask], divergences)
    gap = (views.other_entropy - views.entropy).abs()
    signals = {"visual": views.js, "entropy": views.entropy, "gap": gap}
    shaping = shape_tokens(signals, given.mask, given.groups, ShapingConfig.vepo())
    assert places(shaping.selected, given.mask) == selected
    logp = given.logp.requires_grad_()
    options = {"epsilon_low": 0.2, "epsilon_high": 0.2}
    found = policy_loss(logp, given.old_logp, given.advantages, given.mask, selected=shaping.selected, **options).loss
    agree(found, loss)
    agree(gradient_of(found, logp, shaping.selected), gradient)


# fmt: off
PEPO: dict[Any, list[float]] = {
    "scores": [-0.2818588, -0.2634327, -0.1238999, 0.1974509, -0.218343, 0.2555897, -0.07717356, -0.344638, -0.1533594,
     0.3286752, -0.05810029, -0.1372153, 0.1487498, -0.1771213, -0.2465488],
    1.0: [0.8828208, 0.8957209, 0.9639645, 1.155998, 0.9185594, 1.194237, 0.9886991, 1.0, 0.8921226, 1.170356,
     0.9375216, 0.974502, 1.147142, 0.9573351, 0.9210214],
    0.25: [0.9707052, 0.9739302, 0.9909911, 1.039, 0.9796398, 1.048559, 0.9971747, 1.0, 0.9730307, 1.042589, 0.9843804,
     0.9936255, 1.036785, 0.9893337, 0.9802554],
}
# fmt: on


def test_pepo(backend_name: str, device: torch.device) -> None:
    given = draw(7, 1, 3, 4).to(device)
    image = torch.zeros(given.layers.shape[1:3], dtype=torch.bool, device=device)
    image[:, IMAGE] = True
    focus = torch.stack([visual_focus(layer, image, given.mask, pooling="unit_mean") for layer in given.layers]).mean(0)
    agree(focus[given.mask], PEPO["scores"])
    signals = {"visual": focus, "entropy": torch.distributions.Categorical(logits=given.logits).entropy()}
    for progress in (1.0, 0.25):
        shaping = shape_tokens(signals, given.mask, given.groups, ShapingConfig.pepo(), progress=progress)
        agree(shaping.factors[given.mask], PEPO[progress])


# fmt: off
VA_OPD: dict[str, Any] = {
    "weights": [0.01192033, 0.01192033, 0.01192033, 0.01192033, 0.02980084, 0.02980084, 0.01192033, 0.8807967,
     0.1467993, 0.04893309, 0.1467993, 0.04893309, 0.04893309, 0.04893309, 0.04893309, 0.04893309, 0.04893309,
     0.04893309, 0.04893309, 0.1467993, 0.01986741, 0.05960223, 0.01986741, 0.01986741],
    "loss": 0.7856066,
}
# fmt: on


def test_va_opd(backend_name: str, device: torch.device) -> None:
    given = draw(7, 1, 12, 4).to(device)
    signal = (given.old_logp - given.spoilt_logp).clamp(min=0)
    factors = shape_tokens(signal, given.mask, given.groups, ShapingConfig.va_opd()).factors
    in_the_mean = given.mask / given.mask.sum(-1, keepdim=True)  # of each response
    agree((factors * in_the_mean / 2)[given.mask], VA_OPD["weights"])  # two responses of a prompt
    divergences = given.logits[..., 0].abs()
    agree((factors * divergences * in_the_mean).sum(-1).mean(), VA_OPD["loss"])


# fmt: off
PAPO: dict[str, Any] = {
    "loss": 0.7160126,
    "gradient": [0.03553528, 0.03022971, 0.03733126, 0.03365778, 0.03048525, 0.05678608, 0.0582692, 0.04207684,
     0.06339001, 0.0613671, 0.0577867, 0.03920351, 0.0356393, 0.04387435],
}
# fmt: on


def test_papo(backend_name: str, device: torch.device) -> None:
    given = draw(5, 0, 9).to(device)
    logp = given.logp.requires_grad_()
    views = [ViewTerm(given.spoilt_logp, -0.02, "k3_clamped"), ViewTerm(torch.zeros_like(logp), -0.05, "k1")]
    options = {"epsilon_low": 0.2, "epsilon_high": 0.3, "dual_clip": 3.0}
    found = policy_loss(logp, given.old_logp, given.advantages, given.mask, views=views, **options).loss
    agree(found, PAPO["loss"])
    agree(gradient_of(found, logp, given.mask), PAPO["gradient"])


def test_dyco_rl(backend_name: str, device: torch.device) -> None:
    keys = draw(6).to(device).layers[:, 0][None]  # [1, 2 heads, PROMPT + 6, 4]
    segments = torch.ones(1, keys.shape[2], dtype=torch.int64, device=device)
    segments[:, IMAGE] = 0
    shift = attention_shift(keys[:, :, PROMPT:], keys, segments)
    assert shift[0, 0].isnan()
    agree(shift[0, 1:], [0.1077142, 0.2649313, 0.2682438, 0.4430396, 0.4883782], floor=5e-6)

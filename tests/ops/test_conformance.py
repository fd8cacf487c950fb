"""Every public function on every backend, in both layouts and all dtypes, on one batch of every edge, in fp64's terms.

The tests of each function look at it closely; this matrix leaves out none of its squares. Gradients are checked against
the reference implementation's as well, and the reference implementation's against finite differences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cases import Batch, Response, make_batch
from linear_cases import Head, with_predicting_rows
from test_attention_mass import Attention, draw
from tolerance import assert_close, floor_of
from torch import Tensor

import vgpo_kernels
from vgpo_kernels import PolicyLoss, VGPOConfig, backend
from vgpo_kernels.config import CHOICES

NAN = float("nan")
NARROW = (torch.bfloat16, torch.float16)
FEATURES, VOCABULARY = 24, 21
# A gate may fall either way where two computed cosines are closer than fp32 can tell, so that no bound on losses made
# of them holds: it is open here, and visual_weights' own cosines are given.
OPEN = VGPOConfig.paper(gate=False)

EVERY_EDGE = (
    Response(visual=9, length=7, holes=True),
    Response(length=0),
    Response(length=1, group=1),
    Response(visual=0, length=5, group=1),
    Response(visual=3, length=6, group=1),
    Response(visual=3, length=6, group=2**40),
    Response(visual=2, length=8, late=2, group=1),
)
BATCHES = {
    "every edge": EVERY_EDGE,
    "one broken": EVERY_EDGE,
    "strided": EVERY_EDGE,
    "no tokens": (Response(length=0), Response(visual=0, length=0)),
    "no responses": (),
}


@dataclass(frozen=True)
class Case:
    """What the functions take between them, all of it in one dtype, layout and state."""

    batch: Batch
    head: Head
    attention: Attention
    cos: Tensor
    score: Tensor

    def convert(self, change: Callable[[Tensor], Tensor]) -> Case:
        """Return the case with every floating tensor changed."""

        def changed(part: Any) -> Any:
            floats = {name: value for name, value in vars(part).items() if isinstance(value, Tensor)}
            floats = {name: change(value) for name, value in floats.items() if value.is_floating_point()}
            return replace(part, **floats)

        parts = (changed(part) for part in (self.batch, self.head, self.attention))
        return Case(*parts, change(self.cos), change(self.score))

    def to(self, device: torch.device) -> Case:
        """Return the case on another device, as strided as it is."""
        if device == self.cos.device:
            return self
        parts = (part.to(device) for part in (self.batch, self.head, self.attention))
        return Case(*parts, self.cos.to(device), self.score.to(device))


def make_case(kind: str, dtype: torch.dtype, packed: bool) -> Case:
    batch, head = with_predicting_rows(make_batch(BATCHES[kind], features=FEATURES, packed=packed), VOCABULARY)
    # Two images: one visual token of the first is none.
    batch.visual_mask.view(-1)[batch.visual_mask.reshape(-1).nonzero()[3:4]] = False
    generator = torch.Generator().manual_seed(5)
    cos = torch.rand(batch.response_mask.shape, generator=generator) * 2 - 1
    score = torch.rand(len(batch.group_ids), generator=generator) * 9
    case = Case(batch, head, make_attention(kind, packed), cos, score).convert(lambda tensor: tensor.to(dtype))
    if kind == "one broken":
        put_nan(case)
    return case.convert(with_gaps) if kind == "strided" else case


def make_attention(kind: str, packed: bool) -> Attention:
    lengths = ((3, 20), (0, 4), (1, 1), (6, 6)) if packed else ((3, 20), (3, 20))
    if kind == "no tokens":
        lengths = ((0, 4), (0, 0)) if packed else ((0, 4), (0, 4))
    case = draw(lengths, heads=4, key_heads=2, size=16, packed=packed, mixed=True)
    if kind != "no responses":
        return case
    nothing = {name: value[:0] for name, value in vars(case).items() if name in ("q", "k", "segments")}
    boundaries = {name: torch.zeros(1, dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_k") if packed}
    return replace(case, **nothing, **boundaries)


def put_nan(case: Case) -> None:
    """Break one token of one response, in everything that is said of it."""
    token = case.batch.response_mask.nonzero()[2].tolist()
    row = [*token[:-1], token[-1] - case.batch.response_mask.shape[-1] + case.batch.hidden.shape[-2]]
    for values, place in (
        (case.cos, token),
        (case.batch.logp, token),
        (case.batch.hidden, row),
        (case.head.hidden, row),
    ):
        values[(*place, 0) if values.shape[-1] == FEATURES else tuple(place)] = NAN
    case.score[0] = NAN
    case.attention.q[0, 0, 0] = NAN


def with_gaps(tensor: Tensor) -> Tensor:
    """Return the same numbers with NaN between them."""
    return torch.stack([tensor, torch.full_like(tensor, NAN)], -1)[..., 0]


# ---- the functions, each with all it returns and its gradients by all it is differentiable in --------------------


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def gradients(total: Tensor, **leaves: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(total, tuple(leaves.values()))
    assert [gradient.dtype for gradient in found] == [tensor.dtype for tensor in leaves.values()]
    return {f"gradient by {name}": gradient for name, gradient in zip(leaves, found, strict=True)}


def with_gradients(results: dict[str, Tensor], **leaves: Tensor) -> dict[str, Tensor]:
    """Add the gradients of a weighted sum of all results."""
    generator = torch.Generator().manual_seed(7)
    weights = (torch.randn(result.shape, generator=generator).to(result) for result in results.values())
    total = sum((result * weight).sum() for result, weight in zip(results.values(), weights, strict=True))
    assert isinstance(total, Tensor)
    return {name: result.detach() for name, result in results.items()} | gradients(total, **leaves)


def of_loss(result: PolicyLoss, **leaves: Tensor) -> dict[str, Tensor]:
    return {"loss": result.loss.detach()} | result.metrics | gradients(3 * result.loss, **leaves)


def image_of(case: Case) -> dict[str, Any]:
    # The signal is detached, whatever its hidden states ask for.
    return {
        "hidden": leaf(case.batch.hidden),
        "visual_mask": case.batch.visual_mask,
        "cu_seqlens": case.batch.cu_seqlens,
    }


def policy_of(case: Case) -> dict[str, Any]:
    batch = case.batch
    return {
        "old_logp": batch.old_logp,
        "advantages": batch.token_advantages,
        "response_mask": batch.response_mask,
        "ref_logp": batch.ref_logp,
        "kl_coef": 0.1,
        "entropy_coef": 0.02,
        "dual_clip": 3.0,
        "max_length": 16,
    }


VISIBILITIES = ("all", "causal")
POOLINGS = tuple({"visibility": seen, "pooling": pooling} for seen in VISIBILITIES for pooling in ("mean", "unit_mean"))


def visual_prototype(case: Case) -> dict[str, Tensor]:
    found = {str(given): vgpo_kernels.visual_prototype(**image_of(case), **given) for given in POOLINGS}
    assert not any(means.requires_grad for means in found.values())
    return found


def visual_focus(case: Case) -> dict[str, Tensor]:
    batch, count = case.batch, len(case.batch.group_ids)
    found = {
        str(given): vgpo_kernels.visual_focus(response_mask=batch.response_mask, **image_of(case), **given)
        for given in POOLINGS
    }
    shared = {
        "prototype": leaf(case.head.weight[:3]),
        "prototype_index": torch.arange(count, device=case.cos.device) % 4 - 1,
    }
    given = vgpo_kernels.visual_focus(response_mask=batch.response_mask, **image_of(case), **shared)
    assert not any(cos.requires_grad for cos in (*found.values(), given))
    return found | {"by given prototypes": given}


def visual_weights(case: Case) -> dict[str, Tensor]:
    batch, found = case.batch, {}
    for preset in (VGPOConfig.paper(), VGPOConfig.released()):
        weights = vgpo_kernels.visual_weights(
            leaf(case.cos),
            batch.response_mask,
            batch.group_ids,
            preset,
            cu_seqlens=batch.cu_seqlens,
            has_visual=batch.has_visual,
        )
        *tensors, metrics = weights
        assert not any(tensor.requires_grad for tensor in tensors)
        found |= {f"{name}, {preset.score}": value for name, value in zip(weights._fields, tensors, strict=False)}
        found |= {f"{name}, {preset.score}": value for name, value in metrics.items()}
    return found


def group_weights(case: Case) -> dict[str, Tensor]:
    batch = case.batch
    phi = vgpo_kernels.group_weights(leaf(case.score), batch.group_ids, OPEN, has_visual=batch.has_visual)
    assert not phi.requires_grad
    return {"phi": phi}


def policy_loss(case: Case) -> dict[str, Tensor]:
    batch, found = case.batch, {}
    for loss_type in ("dapo", "gspo", "luspo", "vespo"):
        leaves = {"logp": leaf(batch.logp), "entropy": leaf(batch.entropy)}
        result = vgpo_kernels.policy_loss(
            **leaves, **policy_of(case), factors=case.cos, cu_seqlens=batch.cu_seqlens, loss_type=loss_type
        )
        found |= {f"{name}, {loss_type}": value for name, value in of_loss(result, **leaves).items()}
    return found


def vgpo_loss(case: Case) -> dict[str, Tensor]:
    batch, leaves = case.batch, {"logp": leaf(case.batch.logp), "entropy": leaf(case.batch.entropy)}
    result = vgpo_kernels.vgpo_loss(
        **image_of(case), **leaves, **policy_of(case), group_ids=batch.group_ids, config=OPEN, visibility="causal"
    )
    return of_loss(result, **leaves)


def attention_mass(case: Case) -> dict[str, Tensor]:
    attention, leaves = case.attention, {"q": leaf(case.attention.q), "k": leaf(case.attention.k)}
    masses = {
        f"{window}, {per_head}": vgpo_kernels.attention_mass(
            **leaves, key_segments=attention.segments, window=window, per_head=per_head, **attention.layout
        )
        for window, per_head in ((None, False), (5, True))
    }
    return with_gradients(masses, **leaves)


def attention_heatmap(case: Case) -> dict[str, Tensor]:
    attention, leaves = case.attention, {"q": leaf(case.attention.q), "k": leaf(case.attention.k)}
    seen = {"key_mask": attention.segments == 1, "attention_mask": attention.segments >= 0}
    heat = vgpo_kernels.attention_heatmap(**leaves, **seen, **attention.layout)
    return with_gradients({"heat": heat}, **leaves)


def attention_shift(case: Case) -> dict[str, Tensor]:
    attention, given = case.attention, {"q": leaf(case.attention.q), "k": leaf(case.attention.k)}
    found = {
        f"{window}, {per_head}": vgpo_kernels.attention_shift(
            **given, key_segments=attention.segments, window=window, per_head=per_head, **attention.layout
        )
        for window, per_head in ((None, False), (5, True))
    }
    assert not any(shift.requires_grad for shift in found.values())
    return found


def of_head(case: Case) -> tuple[dict[str, Tensor], Tensor]:
    """Leaves of an LM head, and a target for each row that holds numbers."""
    hidden = case.head.hidden
    ids = torch.randint(VOCABULARY, hidden.shape[:-1], generator=torch.Generator().manual_seed(3))
    head = {"hidden": leaf(hidden), "weight": leaf(case.head.weight), "bias": leaf(case.head.bias)}
    return head, ids.to(hidden.device).masked_fill(hidden.isnan().all(-1), -100)


def linear_logprob(case: Case) -> dict[str, Tensor]:
    leaves, targets = of_head(case)
    found = vgpo_kernels.linear_logprob(**leaves, targets=targets, temperature=0.8, return_entropy=True)
    return with_gradients(dict(zip(("logp", "entropy"), found, strict=True)), **leaves)


def linear_logprob_slice(case: Case) -> dict[str, Tensor]:
    leaves, targets = of_head(case)
    hidden, weight, bias = leaves.values()
    slices = [
        vgpo_kernels.linear_logprob_slice(hidden, weight[part], targets, first=part.start, bias=bias[part])
        for part in (slice(0, 8), slice(8, VOCABULARY))
    ]
    found = vgpo_kernels.combine_slices(torch.stack(slices), targets)
    return with_gradients(dict(zip(("logp", "entropy"), found, strict=True)), **leaves)


def linear_policy_loss(case: Case) -> dict[str, Tensor]:
    leaves, _ = of_head(case)
    options = policy_of(case) | {"targets": case.head.targets, "cu_seqlens": case.batch.cu_seqlens}
    return of_loss(vgpo_kernels.linear_policy_loss(**leaves, **options, factors=case.cos), **leaves)


def linear_vgpo_loss(case: Case) -> dict[str, Tensor]:
    leaves, _ = of_head(case)
    image = image_of(case) | leaves
    policy = policy_of(case) | {"targets": case.head.targets}
    result = vgpo_kernels.linear_vgpo_loss(
        **image, **policy, group_ids=case.batch.group_ids, config=OPEN, visibility="causal"
    )
    return of_loss(result, **leaves)


FUNCTIONS: list[Callable[[Case], dict[str, Tensor]]] = [
    *(visual_prototype, visual_focus, visual_weights, group_weights, policy_loss, vgpo_loss),
    *(attention_mass, attention_heatmap, attention_shift),
    *(linear_logprob, linear_logprob_slice, linear_policy_loss, linear_vgpo_loss),
]


def by_definition(function: Callable[[Case], dict[str, Tensor]], case: Case) -> dict[str, Tensor]:
    with backend("reference"):
        return function(case.convert(lambda tensor: tensor.double()))


def without_first(case: Case, results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients by what tokens and rows have, those of the first response left out."""
    batch, attention = case.batch.cu_seqlens, case.attention
    boundaries = dict.fromkeys(("logp", "entropy", "hidden"), batch)
    boundaries |= {"q": attention.cu_seqlens_q, "k": attention.cu_seqlens_k}
    found = {}
    for name, result in results.items():
        of_leaf = name.removeprefix("gradient by ").split(",")[0]
        if name.startswith("gradient") and of_leaf in boundaries:
            begins = boundaries[of_leaf]
            found[name] = result[1 if begins is None else int(begins[1]) :]
    return found


def size_of(gradient: Tensor) -> float:
    largest = gradient.abs().max().item() if gradient.numel() else 0.0
    return largest or 1.0


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float32) for kind in BATCHES if kind != "strided"), *(("strided", dtype) for dtype in NARROW)],
    ids=str,
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_conforms(
    backend_name: str,
    device: torch.device,
    function: Callable[[Case], dict[str, Tensor]],
    kind: str,
    dtype: torch.dtype,
    packed: bool,
) -> None:
    case = make_case(kind, dtype, packed)
    exact, found = by_definition(function, case), function(case.to(device))
    # Gradients leave in their leaf's dtype, whose rounding is relative to their size.
    whole = by_definition(function, make_case("every edge", dtype, packed)) if kind == "one broken" else exact
    units = {name: size_of(result) for name, result in whole.items() if name.startswith("gradient")}
    if kind == "one broken":
        # Which of its own gradients a broken response loses is its own affair. The others must not see that it is.
        exact |= without_first(case, whole)
        found |= without_first(case, found)
    assert found.keys() == exact.keys()
    for name, expected in exact.items():
        unit = units.get(name, 1.0)
        floor = 4 * floor_of() + (floor_of(dtype) if name in units else 0.0)
        assert_close(found[name].cpu().double() / unit, expected / unit, name=name, floor=floor)


# ---- gradients of the reference implementation, against finite differences ---------------------------------------

SMALL = (
    Response(visual=2, text=1, length=3, holes=True),
    Response(visual=3, text=1, length=2),
    Response(visual=0, length=1),
)
# Factors that hidden states do not move, whose gradient is detached and would be missed.
CONSTANT = VGPOConfig.paper(intra=False, inter=False)


# Losses whose gradient is by design not that of their value: they stop it at the ratio.
STOPPED = ("gspo_token", "cispo", "vespo")


def small(packed: bool) -> tuple[Batch, Head]:
    batch, head = with_predicting_rows(make_batch(SMALL, features=3, packed=packed), 5)
    # Differences of what is not read would be those of NaN.
    hidden = head.hidden.nan_to_num()
    return replace(batch, hidden=hidden), replace(head, hidden=hidden).double()


def numbers(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(leaf(tensor.nan_to_num().double()) for tensor in tensors)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("loss_type", [name for name in CHOICES["loss_type"] if name not in STOPPED])
def test_gradcheck_of_policy_losses(loss_type: str, packed: bool) -> None:
    batch, _ = small(packed)
    shared = {"old_logp": batch.old_logp, "advantages": batch.token_advantages, "response_mask": batch.response_mask}
    shared |= {"cu_seqlens": batch.cu_seqlens, "ref_logp": batch.ref_logp, "kl_coef": 0.2, "entropy_coef": 0.1}
    shared |= {"loss_type": loss_type, "dual_clip": 3.0, "max_length": 8}

    def policy(logp: Tensor, entropy: Tensor) -> Tensor:
        return vgpo_kernels.policy_loss(logp, entropy=entropy, factors=batch.old_logp.exp(), **shared).loss

    def in_one_call(logp: Tensor, entropy: Tensor) -> Tensor:
        image = {"hidden": batch.hidden, "visual_mask": batch.visual_mask, "group_ids": batch.group_ids}
        return vgpo_kernels.vgpo_loss(logp=logp, entropy=entropy, config=VGPOConfig.paper(), **image, **shared).loss

    for function in (policy, in_one_call):
        assert torch.autograd.gradcheck(function, numbers(batch.logp, batch.entropy))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("window", [None, 2])
def test_gradcheck_of_attention(window: int | None, packed: bool) -> None:
    case = draw(((2, 4), (1, 3) if packed else (2, 4)), heads=2, key_heads=1, size=2, packed=packed)
    options = {"window": window, **case.layout}

    def mass(q: Tensor, k: Tensor) -> Tensor:
        return vgpo_kernels.attention_mass(q, k, case.segments, **options)

    def heatmap(q: Tensor, k: Tensor) -> Tensor:
        return vgpo_kernels.attention_heatmap(q, k, case.segments == 1, per_head=True, **options)

    for function in (mass, heatmap):
        assert torch.autograd.gradcheck(function, numbers(case.q, case.k))


def test_gradcheck_of_linear_logprob() -> None:
    _, head = small(packed=False)
    targets = torch.arange(head.hidden.shape[0] * head.hidden.shape[1]).view(head.hidden.shape[:2]) % 6
    targets = targets.masked_fill(targets == 5, -100)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        found = vgpo_kernels.linear_logprob(hidden, weight, targets, bias=bias, temperature=0.7, return_entropy=True)
        assert isinstance(found, tuple)
        return found

    assert torch.autograd.gradcheck(function, numbers(*head.tensors()))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_gradcheck_of_linear_losses(loss_type: str, packed: bool) -> None:
    batch, head = small(packed)
    shared = {"old_logp": batch.old_logp, "advantages": batch.advantages, "response_mask": batch.response_mask}
    shared |= {"targets": head.targets, "cu_seqlens": batch.cu_seqlens, "loss_type": loss_type, "entropy_coef": 0.1}
    image = {"visual_mask": batch.visual_mask, "group_ids": batch.group_ids}

    def from_hidden(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return vgpo_kernels.linear_vgpo_loss(hidden, weight, bias=bias, config=CONSTANT, **image, **shared).loss

    def from_weight(weight: Tensor, bias: Tensor) -> Tensor:
        return vgpo_kernels.linear_vgpo_loss(head.hidden, weight, bias=bias, config=OPEN, **image, **shared).loss

    def by_factors(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        factors = batch.old_logp.exp()
        return vgpo_kernels.linear_policy_loss(hidden, weight, bias=bias, factors=factors, **shared).loss

    assert torch.autograd.gradcheck(from_hidden, numbers(*head.tensors()))
    assert torch.autograd.gradcheck(from_weight, numbers(*head.tensors()[1:]))
    assert torch.autograd.gradcheck(by_factors, numbers(*head.tensors()))

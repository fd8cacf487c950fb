"""Every public operator on a device without float64, each compared with the reference in float64 on the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from random import Random
from typing import Any

import gpu_small_cases
import pytest
import torch
from accelerator import host_copies
from cases import EDGES, Batch, make_batch
from divergence_cases import check as check_divergences
from divergence_cases import make_views
from linear_cases import Head, make_head, with_predicting_rows
from linear_cases import check as check_head
from loss_cases import check_loss, draw_loss, draw_terms
from right_batches import LAYOUTS, Plan, arguments, right_batch
from tolerance import assert_close, floor_of, same_bits
from torch import Tensor, nn

import vgpo_kernels
from vgpo_kernels import (
    ShapingConfig,
    VGPOConfig,
    backend,
    backends,
    check_batch,
    combine_factors,
    shape_tokens,
    visual_focus,
    visual_weights,
)
from vgpo_kernels.config import CHOICES
from vgpo_kernels.shaping import METHODS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MANY = EDGES["shuffled groups"] + EDGES["no image"] + EDGES["late images"] + EDGES["empty response"]


def moved(value: Any, device: torch.device | str) -> Any:
    """Return a value with its tensors on a device."""
    if isinstance(value, dict):
        return {name: moved(one, device) for name, one in value.items()}
    return value.to(device) if isinstance(value, Tensor | Batch | Head | nn.Module) else value


def check_refusals(device: torch.device) -> None:
    """The device is what it is said to be: views share memory, gradients arrive, and it refuses what mps refuses."""
    values = torch.arange(12.0).view(3, 4).to(device)
    values[1:, ::2] += 1
    assert values.cpu().sum() == 70 and values.t()._base is values
    leaf = values.clone().requires_grad_()
    leaf.square().sum().backward()
    assert torch.equal(leaf.grad.cpu(), 2 * values.cpu())
    for refused in (
        values.double,
        lambda: values.sum(dtype=torch.float64),
        lambda: torch.ones(2, dtype=torch.float64).to(device),
        lambda: values.to(torch.complex128),
    ):
        with pytest.raises(TypeError, match="the MPS framework doesn't support float64"):
            refused()
    with pytest.raises(NotImplementedError, match="'aten::mode' is not currently implemented for the MPS device"):
        values.mode()
    with pytest.raises(RuntimeError, match="to be on the same device"):
        values + torch.ones(3, 4)
    with host_copies() as copies, pytest.raises(AssertionError, match="copied to the host"), host_copies(11):
        values.cpu()
    assert copies == [12]
    assert (values * torch.tensor(2.0, dtype=torch.float64)).dtype == torch.float32
    assert backends.wide_dtype(device) == torch.float32


def check_one_warning(device: torch.device) -> None:
    """Whoever runs without kernels is told once, and of the width that is computed in."""
    batch = make_batch(EDGES["plain"]).to(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            factors_of(batch)
    (told,) = [str(one.message) for one in caught if one.category is RuntimeWarning]
    assert told.startswith(f"vgpo_kernels has no kernels for {device.type}") and "float32" in told


def factors_of(batch: Batch, visibility: str = "all", preset: str = "paper") -> Tensor:
    boundaries = {"cu_seqlens": batch.cu_seqlens}
    cos = visual_focus(batch.hidden, batch.visual_mask, batch.response_mask, visibility=visibility, **boundaries)
    config = getattr(VGPOConfig, preset)()
    return visual_weights(cos, batch.response_mask, batch.group_ids, config, **boundaries).factors


def check_shaping(device: torch.device) -> None:
    """Every preset of the family has the same bits padded or packed."""
    padded, packed = (make_batch(MANY, packed=packed, features=8).to(device) for packed in (False, True))

    def of_each(batch: Batch, method: str) -> Tensor:
        signals = {"visual": batch.logp.exp(), "entropy": batch.entropy, "gap": (batch.logp - batch.ref_logp).abs()}
        shared = (batch.response_mask, batch.group_ids, ShapingConfig.preset(method))
        factors = shape_tokens(signals, *shared, cu_seqlens=batch.cu_seqlens, progress=0.5).factors
        return factors.cpu()[batch.response_mask.cpu()]

    for method in METHODS:
        assert same_bits(of_each(padded, method), of_each(packed, method)), method


def check_layouts(device: torch.device, visibility: str, preset: str) -> None:
    """Factors have the same bits padded or packed, and beside other groups."""
    padded, packed = (make_batch(MANY, packed=packed, features=67).to(device) for packed in (False, True))
    found = factors_of(padded, visibility, preset)
    of_each = found.cpu()[padded.response_mask.cpu()]
    assert same_bits(of_each, factors_of(packed, visibility, preset).cpu()[packed.response_mask.cpu()])
    if preset == "paper":  # the other preset's offset is of the batch
        rows = padded.group_ids == 0
        fields = ("hidden", "visual_mask", "response_mask", "group_ids")
        alone = Batch(**{**vars(padded), **{name: getattr(padded, name)[rows] for name in fields}})
        assert same_bits(factors_of(alone, visibility, preset).cpu(), found[rows].cpu())


def check_small_cases(device: torch.device, part: slice) -> None:
    """Focus, prototypes, weights, losses, attention, LM heads and divergences, forward and backward."""
    gpu_small_cases.DEVICE, gpu_small_cases.BACKEND = device.type, "reference"
    for name, run in list(gpu_small_cases.cases())[part]:
        with explained(name):
            run()


class explained:
    """Name the case that fails in the block."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            error.add_note(self.name)


def check_losses(device: torch.device, seeds: range) -> None:
    """Every type of policy loss with drawn options, its gradients and metrics, number by number."""
    for loss_type in CHOICES["loss_type"]:
        for seed in seeds:
            with explained(f"{loss_type}, seed {seed}"):
                check_loss(draw_loss(Random(seed), {"loss_type": loss_type}), device)
                check_loss(draw_terms(Random(seed), {"loss_type": loss_type}), device)


def check_heads(device: torch.device, dtype: torch.dtype) -> None:
    """Log-probabilities and divergences of an LM head, in chunks."""
    check_head(make_head(9, 16, 301, dtype=dtype, bias=True, ignored=0.3), device, temperature=0.7, chunk_bytes=4096)
    check_divergences(make_views(7, 16, 150, dtype=dtype, ignored=0.3), device, chunk_bytes=4096, temperature=1.3)


def check_truncated_heads(device: torch.device) -> None:
    """Log-probabilities of a sampler that cuts off what is unlikely."""
    head = make_head(9, 16, 301)
    options = {"targets": head.targets, "top_k": 200, "top_p": 0.95, "min_p": 1e-6}

    def total(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
        return vgpo_kernels.linear_logprob(hidden, weight, targets, **options).logp.clamp(min=-100).sum()

    compare(total, (head.hidden, head.weight), options, device)


def check_losses_of_heads(device: torch.device, dtype: torch.dtype, packed: bool) -> None:
    """linear_policy_loss and linear_vgpo_loss, and their gradients."""
    batch, head = with_predicting_rows(make_batch(EDGES["plain"], dtype=dtype, packed=packed), 90)
    shared = {"bias": head.bias, "chunk_bytes": 8192, "cu_seqlens": batch.cu_seqlens}
    groups = {"visual_mask": batch.visual_mask, "response_mask": batch.response_mask, "group_ids": batch.group_ids}
    common = {"targets": head.targets, "old_logp": None, "advantages": batch.advantages, **shared}
    whole = {**common, **groups, "config": VGPOConfig.paper(), "visibility": "causal"}
    plain = {**common, "response_mask": batch.response_mask, "factors": batch.entropy}
    for function, given in ((vgpo_kernels.linear_vgpo_loss, whole), (vgpo_kernels.linear_policy_loss, plain)):
        compare(
            lambda hidden, weight, f=function, **rest: f(hidden, weight, **rest).loss,
            (head.hidden, head.weight),
            given,
            device,
        )


def check_combined_factors(device: torch.device) -> None:
    """combine_factors of scores that were compared elsewhere."""
    batch = make_batch(EDGES["plain"])
    generator = torch.Generator().manual_seed(0)
    psi, phi = (torch.rand(shape, generator=generator) - 0.5 for shape in (batch.response_mask.shape, (4,)))
    config = VGPOConfig.released()
    expected = combine_factors(psi.double(), phi.double(), batch.response_mask, config)
    found = combine_factors(psi.to(device), phi.to(device), batch.response_mask.to(device), config)
    assert_close(found, expected, name="factors")


def compare(
    function: Callable[..., Tensor], leaves: tuple[Tensor, ...], given: dict[str, Any], device: torch.device
) -> None:
    """Compare a result and its gradients on a device with those of the reference in float64 on the CPU."""

    def results(place: torch.device | str, dtype: torch.dtype | None) -> list[Tensor]:
        here = [leaf.detach().to(place, dtype or leaf.dtype).requires_grad_() for leaf in leaves]
        value = function(*here, **moved(given, place))
        return [value.detach(), *torch.autograd.grad(value, here)]

    found = results(device, None)
    with backend("reference"):
        exact = results("cpu", torch.float64)
    for name, one, wide in zip(("result", "first gradient", "second gradient"), found, exact, strict=True):
        assert one.device.type == device.type
        unit = wide.abs().max()
        assert_close(one.cpu() / unit, wide / unit, name=name, floor=floor_of(leaves[0].dtype, 4096))


def check_copies(device: torch.device) -> None:
    """No operator copies more than a value or two of each response to the host."""
    batch = make_batch(MANY, features=67).to(device)
    head = moved(make_head(400, 16, 301, ignored=0.3), device)
    hidden = head.hidden.requires_grad_()
    with host_copies(most=4 * len(MANY)) as copies:
        for visibility in ("all", "causal"):
            factors_of(batch, visibility)
            vgpo_kernels.vgpo_loss(
                *(batch.hidden, batch.logp, batch.old_logp, batch.advantages, batch.visual_mask, batch.response_mask),
                *(batch.group_ids, VGPOConfig.released()),
                visibility=visibility,
            )
        logp, entropy = vgpo_kernels.linear_logprob(hidden, head.weight, head.targets, return_entropy=True)
        (logp.sum() + entropy.sum()).backward()
        vgpo_kernels.linear_divergence(head.hidden, head.hidden.flip(0), head.weight, head.targets, measures=("kl",))
        q, k = (torch.ones(2, heads, length, 8, device=device) for heads, length in ((4, 50), (2, 80)))
        segments = torch.ones(2, 80, dtype=torch.int32, device=device)
        vgpo_kernels.attention_mass(q, k, segments)
        vgpo_kernels.attention_heatmap(q, k, segments == 1)
        vgpo_kernels.attention_shift(q, k, segments, segment=1)
    assert copies, "the gate rounds counts of tokens on the host"


def check_batches(device: torch.device, seeds: range) -> None:
    """check_batch finds nothing in right batches, and groups that are one response off."""
    sizes = {"prompts": 3, "generations": 4, "dtype": torch.float32}
    for layout in LAYOUTS:
        for seed in seeds:
            with explained(f"{layout}, seed {seed}"):
                assert not check_batch(**moved(arguments(right_batch(Plan(seed, layout=layout, **sizes))), device))
    given = moved(arguments(right_batch(Plan(0, order="blocks", odd=False, **sizes))), device)
    assert {one.name for one in check_batch(**given | {"group_ids": given["group_ids"].roll(1)})} == {"group-ids"}


def quick(device: torch.device) -> Iterator[Callable[[], None]]:
    """Yield every operator once."""
    yield partial(check_refusals, device)
    yield partial(check_one_warning, device)
    yield partial(check_layouts, device, "causal", "paper")
    yield partial(check_shaping, device)
    yield partial(check_small_cases, device, slice(5, 8))
    yield partial(check_small_cases, device, slice(-2, None))
    yield partial(check_losses, device, range(1))
    yield partial(check_heads, device, torch.bfloat16)
    yield partial(check_truncated_heads, device)
    yield partial(check_losses_of_heads, device, torch.float32, True)
    yield partial(check_combined_factors, device)
    yield partial(check_copies, device)
    yield partial(check_batches, device, range(1))


def thorough(device: torch.device) -> Iterator[Callable[[], None]]:
    """Yield every operator with every dtype of its inputs, in both layouts."""
    yield partial(check_small_cases, device, slice(None, None, 3))
    yield partial(check_losses, device, range(1, 4))
    for preset in ("paper", "released"):
        yield partial(check_layouts, device, "all", preset)
        yield partial(check_layouts, device, "causal", preset)
    for dtype in DTYPES:
        yield partial(check_heads, device, dtype)
        yield partial(check_losses_of_heads, device, dtype, False)
        yield partial(check_losses_of_heads, device, dtype, True)
    yield partial(check_batches, device, range(1, 4))

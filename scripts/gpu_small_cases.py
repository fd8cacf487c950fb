"""Call every CUDA operator on small batches and compare with the reference: what compute-sanitizer watches.

    python scripts/gpu_small_cases.py [--dry-run] [--without TEXT ...]

Needs a GPU and an extension built with CUDA; a dry run takes the CPU's kernels. Cases with one of the texts in their
name are left out. Says which of the cases went wrong, and then exits with an error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from cases import Batch, Response, make_batch  # noqa: E402
from linear_cases import make_head  # noqa: E402
from tolerance import assert_close, assert_matches  # noqa: E402
from torch import Tensor  # noqa: E402

import vgpo_kernels  # noqa: E402
from vgpo_kernels import ShapingConfig, VGPOConfig, backend  # noqa: E402
from vgpo_kernels.reference import visual_focus as focus_reference  # noqa: E402
from vgpo_kernels.shaping import METHODS  # noqa: E402

MIXED = (
    Response(visual=70, length=600, holes=True),
    Response(visual=0, length=33),
    Response(visual=1, length=0),
    Response(visual=5, length=150, group=1),
    Response(visual=40, length=130, late=50, holes=True, group=1),
)


MEASURES = ("kl", "reverse_kl", "js", "tv", "hellinger", "entropy", "other_entropy")
VISIBILITIES = ("all", "causal")
DEVICE, BACKEND = ("cpu", "cpp") if "--dry-run" in sys.argv[1:] else ("cuda", "cuda")


def focus(batch: Batch, visibility: str) -> dict[str, Tensor]:
    """Prototypes, and cosines by them, computed and given; and the same of unit vectors."""
    packed = {"cu_seqlens": batch.cu_seqlens}
    seen = packed | {"visibility": visibility}
    prototype = vgpo_kernels.visual_prototype(batch.hidden, batch.visual_mask, **seen)
    units = {"pooling": "unit_mean"}
    return {
        "prototype": prototype,
        "cos": vgpo_kernels.visual_focus(batch.hidden, batch.visual_mask, batch.response_mask, **seen),
        "cos by a given prototype": vgpo_kernels.visual_focus(
            batch.hidden, None, batch.response_mask, prototype=prototype, **packed
        ),
        "unit prototype": vgpo_kernels.visual_prototype(batch.hidden, batch.visual_mask, **seen, **units),
        "mean cosines": vgpo_kernels.visual_focus(
            batch.hidden, batch.visual_mask, batch.response_mask, **seen, **units
        ),
    }


def weigh(batch: Batch, cos: Tensor, config: VGPOConfig) -> vgpo_kernels.VisualWeights:
    """Factors and what they are made of."""
    return vgpo_kernels.visual_weights(cos, batch.response_mask, batch.group_ids, config, cu_seqlens=batch.cu_seqlens)


def check(batch: Batch, config: VGPOConfig, loss_type: str, visibility: str) -> None:
    """Run all operators on one batch; the reference runs on the CPU, where no sanitizer slows it down."""
    gpu = batch.to(DEVICE)
    with backend(BACKEND):
        found = focus(gpu, visibility)
        weights = weigh(gpu, found["cos"], config)
        phi = vgpo_kernels.group_weights(weights.score, gpu.group_ids, config)
        logp = gpu.logp.clone().requires_grad_()
        tokens = (gpu.old_logp, gpu.advantages)
        options = {"loss_type": loss_type, "ref_logp": gpu.ref_logp, "kl_coef": 0.1, "cu_seqlens": gpu.cu_seqlens}
        separate = vgpo_kernels.policy_loss(logp, *tokens, gpu.response_mask, factors=weights.factors, **options).loss
        whole = vgpo_kernels.vgpo_loss(
            *(gpu.hidden, logp, *tokens, gpu.visual_mask, gpu.response_mask, gpu.group_ids, config),
            visibility=visibility,
            **options,
        ).loss
        gradients = [torch.autograd.grad(loss, logp)[0] for loss in (separate, whole)]
    with backend("reference"):
        exact, exact_weights = focus(batch, visibility), weigh(batch, found["cos"].cpu(), config)

    boundaries = None if batch.cu_seqlens is None else batch.cu_seqlens.long()
    image = (batch.hidden, batch.visual_mask)
    causal = visibility == "causal"
    assert_matches(found["prototype"], focus_reference.visual_prototype, (*image, boundaries, causal), ("prototype",))
    arguments = (*image, batch.response_mask, boundaries, None, None, causal)
    assert_matches(found["cos"], focus_reference.visual_focus, arguments, ("cos",))
    for given in ("cos by a given prototype", "unit prototype", "mean cosines"):
        assert_close(found[given], exact[given], name=given, floor=1e-5)
    for name in ("factors", "psi", "w", "phi", "score"):
        assert_close(getattr(weights, name), getattr(exact_weights, name), name=name, floor=1e-5)
    assert torch.equal(phi.cpu(), weights.phi.cpu()), "phi in two phases"
    assert_close(whole, separate.cpu().double(), name="loss in one call", floor=1e-5)
    assert_close(gradients[1], gradients[0].cpu().double(), name="gradient in one call", floor=1e-5)


def check_shaping(batch: Batch) -> None:
    """Every preset of the family, and what spans responses of a group, in one call and in two phases."""
    signals = {"visual": batch.logp.exp(), "entropy": batch.entropy, "gap": (batch.logp - batch.ref_logp).abs()}
    gpu, layout = batch.to(DEVICE), {"progress": 0.5}
    moved = {name: signal.to(DEVICE) for name, signal in signals.items()}
    configs = {name: ShapingConfig.preset(name) for name in METHODS}
    configs["groups"] = ShapingConfig.cgpo(scope="group", response_scope="group")
    for name, config in configs.items():
        with backend(BACKEND):
            found = vgpo_kernels.shape_tokens(
                moved, gpu.response_mask, gpu.group_ids, config, cu_seqlens=gpu.cu_seqlens, **layout
            )
            phased = vgpo_kernels.response_factors(found.score, gpu.group_ids, config, **layout)
        with backend("reference"):
            exact = vgpo_kernels.shape_tokens(
                signals, batch.response_mask, batch.group_ids, config, cu_seqlens=batch.cu_seqlens, **layout
            )
        assert torch.equal(found.selected.cpu(), exact.selected), f"{name}: selected"
        for field in ("factors", "weights", "response_factor", "score"):
            assert_close(getattr(found, field), getattr(exact, field), name=f"{name}: {field}", floor=1e-5)
        assert_close(phased, found.response_factor.cpu().double(), name=f"{name}: in two phases")


def check_attention(dtype: torch.dtype, packed: bool, size: int) -> None:
    """Masses, heat map, their gradients and shifts of a few responses; the first keys of each are ignored, and NaN."""
    generator = torch.Generator().manual_seed(size)
    queries, keys, heads, key_heads = (41, 41), (150, 150), 6, 2
    q = torch.randn(2, heads, queries[0], size, generator=generator)
    k = torch.randn(2, key_heads, keys[0], size, generator=generator)
    segments = torch.arange(keys[0]).mul(3).div(keys[0], rounding_mode="floor").repeat(2, 1)
    segments[:, 90::7] = 1
    segments[:, :11] = -1
    k = k.masked_fill((segments < 0)[:, None, :, None], float("nan"))
    layout = {}
    if packed:
        q, k = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (q, k))
        segments = segments.flatten()
        layout = {"cu_seqlens_q": torch.tensor([0, 41, 82]), "cu_seqlens_k": torch.tensor([0, 150, 300])}
    q, k = q.to(dtype), k.to(dtype)

    def results(device: str, precision: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(device, precision).requires_grad_() for tensor in (q, k)]
        labels, moved = segments.to(device), {name: tensor.to(device) for name, tensor in layout.items()}
        masses = vgpo_kernels.attention_mass(*leaves, labels, window=60, **moved)
        heat = vgpo_kernels.attention_heatmap(*leaves, labels == 1, attention_mask=labels >= 0, **moved)
        shift = vgpo_kernels.attention_shift(*leaves, labels, window=60, **moved)
        loss = (masses * masses.detach().cos()).sum() + (heat * heat.detach().cos()).sum()
        return [masses.detach(), heat.detach(), shift, *torch.autograd.grad(loss, leaves)]

    with backend(BACKEND):
        found = results(DEVICE, dtype)
    with backend("reference"):
        exact = results("cpu", torch.float64)
    names = ("masses", "heat map", "shift", "gradient by q", "gradient by k")
    for name, one, wide in zip(names, found, exact, strict=True):
        gradient = name.startswith("gradient")
        floor = 4 * torch.finfo(dtype).eps if gradient else 1e-5
        unit = wide.abs().max() if gradient else 1.0
        assert_close(one.cpu() / unit, wide / unit, name=f"{name}, d={size} {dtype}", floor=max(floor, 1e-5))


def check_head(dtype: torch.dtype, with_bias: bool) -> None:
    """Log-probabilities, entropies and gradients of an LM head, in chunks that are no multiple of anything."""
    head = make_head(45, 40, 5003, dtype=dtype, bias=with_bias, ignored=0.2)

    def results(tensors: list[Tensor], targets: Tensor) -> list[Tensor]:
        inputs = [tensor.requires_grad_() for tensor in tensors]
        bias = inputs[2] if with_bias else None
        values = vgpo_kernels.linear_logprob(
            *inputs[:2], targets, bias=bias, temperature=0.8, return_entropy=True, chunk_bytes=4 * 30 * 1100
        )
        loss = values[0].sum() + (values[1] * values[1].detach().cos()).sum()
        return [*(value.detach() for value in values), *torch.autograd.grad(loss, inputs)]

    with backend(BACKEND):
        found = results(head.to(torch.device(DEVICE)).tensors(), head.targets.to(DEVICE))
    with backend("reference"):
        exact = results(head.double().tensors(), head.targets)
    names = ("logp", "entropy", "gradient by hidden", "gradient by weight", "gradient by bias")
    for name, one, wide in zip(names, found, exact, strict=with_bias):
        gradient = name.startswith("gradient")
        unit = wide.abs().max() if gradient else 1.0
        floor = max(4 * torch.finfo(dtype).eps, 1e-5) if gradient else 1e-5
        assert_close(one.cpu() / unit, wide / unit, name=f"{name}, {dtype}", floor=floor)


def check_divergence(dtype: torch.dtype, own_head: bool) -> None:
    """Divergences of two views and their gradients, in chunks that are no multiple of anything."""
    heads = [make_head(45, 40, 5003, dtype=dtype, bias=own_head, ignored=0.2, seed=seed) for seed in range(2)]
    targets = heads[0].targets.masked_fill(heads[1].targets < 0, -100)
    used = [heads[0].tensors(), heads[1].tensors() if own_head else [heads[1].hidden]]

    def results(tensors: list[list[Tensor]], ids: Tensor) -> dict[str, Tensor]:
        p, q = ([one.requires_grad_() for one in view] for view in tensors)
        of_other = {"other_weight": q[1], "bias": p[2], "other_bias": q[2]} if own_head else {}
        found = vgpo_kernels.linear_divergence(
            *(p[0], q[0], p[1], ids),
            **of_other,
            temperature=2.0,
            measures=MEASURES,
            js_beta=0.3,
            chunk_bytes=4 * 30 * 1100,
        )
        loss = torch.stack([(value * value.detach().cos()).sum() for value in found]).sum()
        gradients = enumerate(torch.autograd.grad(loss, [*p, *q]))
        values = {name: value.detach() for name, value in found._asdict().items()}
        return values | {f"gradient by input {index}": gradient for index, gradient in gradients}

    with backend(BACKEND):
        found = results([[one.to(DEVICE) for one in view] for view in used], targets.to(DEVICE))
    with backend("reference"):
        exact = results([[one.double() for one in view] for view in used], targets)
    for name, wide in exact.items():
        gradient = name.startswith("gradient")
        unit = wide.abs().max() if gradient else 1.0
        floor = max(4 * torch.finfo(dtype).eps, 1e-5) if gradient else 1e-5
        assert_close(found[name].cpu() / unit, wide / unit, name=f"{name}, {dtype}", floor=floor)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Every element type in both layouts, aligned and unaligned, with a name each."""
    configs = (VGPOConfig.paper(), VGPOConfig.released())
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for index, (dtype, packed) in enumerate(product(dtypes, (False, True))):
        about = f"{dtype}, {'packed' if packed else 'padded'}"
        batch = make_batch(MIXED, dtype=dtype, packed=packed, features=67 if packed else 264)
        for visibility in VISIBILITIES:
            choices = (configs[index % 2], ("dapo", "gspo", "cispo")[index % 3], visibility)
            yield f"factors and losses, {about}, {visibility}", partial(check, batch, *choices)
        yield f"attention, {about}", partial(check_attention, dtype, packed, 19 if packed else 136)
        for size in (64, 128):
            yield f"attention, {about}, heads of {size}", partial(check_attention, dtype, packed, size)
    for dtype, with_bias in product(dtypes, (True, False)):  # without one, 16-bit numbers go in tiles on Hopper
        yield f"LM head, {dtype}, {'with' if with_bias else 'without'} bias", partial(check_head, dtype, with_bias)
        number = "two heads" if with_bias else "one head"
        yield f"LM head, {dtype}, divergences by {number}", partial(check_divergence, dtype, with_bias)
    for packed in (False, True):
        batch = make_batch(MIXED, packed=packed, features=8)
        yield f"token shaping, {'packed' if packed else 'padded'}", partial(check_shaping, batch)


def main() -> int:
    """Run every case; a wrong one does not stop the others, an error of the device does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--without", nargs="+", default=[], metavar="TEXT")
    options = parser.parse_args()
    failed = 0
    for name, run in cases():
        if any(text in name for text in options.without):
            continue
        try:
            run()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            print(f"right: {name}", flush=True)
        except AssertionError as error:
            failed += 1
            print(f"WRONG: {name}: {error}", flush=True)
    print(f"{failed} cases are wrong" if failed else "every operator is right on small batches")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

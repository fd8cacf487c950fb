"""Measure the operators around matrix products on every GPU backend; rows go to benchmarks/results/gpu_products.csv.

    python benchmarks/gpu_products.py [--quick]

Attention by segment and by key at the heads of a 7B model, and its LM head. Every result is compared with the
definition on some rows before it is timed; one that is wrong gets no row. A time is the median of calls on the device,
between events. Speeds count the products that an operator cannot do without, and their share is of a large product of
bf16 matrices, measured in the same run. Peers: the same in plain PyTorch, eager and under torch.compile, the bare
products, and fused kernels of other libraries where they are installed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from importlib.util import find_spec
from typing import Any

import gpu
import torch
import torch.nn.functional as F
from gpu import BACKENDS, GPU, ROOT, count_launches, median_ms, peak_mib, said
from rows import append_csv
from tolerance import assert_close
from torch import Tensor

import vgpo_kernels
from vgpo_kernels import backend
from vgpo_kernels.reference import attention_mass as attention_reference
from vgpo_kernels.reference import linear_logprob as head_reference

TABLE = ROOT / "benchmarks" / "results" / "gpu_products.csv"
SEGMENTS = 3
CHECKED = 64  # queries of a response, or rows, that are compared with the definition at a time
ROUNDING = 2 * torch.finfo(torch.bfloat16).eps  # of a gradient in bf16
LOOSE = 0.03  # of peers, whose scores or logits are rounded to bf16

Call = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One measurement."""

    date: str
    commit: str
    device: str
    driver: str
    torch: str
    op: str
    variant: str
    shape: str
    ms: float
    tflop_per_s: float
    share_of_product: float
    launches: int  # of kernels, copies and fills
    peak_mib: float  # allocated by the call beyond its inputs


@dataclass(frozen=True)
class Case:
    """An operator, its peers, and the operations of the products that it needs."""

    op: str
    shape: str
    operations: float
    call: Call
    check: Callable[[Any, float], None]  # raises if a result is wrong by more than a share of its size
    peers: dict[str, Call]  # of the same result
    others: dict[str, Call] = field(default_factory=dict)  # of another result, or of none


# ---- attention ---------------------------------------------------------------------------------------------------


def eager_attention(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention as models write it, ``[B, Hq, T, S]``."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~visible, -torch.inf).softmax(-1, dtype=torch.float32)


def attention_cases(batch: int, heads: int, key_heads: int, queries: int, keys: int, size: int) -> list[Case]:
    """Masses, their gradient, and the heat map; queries are the last of their keys."""
    generator = torch.Generator(GPU).manual_seed(0)

    def normal(number: int, tokens: int) -> Tensor:
        return torch.randn(batch, number, tokens, size, generator=generator, device=GPU).bfloat16()

    q, k, v = normal(heads, queries), normal(key_heads, keys), normal(key_heads, keys)
    position = torch.arange(keys, device=GPU)
    segments = (position >= keys // 3).long() + (position >= keys - queries)
    labels = segments.expand(batch, -1).contiguous()
    visible = position <= position[-queries:, None]
    members = F.one_hot(segments, SEGMENTS).float()
    direction = torch.randn(batch, queries, SEGMENTS, generator=generator, device=GPU)
    pairs = float(visible.sum()) * batch * heads
    leaves = [tensor.requires_grad_() for tensor in (q.clone(), k.clone())]

    def with_gradient(masses: Callable[[Tensor, Tensor], Tensor]) -> Call:
        return lambda: torch.autograd.grad((masses(*leaves) * direction).sum(), leaves)

    def eager(q: Tensor, k: Tensor) -> Tensor:
        return (eager_attention(q, k, visible) @ members).mean(1)

    def eager_map(q: Tensor, k: Tensor) -> Tensor:
        return eager_attention(q, k, visible).mean((1, 2)) * (segments == 0)

    def ours(q: Tensor, k: Tensor) -> Tensor:
        return vgpo_kernels.attention_mass(q, k, labels)

    def our_map(q: Tensor, k: Tensor) -> Tensor:
        return vgpo_kernels.attention_heatmap(q, k, labels == 0)

    def exact_mass(q: Tensor, k: Tensor) -> Tensor:
        layout = (labels.int(), None, None, None, SEGMENTS, size**-0.5, 0, False)
        return attention_reference.attention_mass(q, k, *layout)[0]

    def check_mass(found: Tensor, floor: float) -> None:
        assert_close(found[:, -CHECKED:], exact_mass(q[:, :, -CHECKED:], k), name="masses", floor=floor)

    def check_gradient(found: tuple[Tensor, Tensor], floor: float) -> None:
        last = q[:, :, -CHECKED:].clone().requires_grad_()
        loss = (exact_mass(last, k) * direction[:, -CHECKED:]).sum()
        (exact,) = torch.autograd.grad(loss, last)
        unit = exact.abs().max()
        assert_close(found[0][:, :, -CHECKED:] / unit, exact / unit, name="gradient by q", floor=max(floor, ROUNDING))

    def check_map(found: Tensor, floor: float) -> None:
        positions = position[-queries:].expand(batch, -1)
        with backend("reference"):
            parts = [
                vgpo_kernels.attention_heatmap(part, k, labels == 0, query_positions=where.contiguous())
                for part, where in zip(q.split(CHECKED, 2), positions.split(CHECKED, 1), strict=True)
            ]
        exact = torch.stack(parts).mean(0).double()
        unit = exact.max()
        assert_close(found / unit, exact / unit, name="heat map", floor=floor)

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)

    # All keys as queries, which lets it take its fastest kernel: more work than for the last ones alone.
    every = normal(heads, keys)

    def causal_sdpa() -> Tensor:
        return F.scaled_dot_product_attention(every, k, v, is_causal=True, enable_gqa=True)

    compiled, compiled_map = (torch.compile(function, dynamic=False) for function in (eager, eager_map))
    shape = f"B={batch} heads={heads}/{key_heads} d={size} T={queries} S={keys} bfloat16"
    product = 2.0 * size * pairs
    return [
        Case(
            *("attention_mass", shape, product, lambda: ours(q, k), check_mass),
            peers={"eager": lambda: eager(q, k), "torch.compile": lambda: compiled(q, k)},
            others={
                "scaled_dot_product_attention, masked": sdpa,
                "scaled_dot_product_attention, all keys causal": causal_sdpa,
            },
        ),
        # Scores again twice, and the products that make the gradients by q and by k.
        Case(
            *("attention_mass and its gradient", shape, 5 * product, with_gradient(ours), check_gradient),
            peers={"eager": with_gradient(eager), "torch.compile": with_gradient(compiled)},
        ),
        # Scores once for the denominators, once for the keys of the image.
        Case(
            *("attention_heatmap", shape, product + 2.0 * size * batch * heads * queries * (keys // 3)),
            *(lambda: our_map(q, k), check_map),
            peers={"eager": lambda: eager_map(q, k), "torch.compile": lambda: compiled_map(q, k)},
        ),
    ]


# ---- LM head -----------------------------------------------------------------------------------------------------


def head_cases(rows: int, size: int, vocabulary: int) -> list[Case]:
    """Log-probabilities and entropies, and their gradients by hidden states and weight."""
    generator = torch.Generator(GPU).manual_seed(0)
    hidden = torch.randn(rows, size, generator=generator, device=GPU).bfloat16()
    weight = (torch.randn(vocabulary, size, generator=generator, device=GPU) * 2 * size**-0.5).bfloat16()
    targets = torch.randint(vocabulary, (rows,), generator=generator, device=GPU)
    direction = torch.randn(2, rows, generator=generator, device=GPU)
    leaves = [tensor.requires_grad_() for tensor in (hidden.clone(), weight.clone())]

    def ours(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return vgpo_kernels.linear_logprob(hidden, weight, targets, return_entropy=True, ignore_index=None)

    def eager(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        log_probabilities = (hidden @ weight.T).float().log_softmax(-1)
        logp = log_probabilities.gather(-1, targets[:, None]).squeeze(-1)
        return logp, -(log_probabilities.exp() * log_probabilities).sum(-1)

    def weighted(function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], *inputs: Tensor) -> Tensor:
        logp, entropy = function(*inputs)
        return (logp * direction[0, : len(logp)]).sum() + (entropy * direction[1, : len(logp)]).sum()

    def with_gradient(function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Call:
        return lambda: torch.autograd.grad(weighted(function, *leaves), leaves)

    def exact(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        statistics = head_reference.linear_logprob(hidden, weight, None, targets[:CHECKED], 0, 1.0, None)
        return head_reference.logp_and_entropy(statistics)

    def check(found: tuple[Tensor, Tensor], floor: float) -> None:
        for name, one, wide in zip(("logp", "entropy"), found, exact(hidden[:CHECKED], weight), strict=True):
            assert_close(one[:CHECKED], wide, name=name, floor=floor)

    def check_gradient(found: tuple[Tensor, Tensor], floor: float) -> None:
        some = hidden[:CHECKED].clone().requires_grad_()
        (wide,) = torch.autograd.grad(weighted(exact, some, weight), some)
        unit = wide.abs().max()
        # Gradients by logits are rounded to the weight's dtype before they are multiplied with it.
        bound = max(floor, 2 * ROUNDING)
        assert_close(found[0][:CHECKED] / unit, wide / unit, name="gradient by hidden", floor=bound)

    chunk = vocabulary // 16
    logits = torch.empty(rows, chunk, dtype=hidden.dtype, device=GPU)

    def products(gradient: bool) -> Call:
        """The same products by torch, a sixteenth of the vocabulary at a time, with nothing done to their results."""

        def run() -> None:
            for begin in range(0, vocabulary, chunk):
                part = weight[begin : begin + chunk]
                narrow = logits[:, : len(part)]
                torch.mm(hidden, part.T, out=narrow)
                if gradient:
                    torch.mm(hidden, part.T, out=narrow)
                    narrow @ part
                    narrow.T @ hidden

        return run

    def fused() -> dict[str, Call]:
        """Cross-entropies of other libraries: no entropy, and a gradient by the logits' negative log-likelihood."""
        found: dict[str, Call] = {}
        if find_spec("liger_kernel") is not None:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

            found["Liger"] = lambda: torch.autograd.grad(liger(*leaves, targets, reduction="sum"), leaves)
        if find_spec("cut_cross_entropy") is not None:
            from cut_cross_entropy import linear_cross_entropy as cut

            found["CCE"] = lambda: torch.autograd.grad(cut(*leaves, targets, reduction="sum"), leaves)
        return found

    shape = f"N={rows} D={size} V={vocabulary} bfloat16"
    product = 2.0 * rows * size * vocabulary
    compiled = torch.compile(eager, dynamic=False)
    return [
        Case(
            *("linear_logprob", shape, product, lambda: ours(hidden, weight), check),
            peers={"eager": lambda: eager(hidden, weight), "torch.compile": lambda: compiled(hidden, weight)},
            others={"products alone": products(False)},
        ),
        Case(
            *("linear_logprob and its gradient", shape, 4 * product, with_gradient(ours), check_gradient),
            peers={"eager": with_gradient(eager), "torch.compile": with_gradient(compiled)},
            others={"products alone": products(True), **fused()},
        ),
    ]


# ---- measuring ---------------------------------------------------------------------------------------------------


def product_tflop_per_s(repeats: int) -> float:
    """Speed of a large product of bf16 matrices."""
    length = 8192
    left, right = (torch.randn(length, length, device=GPU).bfloat16() for _ in range(2))
    return 2.0 * length**3 / median_ms(lambda: left @ right, repeats) / 1e9


class Bench:
    """Measures cases and keeps their rows."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.product = product_tflop_per_s(repeats)
        self.rows: list[Row] = []
        self.wrong: list[str] = []
        driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        self.origin = (date.today().isoformat(), gpu.commit(), torch.cuda.get_device_name(), driver, torch.__version__)
        print(f"product: {self.product:.0f} TFLOP/s on {torch.cuda.get_device_name()}", flush=True)

    def add(self, case: Case, variant: str, call: Call, floor: float | None) -> None:
        """Measure a call whose result is right within ``floor``, or is not looked at."""
        try:
            if floor is not None:
                case.check(call(), floor)
            ms = median_ms(call, self.repeats)
            launches, peak = count_launches(lambda _: call(), None), peak_mib(lambda _: call(), None)
        except AssertionError as error:
            self.wrong.append(f"{case.op}, {variant}: {error}")
            print(self.wrong[-1], flush=True)
            return
        except torch.cuda.OutOfMemoryError:
            print(f"{case.op}, {variant}: does not fit the memory of this GPU", flush=True)
            torch.cuda.empty_cache()
            return
        speed = case.operations / ms / 1e9
        numbers = (round(ms, 4), round(speed, 1), round(speed / self.product, 4), launches, round(peak, 1))
        self.rows.append(Row(*self.origin, case.op, variant, case.shape, *numbers))
        print(
            f"{case.op:32}{variant:47}{ms:10.3f} ms  {speed:7.1f} TFLOP/s  {speed / self.product:6.1%}  "
            f"{peak:9.1f} MiB  {launches:5} launches  {case.shape}",
            flush=True,
        )

    def run(self, case: Case) -> None:
        for name in BACKENDS:
            with backend(name):
                self.add(case, name, case.call, 1e-5)
        for name, peer in case.peers.items():
            self.add(case, name, peer, LOOSE)
        for name, other in case.others.items():
            self.add(case, name, other, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, and no row is kept")
    quick = parser.parse_args().quick
    bench = Bench(repeats=3 if quick else 20)
    attention = (1, 8, 2, 256, 384, 64) if quick else (4, 28, 4, 2048, 3072, 128)
    head = (256, 512, 32_000) if quick else (4096, 3584, 152_064)
    for cases in (lambda: attention_cases(*attention), lambda: head_cases(*head)):
        for case in cases():
            bench.run(case)
        torch.cuda.empty_cache()
    if not quick:
        append_csv(bench.rows, TABLE)
    if bench.wrong:
        sys.exit(f"{len(bench.wrong)} results are wrong and were not timed")


if __name__ == "__main__":
    main()

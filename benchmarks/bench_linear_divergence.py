"""Speed and memory of linear_divergence: the divergence of two views of every token, without their logits.

Flops: 2 N D V for each view's logits. Forward is one product of both views' rows; js takes another pass over the
products, which are kept or (in bf16 on a CPU) made once more. The gradients w.r.t. both views and the weight take four:
the logits a second time, and one product each with their gradients, of both views at once. The ceiling is those
products, bare.

Bytes: both views and the weight in, and where there is a backward pass their gradients out. Beyond those results and a
copy of both views the op may hold an eighth of one view's logits in fp32 at most, which the benchmark measures in fp32;
with js it keeps as much for its second pass. In bf16 on a CPU without matrix units for it products take fp32 copies of
what they multiply: 53 MiB in all were measured forward, where two calls of linear_logprob take 41.

Prediction for the CPU: two calls of linear_logprob take the same products and two exponentials a token and entry of the
vocabulary; this op takes two as well (of half the logits: their product is the third), and reads the weight once.
So at most 1.1 of the two calls. Two tensors of logits and their softmaxes take 8 N V bytes and more; that is what every
published method of this family holds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.bench_linear_logprob import CHECKED, GRADIENTS, Head, HeadShape
from benchmarks.measure import Case, Op, Peer, Run, compare, installed
from vgpo_kernels import linear_divergence, linear_logprob


def materialised(measure: str, hidden: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """What one writes: both views' logits in the model's dtype, and their log-softmax in fp32."""
    x, y = ((states @ weight.T).float().log_softmax(-1) for states in (hidden, other))
    p, q = x.exp(), y.exp()
    if measure == "kl":
        return (p * (x - y)).sum(-1)
    mixture = ((p + q) / 2).log()
    return (p * (x - mixture) + q * (y - mixture)).sum(-1) / 2


def divergence_case(
    shape: HeadShape, dtype: torch.dtype, device: torch.device, seed: int, *, measure: str, backward: bool
) -> Case:
    """One divergence of every row, and with ``backward`` the gradients of a weighted sum of it.

    The rows of both views are one matrix, and so are their gradients.
    """
    head = Head(shape, dtype, device, seed)
    number = shape.rows // 2
    targets, slopes = head.targets[:number], head.slopes[0][:number]

    def run(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                states, weight = head.leaves
                return (function(states[:number], states[number:], weight),)

        def both() -> tuple[Tensor, ...]:
            states, weight = head.leaves
            value = function(states[:number], states[number:], weight)
            return (value.detach(), *torch.autograd.grad(value, head.leaves, slopes))

        return both if backward else forward

    def ours(hidden: Tensor, other: Tensor, weight: Tensor) -> Tensor:
        found = linear_divergence(hidden, other, weight, measures=(measure,))
        return getattr(found, measure)

    def of_two_calls(hidden: Tensor, other: Tensor, weight: Tensor) -> Tensor:
        one, another = (linear_logprob(states, weight, targets, ignore_index=None) for states in (hidden, other))
        return one - another

    @cache
    def exact() -> tuple[Tensor, list[Tensor]]:
        states, weight = (leaf.detach().float().requires_grad_() for leaf in head.leaves)
        values, by_states, by_weight = [], torch.zeros_like(states), torch.zeros_like(weight)
        parts = (tensor.split(CHECKED) for tensor in (states[:number], states[number:], slopes))
        for hidden, other, weights in zip(*parts, strict=True):
            value = materialised(measure, hidden, other, weight)
            values.append(value.detach())
            if backward:
                one, another = torch.autograd.grad(value, (states, weight), weights)
                by_states += one
                by_weight += another
        return torch.cat(values), [by_states, by_weight] if backward else []

    def check(found: tuple[Tensor, ...], bound: float) -> None:
        value, gradients = exact()
        compare(measure, found[0], value, bound)
        for name, one, wide in zip(GRADIENTS[: len(gradients)], found[1:], gradients, strict=True):
            compare(name, one, wide, head.bound(bound))

    in_torch = partial(materialised, measure)
    peers = {
        "two linear_logprob": Peer(run(of_two_calls), same=False),
        "PyTorch": Peer(run(in_torch)),
        "torch.compile": Peer(run(torch.compile(in_torch, dynamic=False))),
    }
    if measure == "js" and backward and installed("liger_kernel") and device.type == "cuda":
        peers["Liger"] = Peer(liger_jsd(head, number), same=False)
    return head.case(run(ours), check, 1 + backward, backward, peers)


def liger_jsd(head: Head, number: int) -> Run:
    """Liger's mean JSD, whose gradient is that of one view alone."""
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    def call() -> tuple[Tensor, ...]:
        states, weight = head.leaves
        views = (states[:number], weight, states[number:].detach(), weight.detach())
        loss = LigerFusedLinearJSDFunction.apply(*views, None, 0.5, -100, 1.0)
        return torch.autograd.grad(loss, head.leaves)

    return call


def divergence_op(name: str, measure: str, backward: bool) -> Op:
    """Declare an op at the head's sizes, of half as many tokens as rows."""
    return Op(
        name=name,
        make=partial(divergence_case, measure=measure, backward=backward),
        cpu=(HeadShape(4096, 1024, 32_000),),
        held=(HeadShape(512, 1024, 32_000),),
        gpu=(HeadShape(8192, 3584, 152_064),),
        small=HeadShape(256, 256, 8192),
        captured=False,
        least_rounds=3,  # of seconds each
    )


OPS = (
    divergence_op("linear_divergence", "kl", False),
    divergence_op("linear_divergence and its gradient", "kl", True),
    divergence_op("linear_divergence of JS and its gradient", "js", True),
)


def test_linear_divergence(speed, setting) -> None:
    for row in speed(setting)[:1]:
        # What is held whatever the rows are would weigh more beside fewer of them.
        if row.peak_mib is not None and setting.dtype == torch.float32 and setting.size in setting.op.cpu:
            results = setting.size.bytes(setting.dtype) / 2**20 if "gradient" in row.op else 0.0
            one_view = setting.size.logits_mib / 2
            # Both views in one matrix, and the log-sums of every piece of the vocabulary.
            beside = setting.size.rows * setting.size.features * setting.dtype.itemsize / 2**20
            assert row.peak_mib - results - beside <= one_view / (4 if "JS" in row.op else 8)

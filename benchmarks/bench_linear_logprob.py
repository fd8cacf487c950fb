"""Speed and memory of linear_logprob and linear_policy_loss: an LM head without its logits.

Flops: 2 N D V for each matrix product. The logits are one, the gradients w.r.t. hidden states and weight one each;
linear_logprob makes the logits a second time in its backward pass, so forward is one product and forward with backward
four; linear_policy_loss, which knows its gradient as soon as it has a chunk, needs three (in bf16 on a CPU it makes the
logits twice as well, which is faster there). The ceiling on a CPU is exactly those products, bare, by torch, of whole
matrices in the same dtype: "of ceiling" is their time by ours. In bf16 that is native on processors with AMX or AVX-512
BF16, whose products are rounded to bf16; ours stay fp32. On a GPU "products alone" are the same, a sixteenth of the
vocabulary at a time.

Bytes: hidden states and weight in, and where there is a backward pass their gradients out. Beyond those results
linear_logprob may hold an eighth of the logits in fp32 at most: the benchmark measures the process's peak, and fails
above it. linear_policy_loss makes its gradients in the forward pass; the backward pass scales them where they lie.

Prediction for the CPU: within 1.25 of the bare products in both dtypes, as one exponential a logit in a cache that the
product has just left costs a tenth of D = 1,024 multiplications; eager log_softmax takes longer by its passes over the
logits, and ten times the memory. The fused cross-entropies of Liger, CCE and quack need a GPU; Liger's fused GRPO loss
is made of torch's operators and runs on a CPU, too. Each is measured where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import gpu_peers
from benchmarks.measure import Case, Ceiling, Op, Peer, Run, by_reference, compare, installed, normals
from vgpo_kernels import linear_logprob, linear_policy_loss, policy_loss

RESPONSES = 16
CHECKED = 512  # rows whose logits the check holds at a time
GRADIENTS = ("gradient w.r.t. hidden", "gradient w.r.t. weight")


class HeadShape(NamedTuple):
    """Hidden states before an LM head."""

    rows: int
    features: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.features} x {self.vocabulary}"

    @property
    def logits_mib(self) -> float:
        return 4 * self.rows * self.vocabulary / 2**20

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes of hidden states and weight."""
        return (self.rows + self.vocabulary) * self.features * dtype.itemsize


def materialised(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool = False) -> tuple[Tensor, ...]:
    """What one writes: logits in the model's dtype, and their log-softmax in fp32; then the entropies too."""
    log_probabilities = (hidden @ weight.T).float().log_softmax(-1)
    logp = log_probabilities.gather(-1, targets[:, None]).squeeze(-1)
    return (logp, -(log_probabilities.exp() * log_probabilities).sum(-1)) if entropy else (logp,)


class Head:
    """Hidden states, weight and targets, and what is common to their cases."""

    def __init__(self, shape: HeadShape, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        normal = normals(seed, device)
        self.shape, self.dtype = shape, dtype
        hidden = normal(shape.rows, shape.features).to(dtype)
        weight = (normal(shape.vocabulary, shape.features) * 2 / shape.features**0.5).to(dtype)
        self.leaves = (hidden.requires_grad_(), weight.requires_grad_())
        generator = torch.Generator(device).manual_seed(seed)
        self.targets = torch.randint(shape.vocabulary, (shape.rows,), generator=generator, device=device)
        self.slopes = (normal(shape.rows), normal(shape.rows))  # of a sum of log-probabilities and entropies
        self.mask = torch.ones(RESPONSES, shape.rows // RESPONSES, dtype=torch.bool, device=device)
        self.advantages = normal(RESPONSES)

    def exact(self, entropy: bool, slopes: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """Log-probabilities (and entropies) in fp32, and gradients of their sum weighted by ``slopes``."""
        hidden, weight = (leaf.detach().float().requires_grad_() for leaf in self.leaves)
        values, by_hidden, by_weight = [], [], torch.zeros_like(weight)
        parts = (tensor.split(CHECKED) for tensor in (hidden, self.targets, *slopes))
        for rows, targets, *weights in zip(*parts, strict=True):
            found = materialised(rows, weight, targets, entropy)
            values.append(torch.stack(found).detach())
            if weights:
                one, other = torch.autograd.grad(found, (rows, weight), weights)
                by_hidden.append(one)
                by_weight += other
        gradients = [torch.cat(by_hidden), by_weight] if slopes else []
        return list(torch.cat(values, 1)), gradients

    def bound(self, bound: float) -> float:
        """Largest error of gradients: in bf16 they are sums of rounded numbers, rounded once more."""
        return bound if self.dtype == torch.float32 else max(bound, 2e-2)

    def case(self, run: Run, check: Callable[..., None], logits: int, gradients: bool, peers: dict[str, Peer]) -> Case:
        """Make the case whose matrix products are those of the logits, once or twice, and of both gradients."""
        (rows, features, vocabulary), (hidden, weight) = self.shape, self.leaves
        count = logits + 2 * gradients
        flops = 2 * rows * features * vocabulary * count

        @torch.no_grad()
        def products(step: int) -> None:
            """With nothing done to their results, ``step`` entries of the vocabulary at a time."""
            buffer, by_hidden, by_weight = buffers(step)
            for begin in range(0, vocabulary, step):
                part = weight[begin : begin + step]
                narrow = buffer[:, : len(part)]
                for _ in range(logits):
                    torch.mm(hidden, part.T, out=narrow)
                if gradients:
                    torch.mm(narrow, part, out=by_hidden)
                    torch.mm(narrow.T, hidden, out=by_weight[begin : begin + step])

        @cache
        def buffers(step: int) -> tuple[Tensor, Tensor, Tensor]:
            return hidden.new_empty(rows, step), torch.empty_like(hidden), torch.empty_like(weight)

        name = "1 matrix product" if count == 1 else f"{count} matrix products"
        alone = Peer(lambda: products(vocabulary // 16), same=False, gpu_only=True)
        return Case(
            run=run,
            check=check,
            ceiling=Ceiling(name, "flops", flops, lambda: products(vocabulary)),
            bytes=(1 + gradients) * self.shape.bytes(self.dtype),
            flops=flops,
            peers={**peers, "products alone": alone},
        )


def logprob_case(
    shape: HeadShape, dtype: torch.dtype, device: torch.device, seed: int, *, entropy: bool, backward: bool
) -> Case:
    """Log-probabilities (and entropies) of every row, and with ``backward`` the gradients of a weighted sum of them."""
    head = Head(shape, dtype, device, seed)
    slopes = head.slopes[: 1 + entropy]

    def run(function: Callable[..., tuple[Tensor, ...]]) -> Run:
        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return function(*head.leaves, head.targets)

        def both() -> tuple[Tensor, ...]:
            values = function(*head.leaves, head.targets)
            return (*(value.detach() for value in values), *torch.autograd.grad(values, head.leaves, slopes))

        return both if backward else forward

    def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        found = linear_logprob(hidden, weight, targets, return_entropy=entropy, ignore_index=None)
        return found if entropy else (found,)

    exact = cache(lambda: head.exact(entropy, slopes if backward else ()))

    def check(found: tuple[Tensor, ...], bound: float) -> None:
        values, gradients = exact()
        names = (*("logp", "entropy")[: len(values)], *GRADIENTS[: len(gradients)])
        for name, one, wide in zip(names, found, (*values, *gradients), strict=True):
            compare(name, one, wide, head.bound(bound) if name in GRADIENTS else bound)

    in_torch = partial(materialised, entropy=entropy)
    peers = {
        "PyTorch": Peer(run(in_torch)),
        "torch.compile": Peer(run(torch.compile(in_torch, dynamic=False))),
    }
    peers |= {name: Peer(run(function)) for name, function in gpu_peers.logprobs(entropy, device).items()}
    if not entropy and backward and device.type == "cuda":
        peers |= {name: summed(head, loss) for name, loss in gpu_peers.losses().items()}
    return head.case(run(ours), check, 1 + backward, backward, peers)


def summed(head: Head, loss: gpu_peers.Loss) -> Peer:
    """Gradients of the summed negative log-likelihood."""
    return Peer(lambda: torch.autograd.grad(loss(*head.leaves, head.targets), head.leaves), same=False)


def loss_case(shape: HeadShape, dtype: torch.dtype, device: torch.device, seed: int) -> Case:
    """GRPO's loss with all gradients, on the policy's own samples: every ratio is 1."""
    head = Head(shape, dtype, device, seed)
    # Rows predict the token after theirs: one more at the front of each response makes as many tokens.
    width = shape.rows // RESPONSES
    targets = head.targets.view(RESPONSES, width)
    advantages = head.advantages[:, None]

    def with_gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return (loss.detach(), *torch.autograd.grad(loss, head.leaves))

    def ours() -> tuple[Tensor, ...]:
        states = head.leaves[0].view(RESPONSES, width, -1)
        states = torch.cat([states, states[:, :1]], dim=1)
        options = {"loss_type": "grpo"}
        loss = linear_policy_loss(states, head.leaves[1], targets, None, head.advantages, head.mask, **options).loss
        return with_gradients(loss)

    def eager() -> tuple[Tensor, ...]:
        logp = materialised(*head.leaves, head.targets)[0].view(RESPONSES, width)
        ratio = (logp - logp.detach()).exp()
        return with_gradients(-torch.minimum(advantages * ratio, advantages * ratio.clamp(0.8, 1.28)).mean())

    @cache
    def exact() -> list[Tensor]:
        (logp,), _ = head.exact(False, ())
        logp = logp.view(RESPONSES, width).requires_grad_()
        tokens = (logp, logp.detach(), head.advantages, head.mask)
        loss = by_reference(lambda: policy_loss(*tokens, loss_type="grpo").loss)
        (slope,) = torch.autograd.grad(loss, logp)
        return head.exact(False, (slope.flatten(),))[1]

    def check(found: tuple[Tensor, ...], bound: float) -> None:
        for name, one, wide in zip(GRADIENTS, found[1:], exact(), strict=True):
            compare(name, one, wide, head.bound(bound))

    peers = {"PyTorch": Peer(eager)}
    if installed("liger_kernel"):
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        fused = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="grpo")

        def liger() -> tuple[Tensor, ...]:
            states = head.leaves[0].view(RESPONSES, width, -1)
            return with_gradients(fused(states, head.leaves[1], targets, head.mask.float(), head.advantages)[0])

        peers["Liger, compiled"] = Peer(liger)
    return head.case(ours, check, 1, True, peers)


def head_op(name: str, make: Callable[..., Case], on_cpus: bool = True) -> Op:
    """Declare an op at its sizes: Qwen2.5-VL-7B's head, and a smaller one for CPUs."""
    return Op(
        name=name,
        make=make,
        cpu=(HeadShape(4096, 1024, 32_000),) if on_cpus else (),
        held=(HeadShape(512, 1024, 32_000),) if on_cpus else (),
        gpu=(HeadShape(4096, 3584, 152_064),),
        small=HeadShape(256, 256, 8192),
        captured=False,
        least_rounds=3,  # of seconds each
    )


OPS = (
    head_op("linear_logprob", partial(logprob_case, entropy=False, backward=False)),
    head_op("linear_logprob and its gradient", partial(logprob_case, entropy=False, backward=True)),
    head_op("linear_logprob with entropy", partial(logprob_case, entropy=True, backward=False), False),
    head_op("linear_logprob with entropy and its gradient", partial(logprob_case, entropy=True, backward=True), False),
    head_op("linear_policy_loss and its gradient", loss_case),
)


def test_linear_logprob(speed, setting) -> None:
    for row in speed(setting)[:1]:
        if row.peak_mib is not None and row.op.startswith("linear_logprob"):
            results = setting.size.bytes(setting.dtype) / 2**20 if "gradient" in row.op else 0.0
            assert row.peak_mib - results <= setting.size.logits_mib / 8

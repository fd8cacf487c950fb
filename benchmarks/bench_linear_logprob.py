"""Speed and memory of linear_logprob and linear_policy_loss: an LM head without its logits.

Flops: 2 N D V for each matrix product. The logits are one, the gradients by hidden states and by the weight one each;
linear_logprob makes the logits a second time in its backward pass, so forward is one product and forward with backward
four; linear_policy_loss, which knows its gradient as soon as it has a chunk, needs three (in bf16 on a CPU it makes the
logits twice as well, which is faster there). The first ceiling is exactly those products, bare, by torch, of whole
matrices in the same dtype: "of ceiling" is their time by ours. In bf16 that is native on processors with AMX or AVX-512
BF16, whose products are rounded to bf16; ours stay fp32.

Bytes: hidden states and weight in, and where there is a backward pass their gradients out. Beyond those results
linear_logprob may hold an eighth of the logits in fp32 at most: the benchmark measures the process's peak, and fails
above it. linear_policy_loss makes its gradients in the forward pass; the backward pass scales them where they lie.

Prediction for the CPU: within 1.25 of the bare products in both dtypes, as one exponential a logit in a cache that the
product has just left costs a tenth of D = 1,024 multiplications; eager log_softmax takes longer by its passes over the
logits, and ten times the memory. Liger's fused cross-entropy is a Triton kernel and needs a GPU; its fused GRPO loss is
made of torch's operators and runs here, where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from benchmarks.measure import Case, Ceiling
from vgpo_kernels import PolicyLossOptions, linear_logprob
from vgpo_kernels.ops.linear_vgpo_loss import linear_policy_loss
from vgpo_kernels.reference.linear_logprob import linear_policy_loss as loss_definition

ROWS, FEATURES, VOCABULARY = 4096, 1024, 32000
RESPONSES = 16
LOGITS_MIB = 4 * ROWS * VOCABULARY / 2**20
# Rounds take seconds here, and tens of rounds minutes.
LEAST_ROUNDS = 3


class Head:
    """Hidden states before an LM head, their targets, and buffers for the bare products."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        self.hidden = normal(ROWS, FEATURES).to(dtype).requires_grad_()
        self.weight = (normal(VOCABULARY, FEATURES) * 2 / FEATURES**0.5).to(dtype).requires_grad_()
        self.targets = torch.randint(VOCABULARY, (ROWS,), generator=generator, device=device)
        self.slope = normal(ROWS)
        self.mask = torch.ones(RESPONSES, ROWS // RESPONSES, dtype=torch.bool, device=device)
        self.advantages = normal(RESPONSES)

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight

    def products(self, logits: int, gradients: bool) -> Ceiling:
        """Bare matrix products: of the logits, once or twice, and of both gradients."""
        with torch.no_grad():
            buffer = torch.empty(ROWS, VOCABULARY, dtype=self.hidden.dtype, device=self.hidden.device)
            by_hidden, by_weight = (torch.empty_like(leaf) for leaf in self.leaves)

        @torch.no_grad()
        def run() -> None:
            for _ in range(logits):
                torch.mm(self.hidden, self.weight.T, out=buffer)
            if gradients:
                torch.mm(buffer, self.weight, out=by_hidden)
                torch.mm(buffer.T, self.hidden, out=by_weight)

        count = logits + 2 * gradients
        return Ceiling("1 matrix product" if count == 1 else f"{count} matrix products", self.bytes(gradients), run)

    def bytes(self, gradients: bool) -> int:
        """Bytes of the leaves, and of their gradients."""
        return (1 + gradients) * sum(leaf.numel() * leaf.element_size() for leaf in self.leaves)


def materialised(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What one writes: logits in the model's dtype, and their log-softmax in fp32."""
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def chunked_by_trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The head of TRL's trainers, in its chunks."""
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    settings = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",))
    return _ChunkedLogProbFunction.apply(hidden, weight, None, targets, *settings)[0]


def logprob_case(dtype: torch.dtype, device: torch.device, backward: bool) -> Case:
    """Log-probabilities of every row, and with ``backward`` the gradients of a weighted sum of them."""
    head = Head(dtype, device)

    def run(function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(*head.leaves, head.targets),)

        def both() -> tuple[Tensor, ...]:
            logp = function(*head.leaves, head.targets)
            return (logp.detach(), *torch.autograd.grad(logp, head.leaves, head.slope))

        return both if backward else forward

    ours = run(linear_logprob)  # type: ignore[arg-type]

    def check() -> None:
        wide = [leaf.detach().float().requires_grad_() for leaf in head.leaves]
        logp = materialised(*wide, head.targets)
        expected = (logp.detach(), *torch.autograd.grad(logp, wide, head.slope))
        # Gradients by bf16 weights are sums of bf16 numbers, rounded once more.
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        for actual, exact in zip(ours(), expected, strict=False):
            limit = 1e-5 if actual.dtype == torch.float32 else bound
            assert (actual - exact).abs().max() <= limit * exact.abs().max()

    peers = {"PyTorch": run(materialised), "torch.compile": run(torch.compile(materialised, dynamic=False))}
    if find_spec("trl") is not None:
        peers["TRL, chunked"] = run(chunked_by_trl)
    products = head.products(2 if backward else 1, backward)
    return Case(
        op="linear_logprob" + (" and its gradient" if backward else ""),
        shape=f"{ROWS} x {FEATURES} x {VOCABULARY}",
        dtype=dtype,
        device=device,
        bytes=head.bytes(backward),
        flops=2 * ROWS * FEATURES * VOCABULARY * (4 if backward else 1),
        run=ours,
        check=check,
        ceilings=(products,),
        peers=peers,
        least_rounds=LEAST_ROUNDS,
    )


def loss_case(dtype: torch.dtype, device: torch.device) -> Case:
    """GRPO's loss with all gradients, on the policy's own samples: every ratio is 1."""
    head = Head(dtype, device)
    # Rows predict the token after theirs: one more at the front of each response makes as many tokens.
    width = ROWS // RESPONSES
    targets = head.targets.view(RESPONSES, width)

    def shifted(hidden: Tensor) -> Tensor:
        states = hidden.view(RESPONSES, width, FEATURES)
        return torch.cat([states, states[:, :1]], dim=1)

    def ours() -> tuple[Tensor, ...]:
        loss, _ = linear_policy_loss(
            shifted(head.hidden), head.weight, targets, None, head.advantages, head.mask, loss_type="grpo"
        )
        return (loss.detach(), *torch.autograd.grad(loss, head.leaves))

    def eager() -> tuple[Tensor, ...]:
        logp = materialised(*head.leaves, head.targets).view(RESPONSES, width)
        ratio = (logp - logp.detach()).exp()
        surrogate = torch.minimum(head.advantages[:, None] * ratio, head.advantages[:, None] * ratio.clamp(0.8, 1.28))
        loss = -surrogate.mean()
        return (loss.detach(), *torch.autograd.grad(loss, head.leaves))

    def check() -> None:
        wide = [leaf.detach().float().requires_grad_() for leaf in head.leaves]
        nothing = (None,) * 6
        options = PolicyLossOptions(loss_type="grpo").as_floats()
        loss, _ = loss_definition(
            *(shifted(wide[0]), wide[1], None, targets, None, head.advantages, head.mask),
            *nothing,
            1.0,
            options,
            dtype=torch.float32,
        )
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        for actual, exact in zip(ours()[1:], torch.autograd.grad(loss, wide), strict=True):
            assert (actual - exact).abs().max() <= bound * exact.abs().max()

    peers: dict[str, Callable[[], object]] = {"PyTorch": eager}
    if find_spec("liger_kernel") is not None:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        fused = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="grpo")

        def liger() -> tuple[Tensor, ...]:
            states = head.hidden.view(RESPONSES, width, FEATURES)
            loss, *_ = fused(states, head.weight, targets, head.mask.float(), head.advantages)
            return (loss.detach(), *torch.autograd.grad(loss, head.leaves))

        peers["Liger, compiled"] = liger
    return Case(
        op="linear_policy_loss and its gradient",
        shape=f"{ROWS} x {FEATURES} x {VOCABULARY}",
        dtype=dtype,
        device=device,
        bytes=head.bytes(True),
        flops=2 * ROWS * FEATURES * VOCABULARY * 3,
        run=ours,
        check=check,
        ceilings=(head.products(1, True),),
        peers=peers,
        least_rounds=LEAST_ROUNDS,
    )


def extra_mib(peak: float, case: Case, backward: bool) -> float:
    """What a call held at its peak beyond its results, the gradients."""
    return peak - (case.bytes / 2 / 2**20 if backward else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
def test_linear_logprob(speed, device: torch.device, dtype: torch.dtype, backward: bool) -> None:
    case = logprob_case(dtype, device, backward)
    for row in speed(case)[:1]:
        assert row.peak_mib is None or extra_mib(row.peak_mib, case, backward) <= LOGITS_MIB / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_linear_policy_loss(speed, device: torch.device, dtype: torch.dtype) -> None:
    speed(loss_case(dtype, device))

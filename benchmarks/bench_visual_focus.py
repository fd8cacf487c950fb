"""Speed of visual_focus: prototypes and cosines in one reading of the visual and response rows.

Bytes: every visual row and every response row once, B (V + T) D elements; on the CPU shape 184.5 MB in fp32 and
92.3 MB in bf16. The cosines written are B T floats, 0.04% of that. Flops: one addition an element of a visual row,
two multiply-adds an element of a response row.

Prediction for the CPU: at least 90% of the read ceiling. Rows are read in the same several streams as the ceiling
reads, and the arithmetic (at most two multiply-adds an element) is far below what a vector unit does in the time an
element takes to arrive.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import CPU_SHAPE, Case, Rollout, RolloutShape, make_rollout, read_ceiling
from vgpo_kernels import visual_focus
from vgpo_kernels.reference.visual_focus import visual_focus as definition


def prototypes(hidden: Tensor, visual_mask: Tensor) -> Tensor:
    """Masked mean as a matrix product, the fastest way that torch has."""
    weights = visual_mask.to(hidden.dtype) / visual_mask.sum(-1, keepdim=True).to(hidden.dtype)
    return torch.bmm(weights[:, None], hidden)


def with_cosine_similarity(hidden: Tensor, visual_mask: Tensor, response_mask: Tensor) -> Tensor:
    rows = hidden[:, -response_mask.shape[1] :]
    return F.cosine_similarity(rows, prototypes(hidden, visual_mask), dim=-1) * response_mask


def with_bmm(hidden: Tensor, visual_mask: Tensor, response_mask: Tensor) -> Tensor:
    rows, means = hidden[:, -response_mask.shape[1] :], prototypes(hidden, visual_mask)
    dots = torch.bmm(rows, means.transpose(1, 2)).squeeze(-1)
    norms = torch.linalg.vector_norm(rows, dim=-1) * torch.linalg.vector_norm(means, dim=-1)
    return dots / norms.clamp(min=1e-8) * response_mask


def exact_cosines(rollout: Rollout) -> Tensor:
    """Cosines by the definition in fp64, a response at a time to save memory."""
    parts = zip(rollout.hidden, rollout.visual_mask, rollout.response_mask, strict=True)
    return torch.cat([definition(hidden[None], visual[None], mask[None]) for hidden, visual, mask in parts])


def focus_bytes(shape: RolloutShape, dtype: torch.dtype) -> int:
    return shape.batch * (shape.visual + shape.response) * shape.features * dtype.itemsize


def focus_case(shape: RolloutShape, dtype: torch.dtype, device: torch.device) -> Case:
    """The op on a drawn batch, beside torch's natural forms."""
    rollout = make_rollout(shape, dtype, device)
    arguments = (rollout.hidden, rollout.visual_mask, rollout.response_mask)
    compiled = torch.compile(with_bmm, dynamic=False)

    def check() -> None:
        torch.testing.assert_close(visual_focus(*arguments).double(), exact_cosines(rollout), atol=1e-5, rtol=0)

    return Case(
        op="visual_focus",
        shape=str(shape),
        dtype=dtype,
        device=device,
        bytes=focus_bytes(shape, dtype),
        flops=shape.batch * (shape.visual + 4 * shape.response) * shape.features,
        run=lambda: visual_focus(*arguments),
        check=check,
        ceilings=(read_ceiling(rollout.hidden),),
        peers={
            "F.cosine_similarity": lambda: with_cosine_similarity(*arguments),
            "bmm + vector_norm": lambda: with_bmm(*arguments),
            "torch.compile(bmm + vector_norm)": lambda: compiled(*arguments),
        },
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_visual_focus(speed, device: torch.device, dtype: torch.dtype) -> None:
    speed(focus_case(CPU_SHAPE, dtype, device))

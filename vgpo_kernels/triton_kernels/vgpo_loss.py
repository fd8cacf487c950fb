"""From hidden states to the loss and its gradient in Triton: six launches, four where the prototypes are given.

One more, before (4), where scores are offset by the batch's smallest cosine: it must know which responses are weighted.

1. List the visual tokens of each response.          (not where prototypes are given)
2. Sum them to prototypes.                           (not where prototypes are given)
3. Cosines, one program per block of tokens.
4. Gate, weights and their statistics, one program per response.
5. Factors, loss and gradient, one program per block of tokens.
6. Sum the blocks' partial results to loss and metrics.

Each launch needs results of many programs of the one before, and the end of a launch is the only barrier across
programs that Triton has on every GPU. Prototypes are split by features (2), and each program of (5) computes the group
statistics that it needs, so neither needs a launch of its own. Late images (2, 3) need none either. Factors are never
written to memory.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vgpo_kernels.config import PolicyLossOptions, VGPOConfig
from vgpo_kernels.reference.policy_loss import LossArguments
from vgpo_kernels.triton_kernels.common import operator
from vgpo_kernels.triton_kernels.policy_loss import FactorSource, launch_loss
from vgpo_kernels.triton_kernels.responses import launch_responses
from vgpo_kernels.triton_kernels.visual_focus import launch_focus
from vgpo_kernels.triton_kernels.visual_weights import factor_settings


@operator
def vgpo_loss(
    hidden: Tensor,
    visual_mask: Tensor | None,
    group_ids: Tensor,
    prototype: Tensor | None,
    prototype_index: Tensor | None,
    causal: bool,
    config: list[float],
    options: list[float],
    **loss_arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, its gradients w.r.t. logp and entropy (empty without), and the metrics."""
    settings, arguments = VGPOConfig.from_floats(config), LossArguments(**loss_arguments)
    mask, boundaries = arguments.response_mask, arguments.cu_seqlens
    cos = launch_focus(hidden, visual_mask, mask, boundaries, prototype, prototype_index, causal)
    # A response without an image says so by its cosines.
    w, statistics, lengths = launch_responses(cos, mask, None, boundaries, settings)
    source = FactorSource(w, statistics, group_ids, factor_settings(settings))
    return launch_loss(arguments, PolicyLossOptions.from_floats(options), lengths, source=source)

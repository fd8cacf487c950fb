"""Kernels for visually-guided reinforcement learning of vision-language models.

The three lines that put VGPO (arXiv 2604.09349) into a policy loss::

    cos = vgpo_kernels.visual_focus(hidden, visual_mask, response_mask)
    weights = vgpo_kernels.visual_weights(cos, response_mask, group_ids, VGPOConfig.paper())
    loss = vgpo_kernels.policy_loss(logp, old_logp, advantages, response_mask, factors=weights.factors).loss
"""

from vgpo_kernels import backends
from vgpo_kernels.backends import backend
from vgpo_kernels.batch_checks import BatchError, BatchFindings, Finding, check_batch
from vgpo_kernels.config import PolicyLossOptions, VGPOConfig
from vgpo_kernels.ops.attention_mass import attention_heatmap, attention_mass
from vgpo_kernels.ops.attention_shift import attention_shift
from vgpo_kernels.ops.divergence_measures import LinearDivergence, combine_divergences, divergence_totals
from vgpo_kernels.ops.linear_divergence import linear_divergence, linear_divergence_slice
from vgpo_kernels.ops.linear_logprob import LinearLogprob, combine_slices, linear_logprob, linear_logprob_slice
from vgpo_kernels.ops.linear_vgpo_loss import linear_policy_loss, linear_vgpo_loss
from vgpo_kernels.ops.loss_terms import ViewTerm
from vgpo_kernels.ops.policy_loss import PolicyLoss, policy_loss
from vgpo_kernels.ops.token_shaping import TokenShaping, response_factors, shape_tokens
from vgpo_kernels.ops.vgpo_loss import vgpo_loss
from vgpo_kernels.ops.visual_focus import visual_focus, visual_prototype
from vgpo_kernels.ops.visual_weights import VisualWeights, combine_factors, group_weights, visual_weights
from vgpo_kernels.shaping import ShapingConfig

__version__ = "0.2.0"

__all__ = [
    "BatchError",
    "BatchFindings",
    "Finding",
    "LinearDivergence",
    "LinearLogprob",
    "PolicyLoss",
    "PolicyLossOptions",
    "ShapingConfig",
    "TokenShaping",
    "VGPOConfig",
    "ViewTerm",
    "VisualWeights",
    "attention_heatmap",
    "attention_mass",
    "attention_shift",
    "backend",
    "backends",
    "check_batch",
    "combine_divergences",
    "combine_factors",
    "combine_slices",
    "divergence_totals",
    "group_weights",
    "linear_divergence",
    "linear_divergence_slice",
    "linear_logprob",
    "linear_logprob_slice",
    "linear_policy_loss",
    "linear_vgpo_loss",
    "policy_loss",
    "response_factors",
    "shape_tokens",
    "vgpo_loss",
    "visual_focus",
    "visual_prototype",
    "visual_weights",
]

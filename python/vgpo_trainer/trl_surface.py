"""What this trainer knows of TRL's inside: its batches, its passes, its settings, and what of it is not carried."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
import trl
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from vgpo_kernels.integrations.surface import known, require
from vgpo_kernels.integrations.transformers import unwrap
from vgpo_trainer.config import VGPOTrainingConfig

KNOWN = known("trl")

# Inputs of a forward pass beside the tokens, as TRL's batches and its log-probability pass name them.
FORWARD_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
# Those of them that have an entry for each image or patch, not for each row.
IMAGE_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "image_position_ids",
)


class LossType(NamedTuple):
    """How TRL computes a loss type.

    Attributes:
        aggregation: The aggregation, as ``policy_loss`` names it.
        average_over: What is averaged over: the ``"sequences"`` or the ``"tokens"`` of the optimisation step, or the
            tokens of the whole ``"generation batch"``.
        clipped: Whether the token ratio is clipped on both sides, so that ``delta`` and sequence ratios have a meaning.

    """

    aggregation: str
    average_over: Literal["sequences", "tokens", "generation batch"]
    clipped: bool


LOSS_TYPES = {
    "grpo": LossType("seq-mean-token-mean", "sequences", clipped=True),
    "bnpo": LossType("token-mean", "tokens", clipped=True),
    "dapo": LossType("token-mean", "generation batch", clipped=True),
    "dr_grpo": LossType("seq-mean-token-sum-norm", "sequences", clipped=True),
    "cispo": LossType("token-mean", "generation batch", clipped=False),
    "sapo": LossType("seq-mean-token-mean", "sequences", clipped=False),
    "luspo": LossType("seq-mean-token-sum", "sequences", clipped=True),
    "vespo": LossType("token-mean", "generation batch", clipped=False),
}
# TRL's settings that policy_loss has by the same names.
VESPO_SETTINGS = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")

# The methods of GRPOTrainer that VGPOTrainer overrides or calls, and the arguments that it relies on.
SURFACE = {
    "_generate_and_score_completions": ("inputs",),
    "_generate": ("prompts",),
    "_tokenize_prompts": ("prompts",),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_get_per_token_logps_and_entropies": (
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
        *FORWARD_INPUTS,
    ),
    "_compute_loss": ("model", "inputs"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "get_high_entropy_mask": ("entropies", "mask", "threshold"),
    "get_gamma_weights": (
        "advantages",
        "log_ratio_per_token",
        "mask",
        "importance_sampling_ratio",
        *(name.removeprefix("vespo_") for name in VESPO_SETTINGS),
    ),
    "get_off_policy_mask": (
        "advantages",
        "per_token_logps",
        "sampling_per_token_logps",
        "mask",
        "off_policy_threshold",
    ),
}


def check_surface(trainer: type = trl.GRPOTrainer) -> None:
    """Raise UnknownSurfaceError if the installed TRL has other methods than those this trainer was written for."""
    for name, parameters in SURFACE.items():
        require(trainer, name, parameters, KNOWN)


class Sequences(NamedTuple):
    """The sequences of one of TRL's batches: prompts left-padded, completions right-padded.

    Attributes:
        input_ids: Prompt and completion, ``[B, P + T]``.
        attention_mask: True at tokens, ``[B, P + T]``.
        response_mask: True at completion tokens that the model sampled, ``[B, T]``: the last T positions.

    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Sequences:
        """Join the prompts and completions of a batch; tool output is no response."""
        response_mask = batch["completion_mask"]
        if "tool_mask" in batch:
            response_mask = response_mask * batch["tool_mask"]
        return cls(
            input_ids=torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            response_mask=response_mask,
        )


class WithoutEmptyImages:
    """Stands in for a model in TRL's log-probability pass: rows of text alone reach it without inputs of images.

    Where other rows of a batch have images, TRL hands on pixel values of no image at all, which vision towers reject.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, **inputs: Any) -> Any:
        """Run the model."""
        pixels = inputs.get("pixel_values")
        if pixels is not None and pixels.shape[0] == 0:
            inputs = {name: value for name, value in inputs.items() if name not in IMAGE_INPUTS}
        return self.model(**inputs)


def rollout_logp(inputs: Mapping[str, Any], logp: Tensor) -> Tensor:
    """Return the log-probabilities under the policy that generated a batch; TRL keeps none where it is the same."""
    old: Tensor | None = inputs.get("old_per_token_logps")
    return logp.detach() if old is None else old


class WithoutHead:
    """Stands in for a model in TRL's log-probability pass, which then slices the inputs but computes no logits."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, labels: Tensor, fused_lm_head: bool, **inputs: Any) -> SimpleNamespace:
        """Run the decoder, and the head on one position, which models offer as their least."""
        self.model(**inputs, use_cache=False, logits_to_keep=1)
        return SimpleNamespace(log_probs=labels.new_zeros(labels.shape, dtype=torch.float32))


def gather_head(model: nn.Module) -> None:
    """Gather the LM head of a model sharded by FSDP before a pass that its gradient is wanted of.

    TRL multiplies by the head's weight without calling the head, so nothing else gathers it where the head is a unit of
    its own, as accelerate makes it in vision-language models. TRL then gathers a copy, whose gradient is never reduced:
    each process would keep its own.
    """
    head = unwrap(model).get_output_embeddings()
    if isinstance(head, FSDPModule):
        head.unshard()


def load_weights(model: PreTrainedModel, checkpoint: str) -> None:
    """Load the weights of a checkpoint into a model of the same class, in place.

    Raises:
        ValueError: The checkpoint lacks some of the model's weights.

    """
    loaded, info = type(model).from_pretrained(checkpoint, dtype=model.dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{checkpoint} lacks {sorted(info['missing_keys'])} of {type(model).__name__}")
    model.load_state_dict(loaded.state_dict())


def refuse_unsupported(args: VGPOTrainingConfig) -> None:
    """Raise ValueError for settings of TRL that our part of the loss does not carry; without one the loss is TRL's."""
    if args.reads_signal() and args.torch_compile:
        raise ValueError(
            "torch_compile=True is not supported with VGPO: a compiled forward pass skips the hook that reads hidden "
            "states"
        )
    if args.view_coef and args.torch_compile:
        raise ValueError("torch_compile=True is not supported with view_coef, which asks the model for its states")
    if (args.weighs() or args.view_coef) and args.loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {args.loss_type!r}")
    if not args.weighs():
        return
    clipped = LOSS_TYPES[args.loss_type].clipped
    if args.importance_sampling_level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level must be token or sequence, got {args.importance_sampling_level!r}")
    if args.importance_sampling_level == "sequence" and not clipped:
        names = ", ".join(name for name, loss in LOSS_TYPES.items() if loss.clipped)
        raise ValueError(f"importance_sampling_level='sequence' goes with loss_type {names}, got {args.loss_type!r}")
    epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if args.delta is not None and clipped and args.delta <= 1 + epsilon_high:
        raise ValueError(
            f"delta must exceed 1 + epsilon_high = {1 + epsilon_high}, got {args.delta}: it bounds what clipping leaves"
        )
    if args.use_adaptive_entropy:
        raise ValueError("use_adaptive_entropy is not supported with VGPO; set a fixed entropy_coef")


def refuse_split_sequences(trainer: trl.GRPOTrainer) -> None:
    """Raise ValueError if accelerate is to split sequences over processes.

    TRL's configuration refuses a ``parallelism_config`` that says so, but does not see that of ``accelerate launch``.
    """
    config = trainer.accelerator.parallelism_config
    sizes = {} if config is None else {"cp_size": config.cp_size, "sp_size": config.sp_size}
    for name, size in sizes.items():
        if size > 1:
            raise ValueError(
                f"{name}={size} is not supported: accelerate splits sequences when a batch is loaded, and GRPOTrainer "
                f"makes them by generation after that; set {name} to 1 in the configuration of accelerate"
            )


def why_not_mixed(trainer: trl.GRPOTrainer) -> str | None:
    """Return why rows with and without images cannot be in one generation batch; ``None`` where they can."""
    inputs = getattr(getattr(trainer.processing_class, "image_processor", None), "model_input_names", ())
    # As Idefics has them: a row of pixel values for each row of the batch, which TRL may take for one for each image.
    if "pixel_attention_mask" in inputs and "spatial_shapes" not in inputs:
        name = type(trainer.processing_class).__name__
        return f"GRPOTrainer cannot tell whose pixel values those of {name} are"
    args = trainer.args
    if trainer.accelerator.num_processes == 1:
        return None
    stage_3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    if trainer.is_fsdp_enabled or stage_3:
        return "a vision tower that is sharded has to run on all processes, and a batch of text does not run it"
    if not args.ddp_find_unused_parameters:
        return "a batch of text gives the vision tower no gradient, which needs ddp_find_unused_parameters=True"
    return None

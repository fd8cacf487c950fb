"""Checks of settings that TRL and transformers look at when training begins, or not at all, before a run starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vgpo_trainer.config import VGPOTrainingConfig

COUNTS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_generations",
    "num_iterations",
    "steps_per_generation",
    "generation_batch_size",
    "max_completion_length",
    "pad_to_multiple_of",
)
POSITIVE = ("repetition_penalty", "sapo_temperature_neg", "sapo_temperature_pos")
NOT_NEGATIVE = ("top_p", "top_k", "min_p", "epsilon", "epsilon_high", "delta", "beta", "dataloader_num_workers")
NOT_NEGATIVE += ("top_entropy_quantile", "vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg")
AT_MOST_ONE = ("top_p", "min_p", "top_entropy_quantile")
CHOICES = {
    "scale_rewards": ("group", "batch", "none", "true", "false"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}
# Optimisers that are made from parameters alone.
OF_TORCH = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")


def check_given(settings: Mapping[str, Any]) -> None:
    """Refuse settings of the trainer, by their fields, that its class divides by or that nothing would read.

    Raises:
        ValueError: One line that names the option.

    """
    for name in COUNTS:
        value = settings.get(name)
        if value is not None and not (str(value).isdecimal() and int(value) >= 1):
            raise ValueError(f"--{name} must be an integer of at least 1, got {value!r}")
    steps, epochs = (settings.get(name) for name in ("max_steps", "num_train_epochs"))
    steps, epochs = -1 if steps is None else steps, 1 if epochs is None else epochs
    if steps < 1 and steps != -1:
        raise ValueError(f"--max_steps must be at least 1, or -1 where --num_train_epochs is to count, got {steps}")
    if steps == -1 and not 0 < epochs < math.inf:
        raise ValueError(f"--num_train_epochs must be finite and positive, got {epochs}")
    for name in (*POSITIVE, *NOT_NEGATIVE):
        value = settings.get(name)
        if value is None or (name == "top_k" and settings.get("use_vllm")):  # -1 means all tokens to vLLM
            continue
        if not 0 <= value < math.inf or (name in POSITIVE and value == 0):
            raise ValueError(
                f"--{name} must be finite and {'positive' if name in POSITIVE else 'not negative'}, got {value}"
            )
        if name in AT_MOST_ONE and value > 1:
            raise ValueError(f"--{name} must be at most 1, got {value}")
    for name, known in CHOICES.items():
        if name in settings and str(settings[name]).lower() not in known:
            raise ValueError(f"--{name} must be one of {', '.join(known)}, got {settings[name]!r}")
    if settings.get("resume_from_checkpoint") is not None:
        raise ValueError(
            "--resume_from_checkpoint has no effect here: a run goes on from the last checkpoint in --out by itself"
        )
    for name, value in settings.items():
        if name.endswith("_kwargs") and isinstance(value, str) and not value.startswith("{"):
            raise ValueError(f"--{name} must be a JSON object, got {value!r}")
    wrong = [weight for weight in settings.get("reward_weights") or [] if not math.isfinite(weight)]
    if wrong:
        raise ValueError(f"--reward_weights must be finite, got {wrong[0]}")


def check_optimizer(training: VGPOTrainingConfig) -> None:
    """Make an optimiser and a schedule for one number, as training would for the model.

    Raises:
        ValueError: They cannot be made with these settings.

    """
    if training.optim not in OF_TORCH:
        return
    import torch
    from transformers import Trainer, get_scheduler

    steps = training.max_steps if training.max_steps > 0 else 1000
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(training)
        optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"no optimiser can be made with --learning_rate, --adam_ and --optim_args: {error}") from error
    try:
        get_scheduler(
            training.lr_scheduler_type,
            optimizer,
            num_warmup_steps=training.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=training.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"no schedule can be made with --lr_scheduler_type, --lr_scheduler_kwargs and --warmup_steps: {error}"
        ) from error

r"""VGPO in verl (0.9): one environment variable and two lines of configuration.

::

    VERL_USE_EXTERNAL_MODULES=vgpo_kernels.integrations.verl python -m verl.trainer.main_ppo \
        trainer.v1.trainer_mode=vgpo \
        actor_rollout_ref.actor.policy_loss.loss_mode=vgpo \
        +algorithm.vgpo.preset=paper        # and any field of VGPOConfig: +algorithm.vgpo.beta=0.5

verl imports the module in the driver and in every worker. There it

- computes the visual focus of what was sampled in the old-log-prob pass (a hook on the final norm, no extra forward
  pass): one more value per token beside the log-prob and the entropy, ``visual_focus`` in the engine's model output;
- re-weights the advantages on the driver, which has the whole rollout batch and knows the groups by uid
  (``trainer_mode=vgpo``);
- registers this library's losses as ``loss_mode`` ``vgpo`` (PPO with dual clip, as ``vanilla``), ``vgpo_gspo``,
  ``vgpo_cispo`` and ``vgpo_sapo``. The re-weighted advantages work with verl's own losses as well.

Importing this module imports verl and registers all of it; nothing else in the library imports it.
"""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo import core_algos
from verl.utils import tensordict_utils
from verl.utils.ulysses import gather_outputs_and_unpad
from verl.workers.engine.fsdp import transformer_impl

from vgpo_kernels import checks, policy_loss, visual_focus
from vgpo_kernels.integrations.surface import config_from, known, masked_mean, require, reweight
from vgpo_kernels.integrations.transformers import capture_hidden_states, visual_mask

KNOWN = known("verl")
FLAG = "calculate_visual_focus"
FIELD = "visual_focus"

# loss_mode in verl's configuration: what it means here, and the bound that verl puts on the log-ratio.
LOSS_MODES: dict[str, dict[str, Any]] = {
    "vgpo": {"loss_type": "grpo", "ratio_clamp": 20.0},
    "vgpo_gspo": {"loss_type": "gspo_token", "ratio_clamp": 10.0},
    "vgpo_cispo": {"loss_type": "cispo", "ratio_clamp": 20.0},
    "vgpo_sapo": {"loss_type": "sapo", "ratio_clamp": 20.0},
}

# verl's strategies whose engines have a forward pass of their own. The others inherit that of FSDP.
WITHOUT_FOCUS = ("automodel", "megatron", "torchtitan")
SCORED_BY = "verl's FSDP engine and those built on it (strategy fsdp, fsdp2, fsdp_turbo, veomni) compute visual_focus"


def compute_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    *,
    loss_mode: str = "vgpo",
) -> tuple[Tensor, dict[str, float]]:
    """:func:`vgpo_kernels.policy_loss` with the signature of verl's policy losses.

    Args:
        old_log_prob: ``[B, T]``, as all that follow.
        log_prob: Differentiable.
        advantages: Per token; VGPO's factors are already in them.
        response_mask: The scored tokens.
        loss_agg_mode: verl's name of an aggregation; ``"token-sum"`` included.
        config: verl's ``ActorConfig``: clip ratios, ``global_batch_info``, sapo's temperatures.
        rollout_is_weights: Off-policy correction, per token.
        loss_mode: A key of ``LOSS_MODES``.

    Returns:
        The loss, 0-dimensional and scaled by the data-parallel size as verl's are, and verl's metrics as numbers.

    Raises:
        ValueError: verl's configuration has a value that :func:`vgpo_kernels.policy_loss` refuses.

    """
    batch = dict(config.global_batch_info)
    mask = response_mask.bool()
    tokens, sequences = batch.get("batch_num_tokens"), batch.get("global_batch_size")
    if loss_agg_mode == "token-sum":
        loss_agg_mode, tokens = "token-mean", 1
    if sequences is None:
        # verl leaves fully masked responses out of the mean.
        sequences = mask.any(-1).sum()
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    options = dict(LOSS_MODES[loss_mode])
    if options["loss_type"] == "grpo":
        options["dual_clip"] = config.get("clip_ratio_c", 3.0)
    elif options["loss_type"] == "sapo":
        options |= {
            "sapo_temperature_positive": config.tau_pos,
            "sapo_temperature_negative": config.tau_neg,
            "aggregation": "seq-mean-token-mean",
        }
    options.setdefault("aggregation", loss_agg_mode)
    loss, metrics = policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        mask,
        importance_weights=rollout_is_weights,
        num_tokens=tokens,
        num_sequences=sequences,
        max_length=batch.get("loss_scale_factor") or mask.shape[-1],
        epsilon_low=low,
        epsilon_high=high,
        **options,
    )
    gap = old_log_prob.float() - log_prob.detach().float()
    if options["loss_type"] != "gspo_token":  # there verl bounds the mean over the response, not this
        gap = gap.clamp(-options["ratio_clamp"], options["ratio_clamp"])
    names = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
    values = (metrics["clip_fraction"], masked_mean(gap, mask), metrics["dual_clip_fraction"])
    return loss * batch.get("dp_size", 1), dict(zip(names, torch.stack(values).tolist(), strict=True))


def _sampled_of_packed(input_ids: Any, response_mask: Any) -> Tensor:
    """Return True at the tokens of a nested batch that the policy sampled, bool ``[N]``.

    Args:
        input_ids: verl's nested token ids, B sequences (prompt and response) of N tokens in all.
        response_mask: verl's nested mask of the responses, the last tokens of each sequence; 0 at what tools answered.

    Raises:
        TypeError: ``response_mask`` is not nested.

    """
    if not response_mask.is_nested:
        raise TypeError(f"response_mask must be nested as input_ids is, got {checks.describe(response_mask)}")
    ids, offsets = input_ids.values(), input_ids.offsets()
    positions = torch.arange(ids.shape[0], device=ids.device)
    first = offsets[1:] - response_mask.offsets().diff()  # of the response
    answered = positions >= first.repeat_interleave(offsets.diff(), output_size=ids.shape[0])
    return torch.zeros_like(answered).masked_scatter(answered, response_mask.values().bool())


def focus_of_packed(hidden: Tensor, input_ids: Any, model: Any, response_mask: Any) -> Tensor:
    """Compute the focus of the tokens that the policy sampled in a nested batch of sequences (prompt and response).

    A token is compared with the images before it, those that tools have shown by then included. Visual tokens that the
    policy sampled itself are no image.

    Args:
        hidden: Last hidden states of the forward pass: packed ``[1, N (+ padding), D]``, or ``[B, S, D]`` padded
            to the right.
        input_ids: verl's nested token ids, B sequences of N tokens in all.
        model: The model, whose configuration names its visual tokens.
        response_mask: As for :func:`_sampled_of_packed`.

    Returns:
        fp32 ``[N]``: cosines, 0 at tokens that were not sampled and NaN where no image was seen yet, **shifted one
        place to the left**, as verl stores log-probs, so that verl's own slicing finds the focus of token t where it
        finds the log-prob of token t.

    Raises:
        TypeError: ``response_mask`` is not nested.
        ValueError: The model's configuration names no visual token.

    """
    sampled = _sampled_of_packed(input_ids, response_mask).to(hidden.device)
    ids, offsets = input_ids.values().to(hidden.device), input_ids.offsets().to(hidden.device)
    visual = visual_mask(ids, model, sampled)
    if hidden.shape[0] == 1:
        cos = visual_focus(hidden[0, : ids.shape[0]], visual, sampled, cu_seqlens=offsets, visibility="causal")
    else:
        inside = torch.arange(hidden.shape[1], device=hidden.device) < offsets.diff()[:, None]
        images, answers = (torch.zeros_like(inside).masked_scatter(inside, mask) for mask in (visual, sampled))
        cos = visual_focus(hidden, images, answers, visibility="causal")[inside]
    return cos.roll(-1)


def score_focus(engine: type) -> None:
    """Make an FSDP engine of verl compute the focus in its forward pass when ``calculate_visual_focus`` is set.

    Args:
        engine: The class, whose ``forward_step`` is replaced, once.

    Raises:
        UnknownSurfaceError: The engine's methods are not those of the known versions.

    """
    forward_step = require(engine, "forward_step", ("self", "micro_batch", "loss_function", "forward_only"), KNOWN)
    if getattr(forward_step, "scores_visual_focus", False):
        return

    @functools.wraps(forward_step)
    def with_focus(self: Any, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        if not tensordict_utils.get_non_tensor_data(data=micro_batch, key=FLAG, default=False):
            return forward_step(self, micro_batch, loss_function, forward_only)
        with capture_hidden_states(self.module) as captured:
            loss, output = forward_step(self, micro_batch, loss_function, forward_only)
        hidden = captured.hidden
        if getattr(self, "use_ulysses_sp", False):
            hidden = gather_outputs_and_unpad(hidden, gather_dim=1, unpad_dim=1, padding_size=0)
        input_ids = micro_batch["input_ids"]
        cos = focus_of_packed(hidden, input_ids, self.module, micro_batch["response_mask"])
        nested = torch.nested.nested_tensor_from_jagged(cos, input_ids.offsets().to(cos.device))
        output["model_output"][FIELD] = nested
        return loss, output

    with_focus.scores_visual_focus = True  # type: ignore[attr-defined]
    engine.forward_step = with_focus  # type: ignore[attr-defined]


def visually_guided(trainer: type) -> type:
    """Return a subclass of one of verl's trainers that multiplies the advantages by VGPO's factors.

    Register it for another way of running than verl's synchronous one::

        register_trainer("vgpo_async")(visually_guided(PPOTrainerSeparateAsync))

    Args:
        trainer: A trainer that computes old log-probabilities and advantages as verl's synchronous one does.

    Returns:
        The subclass. Constructing it raises ValueError where the configuration has no pass that computes the focus:
        with ``rollout_correction.bypass_mode``, or with an engine that does not inherit FSDP's forward pass.

    Raises:
        UnknownSurfaceError: The trainer's methods are not those of the known versions.

    """
    require(trainer, "__init__", ("config",), KNOWN)
    require(trainer, "_compute_old_log_prob", ("self", "batch", "metrics"), KNOWN)
    require(trainer, "_compute_advantage", ("self", "batch", "metrics"), KNOWN)

    class VisuallyGuided(trainer):  # type: ignore[misc]
        def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
            # Before a model is loaded or a token sampled.
            _require_scoring_pass(config)
            super().__init__(config, *arguments, **options)

        def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
            batch.extra_info[FLAG] = True
            batch = super()._compute_old_log_prob(batch, metrics)
            batch.extra_info[FLAG] = False
            return batch

        def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
            import transfer_queue
            from tensordict import TensorDict
            from verl.workers.utils.padding import response_from_nested

            batch = super()._compute_advantage(batch, metrics)
            data = transfer_queue.kv_batch_get(
                keys=batch.keys,
                partition_id=batch.partition_id,
                select_fields=["uid", "response_mask", FIELD, "advantages"],
            )
            if data.get(FIELD, None) is None:  # the data plane leaves out what it does not have
                raise RuntimeError(f"the old-log-prob pass left no {FIELD}: {SCORED_BY}; score_focus adds it to others")
            mask, advantages = data["response_mask"], data["advantages"]
            cos = response_from_nested(data[FIELD], mask)
            reweighted, focus_metrics = reweight(
                advantages.values(),
                cos.values(),
                mask.values(),
                data.get("uid").tolist(),
                config_from(self.config.algorithm.get("vgpo", {})),
                cu_seqlens=mask.offsets(),
            )
            metrics.update(focus_metrics)
            nested = torch.nested.nested_tensor_from_jagged(reweighted, advantages.offsets())
            fields = TensorDict({"advantages": nested}, batch_size=len(batch))
            return transfer_queue.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)

    VisuallyGuided.__name__ = VisuallyGuided.__qualname__ = f"VisuallyGuided{trainer.__name__}"
    return VisuallyGuided


def _require_scoring_pass(config: Any) -> None:
    """Raise ValueError if no pass computes the focus under verl's configuration."""
    correction = config.algorithm.get("rollout_correction", None)
    if correction and correction.get("bypass_mode", False):
        raise ValueError(
            "trainer_mode=vgpo scores visual focus in the old-log-prob pass, which "
            "algorithm.rollout_correction.bypass_mode=true leaves out"
        )
    strategy = config.actor_rollout_ref.actor.strategy
    if strategy in WITHOUT_FOCUS:
        raise ValueError(
            f"actor_rollout_ref.actor.strategy={strategy} does not work with trainer_mode=vgpo: {SCORED_BY}"
        )


def register() -> None:
    """Register the losses, the scoring engine and, where verl's trainer can be imported, ``trainer_mode=vgpo``.

    Raises:
        UnknownSurfaceError: verl's functions are not those of the known versions.

    """
    parameters = ("name",)
    register_policy_loss = require(core_algos, "register_policy_loss", parameters, f"{KNOWN}, and this is {_found()}")
    for mode in LOSS_MODES:
        register_policy_loss(mode)(functools.partial(compute_policy_loss, loss_mode=mode))
    score_focus(transformer_impl.FSDPEngineWithLMHead)
    if find_spec("transfer_queue") is not None:
        from verl.trainer.ppo import v1

        if "vgpo" not in v1.trainer_base.TRAINER_REGISTRY:
            v1.register_trainer("vgpo")(visually_guided(v1.PPOTrainerSync))


def _found() -> str:
    try:
        return version("verl")
    except PackageNotFoundError:
        return "a source tree without a version"


register()

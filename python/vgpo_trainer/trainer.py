"""VGPOTrainer: TRL's GRPOTrainer with the visual signal in its loss.

Rollouts, generation, rewards, advantages, logging, checkpoints, accelerate and LoRA are TRL's. Ours are three
things: the visual focus of every response token, the factors that follow from it, and the loss that applies them::

    trainer = VGPOTrainer(model, reward_funcs, args=VGPOTrainingConfig(output_dir="run"), train_dataset=dataset)
    trainer.train()

**What a step leaves behind.** With ``logging_steps=1`` (the default) every optimisation step appends one JSON object
to ``<output_dir>/metrics.jsonl``. It is TRL's own log record with ``step`` and ``seconds`` (since the start of
training) added. TRL's keys keep their names: ``loss``, ``reward``, ``reward_std``, ``rewards/<function>/mean``,
``completions/mean_length``, ``entropy``, ``kl`` (with ``beta > 0``), ``clip_ratio/low_mean`` (also ``high_mean`` and
``region_mean``), ``grad_norm``, ``learning_rate``, ``step_time``; and ``accuracy``, if a reward function reports it
with TRL's ``log_metric("accuracy", value)``. Ours:

=========================  ==================================================================================
``vgpo/visual_focus``      mean signal of response tokens: with ``signal="focus"`` their cosine to the image
                           prototype, with ``"attention"`` their share of attention on the image
``vgpo/gate_rate``         share of those tokens that the gate lets through
``vgpo/late_early_ratio``  score (visual focus, attention share) of a response's second half over its first
``vgpo/psi_std``           standard deviation of the token weights psi
``vgpo/phi_std``           standard deviation of the trajectory weights phi
``vgpo/weighted_share``    share of responses that have an image (and a finite signal)
``vgpo/factor_mean``       the factors (1 + psi)(1 + phi) that multiply advantages; also ``_min``, ``_max``
``vgpo/old_policy_kl``     divergence of the policy from the one that generated
=========================  ==================================================================================

Records of an evaluation have the same keys with the prefix ``eval_``.

**Rollouts for a report.** ``trainer.rollout_samples`` is a bounded list (``args.rollout_samples``) of
:class:`~vgpo_trainer.rollouts.RolloutSample`: prompt, images, tokens, per-token cosine, psi and factor, phi, reward,
advantage, late/early ratio, and ``correct`` where a reward function reports it with ``log_extra("correct", [...])``.

**Where the signal comes from.** See ``vgpo_signal`` of :class:`~vgpo_trainer.config.VGPOTrainingConfig`. TRL shuffles a
generation batch and cuts it into micro-batches, so the responses of a prompt part. They keep the id of their prompt,
and with ``"scoring"`` their factors are known before TRL shuffles; with ``"loss"`` no batch is ever cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from vgpo_kernels import VGPOConfig, policy_loss
from vgpo_kernels.integrations.transformers import visual_token_ids
from vgpo_trainer.config import VGPOTrainingConfig
from vgpo_trainer.fused_head import fuse_heads
from vgpo_trainer.rollouts import (
    PendingRollout,
    RolloutRecorder,
    RolloutSample,
    prompt_ids,
    prompt_text,
    row_images,
)
from vgpo_trainer.runs.checkpoints import store_batch
from vgpo_trainer.runs.metrics import MetricsFile
from vgpo_trainer.runs.writing import RunFailure, writing
from vgpo_trainer.signals import SignalSettings, VisualSignal, signal_class
from vgpo_trainer.signals.factors import SignalFactors, compute_factors
from vgpo_trainer.signals.reader import SignalReader, visual_tokens_told
from vgpo_trainer.trl_surface import (
    FORWARD_INPUTS,
    LOSS_TYPES,
    VESPO_SETTINGS,
    Sequences,
    WithoutHead,
    check_surface,
    gather_head,
    load_weights,
    refuse_unsupported,
    refuse_video,
)

POLICY_RECORD = {  # metric of policy_loss: key of the log
    "clip_fraction_low": "clip_ratio/low_mean",
    "clip_fraction_high": "clip_ratio/high_mean",
    "clip_fraction": "clip_ratio/region_mean",
    "entropy": "entropy",
    "approx_kl": "vgpo/old_policy_kl",
}


class VGPOTrainer(GRPOTrainer):
    """:class:`trl.GRPOTrainer` with visually-guided advantages; its arguments are TRL's.

    Args:
        model: As TRL's: a name, a path, a model or a PEFT model. With VGPO on, a vision-language model whose image
            tokens are in its sequence.
        reward_funcs: As TRL's.
        args: Settings; default: ``VGPOTrainingConfig("<model>-VGPO")``.
        train_dataset: As TRL's. Rows that share prompt and images (or a ``prompt_id`` column) form a group.
        eval_dataset: As TRL's.
        processing_class: As TRL's.
        signal: Name of a visual signal (``"focus"``, ``"attention"``), in place of ``args.signal``.
        visual_tokens: Ids of image and video tokens, for a model whose configuration and processor do not say.
        final_norm: The norm after the last decoder layer, or its name in the model (``"model.text.ln_out"``), for a
            model in which it is not found.
        **others: The rest of TRL's arguments, by name.

    Raises:
        TypeError: ``args`` is not a :class:`VGPOTrainingConfig`, a visual token no integer, or the model has no final
            norm by a known name.
        ValueError: A setting of TRL that this trainer does not carry, or a model without visual tokens.

    """

    args: VGPOTrainingConfig
    model: PreTrainedModel
    _tag_names: ClassVar[list[str]] = ["trl", "grpo", "vgpo"]
    _name = "VGPO"
    _paper: ClassVar[dict[str, str]] = {"title": "Visually-Guided Policy Optimization", "id": "2604.09349"}

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: VGPOTrainingConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        signal: str | None = None,
        visual_tokens: Sequence[int] | None = None,
        final_norm: str | nn.Module | None = None,
        **others: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = VGPOTrainingConfig(f"{Path(name).name}-VGPO")
        if not isinstance(args, VGPOTrainingConfig):
            raise TypeError(f"args must be a VGPOTrainingConfig, got {type(args).__name__}")
        if signal is not None:
            args = copy(args)
            args.signal = signal
            args.check_signal()
        check_surface()
        refuse_unsupported(args)
        self._vgpo = args.vgpo_config()
        # What the signal is computed with; diagnostics without VGPO look at a run through the paper's eyes.
        self._signal_config = self._vgpo or (VGPOConfig.paper() if args.vgpo_diagnostics else None)
        self._reader: SignalReader | None = None
        self._rewards: Tensor | None = None
        self._correct: list[Any] = []
        self._loss_inputs: dict[str, Any] = {}
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, **others)
        fuse_heads(
            (self.model, self.ref_model),
            self.temperature,
            fp32=args.cast_lm_head_to_fp32,
            fused=args.fused_head,
            norm=final_norm,
        )
        if self._signal_config is not None:
            kind = signal_class(args.signal)
            settings = SignalSettings(self._signal_config, args.signal_layers, final_norm)
            kind.check(self.model, settings)
            told = visual_tokens_told(visual_tokens, self.model)
            try:
                tokens = told or visual_token_ids(self.model, self.processing_class)
            except ValueError as error:
                raise ValueError(
                    f"{error} (visual_tokens=(id, ...)); vgpo=None trains without the visual signal"
                ) from error
            self._reader = SignalReader(kind, settings, tokens)
        capacity = args.rollout_samples if self.accelerator.is_main_process else 0
        self._recorder = RolloutRecorder(capacity, cache(lambda token: self._tokenizer.decode([token])))
        self.add_callback(MetricsFile(Path(args.output_dir) / "metrics.jsonl"))

    @property
    def rollout_samples(self) -> list[RolloutSample]:
        """The latest responses with their visual signal, oldest first; on the main process only."""
        return list(self._recorder.samples)

    # Rollouts: what TRL generates and scores, with the id of its prompt and, where it is known by then, its factors.

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        for row in inputs:
            refuse_video(row)
        mode = "train" if self.model.training else "eval"
        # In evaluation a batch is neither cut nor used twice.
        source = self.args.signal_source() if mode == "train" else "loss"
        groups = None if self._reader is None else prompt_ids(inputs, self.accelerator.device)
        follows = self._reader is not None and source == "scoring"
        with self._reader.following() if follows else nullcontext() as passes:
            batch: dict[str, Any] = super()._generate_and_score_completions(inputs)

        batch["rollout_index"] = torch.arange(len(inputs), device=self.accelerator.device)
        if self._recorder.enabled:
            self._recorder.begin(mode, self._pending_rollouts(inputs, batch["advantages"]))
        if groups is None:
            self._record(batch, mode)
        else:
            batch["prompt_group"] = groups
        if passes is not None:
            old_logp = batch.get("old_per_token_logps")
            # TRL's pass does not know which completion tokens are tool output, hence which images a tool showed.
            if old_logp is None or "tool_mask" in batch:
                signal = self._scoring_pass(batch, mode)
            else:
                signal = passes.that_returned(old_logp)
            batch["visual_factors"] = self._signal_factors(batch, signal, mode).factors
        return batch

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        begin = self.accelerator.process_index * len(prompts)
        local = rewards[begin : begin + len(prompts)]
        total = (local * self.reward_weights.to(local.device)).nansum(dim=1)
        self._rewards = total.masked_fill(local.isnan().all(dim=1), torch.nan)
        self._correct = list(self._pending_extra_logs.get("correct", []))
        return rewards

    def _pending_rollouts(self, inputs: Sequence[Mapping[str, Any]], advantages: Tensor) -> list[PendingRollout]:
        assert self._rewards is not None
        correct = self._correct if len(self._correct) == len(inputs) else [None] * len(inputs)
        return [
            PendingRollout(
                step=self.state.global_step,
                prompt=prompt_text(row.get("prompt", "")),
                images=row_images(row),
                answer=None if row.get("answer") is None else str(row["answer"]),
                reward=reward,
                advantage=advantage,
                correct=None if right is None else bool(right),
            )
            for row, reward, advantage, right in zip(
                inputs, self._rewards.tolist(), advantages.tolist(), correct, strict=True
            )
        ]

    # The visual signal: phase one wherever the policy's hidden states pass by, phase two over all processes.

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *rest: Any, **named: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's pass; before the loss, the policy's signal is read on the way."""
        arguments = (model, input_ids, attention_mask, logits_to_keep, *rest)
        if self.is_fsdp_enabled and torch.is_grad_enabled():
            gather_head(model)
        reader = self._reader
        if reader is None or reader.passes is None or model is not self.model:
            return super()._get_per_token_logps_and_entropies(*arguments, **named)
        with reader.read(model, input_ids, attention_mask, attention_mask[:, -logits_to_keep:]) as signal:
            result = super()._get_per_token_logps_and_entropies(*arguments, **named)
        reader.passes.add(result[0], signal)
        return result

    def _scoring_pass(self, batch: Mapping[str, Any], mode: str) -> VisualSignal:
        """Read the signal of a whole generation batch: one forward pass of the policy without its LM head."""
        assert self._reader is not None
        sequence = Sequences.of(batch)
        size = self.args.per_device_train_batch_size if mode == "train" else self.args.per_device_eval_batch_size
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpointing, self._reader.read(self.model, *sequence) as signal:
            super()._get_per_token_logps_and_entropies(
                WithoutHead(self.model),
                sequence.input_ids,
                sequence.attention_mask,
                sequence.response_mask.shape[1],
                batch_size=size,
                **{name: batch.get(name) for name in FORWARD_INPUTS},
            )
        return signal

    def _signal_factors(self, batch: Mapping[str, Any], signal: VisualSignal, mode: str) -> SignalFactors:
        """Compute the factors of a batch from its signal; both are recorded and logged."""
        assert self._signal_config is not None
        response_mask = Sequences.of(batch).response_mask
        found = compute_factors(
            signal.values,
            response_mask,
            batch["prompt_group"],
            signal.batch.image_mask.any(dim=1),
            self._signal_config,
            gather=self.accelerator.gather,
            process_index=self.accelerator.process_index,
        )
        shown = signal.shown
        self._record(batch, mode, shown, found)
        self._log_signal(shown, found, response_mask, mode)
        return found

    def _record(
        self, batch: Mapping[str, Any], mode: str, shown: Tensor | None = None, found: SignalFactors | None = None
    ) -> None:
        """Complete the rollouts of a batch; without a signal they have zeros in its place."""
        if not self._recorder.enabled:
            return
        response_mask = Sequences.of(batch).response_mask
        zeros = torch.zeros(response_mask.shape, device=response_mask.device)
        ones, nothing = torch.ones_like(zeros), zeros.sum(dim=1)
        self._recorder.complete(
            mode,
            batch["rollout_index"],
            batch["completion_ids"],
            batch["completion_mask"],
            response_mask,
            cos=zeros if shown is None else shown,
            psi=zeros if found is None else found.psi,
            factors=ones if found is None or self._vgpo is None else found.factors,
            phi=nothing if found is None else found.phi,
            late_early=nothing + torch.nan if found is None else found.late_early,
        )

    # The loss.

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        mode = "train" if self.model.training else "eval"
        sequence = Sequences.of(inputs)
        mask = sequence.response_mask
        factors = inputs.get("visual_factors")
        reads = self._reader is not None and factors is None
        with self._reader.read(model, *sequence) if reads else nullcontext() as signal:
            logp, entropy, aux_loss = self._get_per_token_logps_and_entropies(
                model,
                sequence.input_ids,
                sequence.attention_mask,
                mask.shape[1],
                compute_entropy=True,
                compute_aux_loss=self.aux_loss_enabled,
                **{name: inputs.get(name) for name in FORWARD_INPUTS},
            )
        assert entropy is not None
        if signal is not None:
            factors = self._signal_factors(inputs, signal, mode).factors
        if self._vgpo is None:
            factors = None

        old_logp = inputs.get("old_per_token_logps")
        old_logp = logp.detach() if old_logp is None else old_logp
        entropy_mask = None
        if self.top_entropy_quantile < 1.0:
            entropy_mask = self.get_high_entropy_mask(entropy, mask, 1 - self.top_entropy_quantile)
        advantages, weights = self._importance_weights(inputs, logp, old_logp, mask, entropy_mask)
        loss, metrics = policy_loss(
            logp,
            old_logp,
            advantages,
            mask,
            factors=factors,
            ref_logp=inputs.get("ref_per_token_logps"),
            entropy=entropy.detach(),  # for the metric; TRL's bonus has a denominator of its own
            importance_weights=weights,
            **self._denominators(inputs, mask, mode),
            **self._loss_options(),
        )

        accumulated = self.current_gradient_accumulation_steps if mode == "train" else 1
        if self.entropy_coef != 0.0:
            counted = mask if entropy_mask is None else mask * entropy_mask
            mean_entropy = (entropy * counted).sum() / counted.sum().clamp(min=1)
            loss = loss - self.entropy_coef * mean_entropy / accumulated
        if self.aux_loss_enabled:
            assert aux_loss is not None
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulated
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather(aux_loss.detach()).mean().item())
        self._log_policy(metrics, mode)
        if mode == "train":
            self._loss_inputs = {**inputs, "logp": logp.detach(), "loss": loss.detach()}
            if not loss.isfinite():
                self._break_off(self.state.global_step + 1, f"loss is {loss.item()}")
        return loss

    # A run stops at a number that is not finite, before it is in a checkpoint, and leaves the batch that made it.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's; after the record is written, a gradient that is not finite ends the run.

        Raises:
            RunFailure: The norm of the gradient is not finite, where no loss scale is to be found by trying.

        """
        super().log(logs, start_time)
        norm = float(logs.get("grad_norm", 0.0))
        if not math.isfinite(norm) and not self.args.fp16 and not self.is_deepspeed_enabled:
            self._break_off(self.state.global_step, f"gradient's norm is {norm}")

    def _break_off(self, step: int, what: str) -> None:
        process = f"-{self.accelerator.process_index}" if self.accelerator.num_processes > 1 else ""
        path = Path(self.args.output_dir) / f"nonfinite-step-{step}{process}.safetensors"
        store_batch(path, self._loss_inputs, f"step {step}: {what}")
        raise RunFailure(f"step {step}: the {what}; its batch is in {path}")

    def _loss_options(self) -> dict[str, Any]:
        """Options of policy_loss that spell TRL's loss."""
        loss_type = self.loss_type
        if LOSS_TYPES[loss_type].clipped:  # they differ by their aggregation, which is given
            loss_type = "gspo" if self.importance_sampling_level == "sequence" else "grpo"
        return {
            "loss_type": loss_type,
            "aggregation": LOSS_TYPES[self.loss_type].aggregation,
            "epsilon_low": self.epsilon_low,
            "epsilon_high": self.epsilon_high,
            "dual_clip": self.args.delta if LOSS_TYPES[self.loss_type].clipped else None,
            "cispo_cap": self.epsilon_high if self.loss_type == "cispo" else None,
            "sapo_temperature_positive": self.args.sapo_temperature_pos,
            "sapo_temperature_negative": self.args.sapo_temperature_neg,
            **{name: getattr(self.args, name) for name in VESPO_SETTINGS},
            "kl_coef": self.beta,
            "kl_estimator": "k3",
            "kl_bias_correction": self.args.use_bias_correction_kl,
            "ratio_clamp": None,
        }

    def _denominators(self, inputs: Mapping[str, Any], mask: Tensor, mode: str) -> dict[str, Any]:
        """Denominators of TRL's normalisation, so that the sum over micro-batches and processes is the batch's loss."""
        accumulated = self.current_gradient_accumulation_steps if mode == "train" else 1
        average_over = LOSS_TYPES[self.loss_type].average_over
        if average_over == "generation batch":
            # The count spans the generation batches of all processes; gradients are averaged over processes.
            tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            if mode == "train":
                tokens = tokens * accumulated / self.args.steps_per_generation
            return {"num_tokens": tokens}
        if average_over == "tokens":
            return {"num_tokens": mask.sum().clamp(min=1) * accumulated}
        return {"num_sequences": mask.shape[0] * accumulated, "max_length": self.max_completion_length}

    def _importance_weights(
        self,
        inputs: Mapping[str, Any],
        logp: Tensor,
        old_logp: Tensor,
        mask: Tensor,
        entropy_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Advantages, and what multiplies the surrogate, ``[B, T]``: correction of vLLM's mismatch, and TRL's masks.

        In vespo a correction belongs to the ratio of the response, so that the masks multiply the advantages.
        """
        advantages, ratio = inputs["advantages"], inputs.get("importance_sampling_ratio")
        weights = None
        if self.off_policy_mask_threshold is not None:
            weights = self.get_off_policy_mask(
                advantages=inputs["advantages"][:, None],
                per_token_logps=logp,
                sampling_per_token_logps=inputs.get("sampling_per_token_logps", old_logp),
                mask=mask,
                off_policy_threshold=self.off_policy_mask_threshold,
            ).float()
        in_ratio = self.loss_type == "vespo"
        for factor in (entropy_mask, None if in_ratio else ratio):
            if factor is not None:
                weights = factor.float() if weights is None else weights * factor.float()
        if in_ratio:
            return advantages if weights is None else advantages[:, None] * weights.expand(mask.shape), ratio
        return advantages, None if weights is None else weights.expand(mask.shape)

    # Checkpoints.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with writing(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    # save_pretrained may write weights by other names than the module's (LLaVA keeps those of its first release),
    # which from_pretrained maps back; Trainer would load them by name, find none and go on without.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        if self._is_plain(target):
            load_weights(target, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._is_plain(self.model):
            load_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _is_plain(self, model: nn.Module) -> bool:
        """Whether a checkpoint holds the whole model as from_pretrained reads it."""
        return isinstance(model, PreTrainedModel) and not self.is_fsdp_enabled and not self.is_deepspeed_enabled

    # Records, through TRL's ordinary logging.

    def _log_policy(self, metrics: Mapping[str, Tensor], mode: str) -> None:
        names = dict(POLICY_RECORD)
        if self.beta != 0.0:
            names["ref_kl"] = "kl"
        if self._vgpo is not None:
            names["factor_mean"] = "vgpo/factor_mean"
        means = torch.stack([metrics[name] for name in names])
        number = metrics["num_tokens"]
        totals = self.accelerator.reduce(torch.cat([means * number, number[None]]), reduction="sum")
        for key, value in zip(names.values(), (totals[:-1] / totals[-1].clamp(min=1)).tolist(), strict=True):
            self._metrics[mode][key].append(value)
        if self._vgpo is not None:
            extremes = self.accelerator.gather(torch.stack([metrics["factor_min"], metrics["factor_max"]])[None])
            self._metrics[mode]["vgpo/factor_min"].append(extremes[:, 0].min().item())
            self._metrics[mode]["vgpo/factor_max"].append(extremes[:, 1].max().item())

    def _log_signal(self, shown: Tensor, found: SignalFactors, response_mask: Tensor, mode: str) -> None:
        tokens = response_mask.bool() & found.weighted[:, None]
        halves = found.late_early.isfinite()
        psi, phi = found.psi[tokens], found.phi[found.weighted]
        sums = {
            "batch": torch.full((), response_mask.shape[0], device=response_mask.device),
            "responses": found.weighted.sum(),
            "tokens": tokens.sum(),
            "ratios": halves.sum(),
            "shown": shown[tokens].sum(),
            "gated": found.gate_rate * tokens.sum(),
            "late_early": found.late_early[halves].sum(),
            "psi": psi.sum(),
            "psi_square": psi.square().sum(),
            "phi": phi.sum(),
            "phi_square": phi.square().sum(),
        }
        reduced = self.accelerator.reduce(torch.stack([value.float() for value in sums.values()]), reduction="sum")
        total = dict(zip(sums, reduced.tolist(), strict=True))
        for name, value in {
            "visual_focus": mean(total["shown"], total["tokens"]),
            "gate_rate": mean(total["gated"], total["tokens"]),
            "late_early_ratio": mean(total["late_early"], total["ratios"]),
            "psi_std": standard_deviation(total["psi"], total["psi_square"], total["tokens"]),
            "phi_std": standard_deviation(total["phi"], total["phi_square"], total["responses"]),
            "weighted_share": mean(total["responses"], total["batch"]),
        }.items():
            self._metrics[mode][f"vgpo/{name}"].append(value)


def mean(total: float, count: float) -> float:
    """A mean from a sum; NaN of nothing."""
    return total / count if count else float("nan")


def standard_deviation(total: float, squares: float, count: float) -> float:
    """Population standard deviation from the sums of values and of their squares; NaN of nothing."""
    if count == 0:
        return float("nan")
    return max(squares / count - (total / count) ** 2, 0.0) ** 0.5

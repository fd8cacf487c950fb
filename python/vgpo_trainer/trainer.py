"""VGPOTrainer: TRL's GRPOTrainer with the visual signal in its loss.

Rollouts, generation, rewards, advantages, logging, checkpoints, accelerate and LoRA are TRL's. Ours are three
things: the visual focus of every response token, the factors that follow from it, and the loss that applies them::

    trainer = VGPOTrainer(model, reward_funcs, args=VGPOTrainingConfig(output_dir="run"), train_dataset=dataset)
    trainer.train()

docs/train.md says what a step logs (``<output_dir>/metrics.jsonl``) and what rows hold; docs/integrate.md, what a group
is, and which settings of TRL go with it. ``trainer.rollout_samples`` holds the latest responses with their signal.

With and without VGPO, a loss that is not finite ends the run with a ``RunFailure``; so does a gradient, except with
fp16, which tries loss scales; and a row that cannot be read or is refused by the processor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from vgpo_kernels import ShapingConfig, VGPOConfig, policy_loss
from vgpo_trainer.config import VGPOTrainingConfig
from vgpo_trainer.data import DatasetError
from vgpo_trainer.first_batch import FirstBatch
from vgpo_trainer.fused_head import TRLS, fuse_heads
from vgpo_trainer.generation_batch import RowFacts, group_ids, refuse_mixed, trl_rows, warn_of_sizes
from vgpo_trainer.methods import METHODS
from vgpo_trainer.records import PhiLengthWatch, add_records, loss_records, signal_records, token_records
from vgpo_trainer.rollouts import RolloutRecorder, RolloutSample, pending, row_images
from vgpo_trainer.row_errors import (
    check_lengths,
    naming_placeholders,
    naming_rows,
    readable,
    reading,
    refuse_unread,
)
from vgpo_trainer.runs.card import WithCard
from vgpo_trainer.runs.checkpoints import store_batch
from vgpo_trainer.runs.metrics import MetricsFile
from vgpo_trainer.runs.trackers import check_trackers, tell_in_words
from vgpo_trainer.runs.writing import RunFailure
from vgpo_trainer.sharded import name_layers_to_shard
from vgpo_trainer.signals import SignalSettings, ViewSignal, VisualSignal, signal_class
from vgpo_trainer.signals.factors import Factors
from vgpo_trainer.signals.reader import SignalReader, find_visual_tokens
from vgpo_trainer.signals.shaping import ShapedFactors, batch_factors, expected_selection
from vgpo_trainer.trl_loss import denominators, importance_weights, loss_options
from vgpo_trainer.trl_metrics import policy_records
from vgpo_trainer.trl_surface import (
    FORWARD_INPUTS,
    LOSS_TYPES,
    Sequences,
    WithoutEmptyImages,
    WithoutHead,
    check_surface,
    gather_head,
    refuse_split_sequences,
    refuse_unsupported,
    rollout_logp,
    why_not_mixed,
)
from vgpo_trainer.videos import INPUTS as VIDEO_INPUTS
from vgpo_trainer.videos import GenerationVideos, WithVideos, decoding, generation_videos
from vgpo_trainer.views import TwoViews, ViewPasses, check_views, has_view, view_term
from vgpo_trainer.vllm_rollouts import check_rollouts, remember_prompts
from vgpo_trainer.weights import WithWeights


class VGPOTrainer(WithWeights, WithCard, GRPOTrainer):
    """:class:`trl.GRPOTrainer` with visually-guided advantages; its arguments are TRL's.

    Args:
        model: As TRL's: a name, a path (also a ``Path``), a model or a PEFT model. With VGPO on, a vision-language
            model whose image tokens are in its sequence.
        reward_funcs: As TRL's.
        args: Settings; default: ``VGPOTrainingConfig("<model>-VGPO")``. A :class:`trl.GRPOConfig` is carried over by
            :meth:`VGPOTrainingConfig.from_trl`, with the paper's VGPO.
        train_dataset: As TRL's. The responses to a row form a group, or those to all rows that share a ``prompt_id``,
            if it has that column.
        eval_dataset: As TRL's.
        processing_class: As TRL's.
        method: Name of a method (``"vgpo"``, ``"pepo"``, ``"vppo"``, ``"pgpo"``, ``"tor"``, ``"vepo"``, ``"papo"``),
            in place of ``args.method``.
        signal: Name of a visual signal (``"focus"``, ``"attention"``, ``"dependency"``), in place of ``args.signal``.
        view: How images are spoilt for ``"dependency"`` (``"swap"``, ``"mask"``, ...), in place of ``args.view``.
        visual_tokens: Ids of image and video tokens, for a model whose configuration and processor do not say.
        final_norm: The norm after the last decoder layer, or its name in the model (``"model.text.ln_out"``), for a
            model in which it is not found.
        *rest: The rest of TRL's arguments, in TRL's order.
        **others: The same by name.

    Raises:
        TypeError: ``args`` is neither a :class:`VGPOTrainingConfig` nor a plain :class:`trl.GRPOConfig`, a visual token
            no integer, or the model has no final norm by a known name.
        ValueError: A setting of TRL that the loss with VGPO does not carry, sequences that accelerate is to split over
            processes, or a model without visual tokens.
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
        args: VGPOTrainingConfig | GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *rest: Any,
        method: str | None = None,
        signal: str | None = None,
        view: str | None = None,
        visual_tokens: Sequence[int] | None = None,
        final_norm: str | nn.Module | None = None,
        **others: Any,
    ) -> None:
        model = str(model) if isinstance(model, Path) else model
        if args is None:
            name = Path(model if isinstance(model, str) else model.config._name_or_path).name
            args = VGPOTrainingConfig(f"{name}-VGPO")
        if not isinstance(args, VGPOTrainingConfig):
            args = VGPOTrainingConfig.from_trl(args)
        args = args.replacing(method=method, signal=signal, view=view)
        check_surface()
        refuse_unsupported(args)
        check_trackers(args.report_to)
        self._shaping = args.shaping()
        # What the signal is computed with; diagnostics without a method look at a run through the paper's eyes.
        self._signal_config = self._shaping or (VGPOConfig.paper() if args.vgpo_diagnostics else None)
        self._over_selected = METHODS[args.method].over_selected
        self._reader: SignalReader | None = None
        self._views: ViewPasses | None = None
        self._loss_views: TwoViews | None = None  # while the loss passes them
        self._videos: GenerationVideos | None = None  # of the generation batch that is being made
        self._video_inputs: list[dict[str, Tensor]] | None = None  # of the rows that pass
        self._rewards: Tensor | None = None
        self._correct: list[Any] = []
        self._loss_inputs: dict[str, Any] = {}
        self._latest_logp = torch.empty(0, dtype=torch.float32)  # of the loss, which TRL keeps to itself
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, *rest, **others)
        refuse_split_sequences(self)
        if self.is_fsdp_enabled:
            name_layers_to_shard(self.model)
            name_layers_to_shard(self.ref_model)
        head = fuse_heads(
            (self.model, self.ref_model),
            self.temperature,
            fp32=args.cast_lm_head_to_fp32,
            fused=args.fused_head,
            norm=final_norm,
        )
        tokens: tuple[int, ...] = ()
        if self._signal_config is not None:
            kind = signal_class(str(args.signal))
            settings = SignalSettings(self._signal_config, args.signal_layers, final_norm)
            kind.check(self.model, settings)
            tokens = find_visual_tokens(visual_tokens, self.model, self.processing_class)
            self._reader = SignalReader(kind, settings, tokens)
        self._first_batch = FirstBatch(self, tokens, final_norm)
        # With ZeRO-3 TRL's head, which never calls the head's module, fails in its backward pass after one that did.
        self._scores_with_head = head == TRLS and is_deepspeed_zero3_enabled()
        if args.passes_views():
            check_views(self, head, final_norm)
            tokens = tokens or find_visual_tokens(visual_tokens, self.model, self.processing_class)
            self._views = ViewPasses(args, self.model, tokens, self.accelerator.process_index, final_norm)
        if self.use_vllm and self._is_vlm:
            check_rollouts(self, visual_tokens)
        capacity = args.rollout_samples if self.accelerator.is_main_process else 0
        self._group_warnings: set[str] = set()
        self._phi_length = PhiLengthWatch()
        self._shown_images: list[list[Any]] | None = None
        # TRL gathers images for its table of completions on those processes alone that have some; see below.
        self._logs_images, self.log_multimodal = self.log_multimodal, False
        self._recorder = RolloutRecorder(capacity, cache(lambda token: self._tokenizer.decode([token])))
        # First, as it takes from the record what trackers cannot hold.
        self.callback_handler.callbacks.insert(0, MetricsFile(Path(args.output_dir) / "metrics.jsonl"))

    @property
    def rollout_samples(self) -> list[RolloutSample]:
        """The latest responses with their visual signal, oldest first; on the main process only."""
        return list(self._recorder.samples)

    # Rollouts: what TRL generates and scores, with its group and, where they are known by then, its factors.

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        refuse_unread(inputs)
        try:
            with naming_rows(self, inputs):
                return self._make_batch(inputs)
        finally:
            self._videos = self._video_inputs = None

    def _make_batch(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        groups = self._number_groups(inputs, mode)
        self._videos = generation_videos(self, inputs)
        # In evaluation a batch is neither cut nor used twice.
        source = self.args.signal_source() if mode == "train" else "loss"
        scores = self._reader is not None and source == "scoring"
        # TRL's pass does not know which completion tokens are tool output, hence which images a tool showed.
        follows = scores and self.args.scores_anyway() and not self.tools
        if self._views is not None:
            self._views.begin(groups, self.state.global_step)
        with self._reader.following() if follows else nullcontext() as passes:
            rows = trl_rows(inputs) if self._videos is None else self._videos.rows
            batch: dict[str, Any] = super()._generate_and_score_completions(rows)

        if self._videos is not None:
            sequence = Sequences.of(batch)
            batch.update(self._videos.others(sequence.input_ids.shape, sequence.response_mask.shape[1]))
            batch[VIDEO_INPUTS], self._videos = self._videos.inputs, None
        self._log_images(inputs)
        batch["rollout_index"] = torch.arange(len(inputs), device=self.accelerator.device)
        if self._recorder.enabled:
            assert self._rewards is not None
            step = self.state.global_step
            self._recorder.begin(mode, pending(inputs, step, self._rewards, batch["advantages"], self._correct))
        if self._reader is None:
            self._record(batch, mode)
        else:
            batch["prompt_group"] = groups
            self._first_batch.generated(inputs, batch, groups)
        views = {} if self._views is None else self._views.end(Sequences.of(batch), batch)
        batch.update(views)
        if self._over_selected:
            batch["selected_in_batch"] = self._expected_selection(batch)
        if scores:
            if passes is None or "tool_mask" in batch:
                signal = self._scoring_pass(batch, mode)
            else:
                signal = passes.that_returned(batch["old_per_token_logps"])
            found = self._signal_factors(batch, signal, mode)
            batch["visual_factors"] = found.factors
            if self._over_selected and isinstance(found, ShapedFactors):
                batch["selected"] = found.selected
            if not self.args.view_coef:  # the loss does not pass them
                batch = {name: value for name, value in batch.items() if name not in views}
        return batch

    def _number_groups(self, inputs: Sequence[Mapping[str, Any]], mode: str) -> Tensor:
        """Number the groups of a generation batch, int64 ``[B]``, and check it; on all processes together.

        Raises:
            ValueError: Rows with and without images, where that cannot work.
        """
        facts: list[RowFacts] = gather_object([RowFacts.of(row) for row in inputs])
        if why := why_not_mixed(self):
            refuse_mixed(inputs, facts, why)
        number = self.num_generations if mode == "train" else self.num_generations_eval
        names = [fact.prompt_id for fact in facts]
        numbers = group_ids(names, number)
        if self._reader is not None and self.accelerator.is_main_process:
            warn_of_sizes(numbers, names, number, self._group_warnings)
        begin = self.accelerator.process_index * len(inputs)
        return torch.tensor(numbers[begin : begin + len(inputs)], device=self.accelerator.device)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[Any, ...]:
        """TRL's; what vLLM needs unexpanded is remembered, and what the processor makes of videos kept."""
        with decoding(self.processing_class):
            tokens, images, fields = super()._tokenize_prompts(prompts)
        check_lengths(self, tokens)
        if self.use_vllm and images is not None:
            remember_prompts(self, prompts, tokens)
        if self._videos is not None:
            self._videos.take(prompts, fields)
            self._video_inputs = self._videos.inputs
        return tokens, images, fields

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        """TRL's; a row without image has an empty list beside rows with images: the processor takes no ``None``."""
        *generated, images, tool_images = super()._generate(prompts)
        if images is not None:
            images = [shown or [] for shown in images]
        self._shown_images = images
        # Beside videos, the inputs of images are made: TRL would make them by a call without videos.
        return (*generated, images if self._videos is None else None, tool_images)

    def _log_images(self, inputs: Sequence[Mapping[str, Any]]) -> None:
        """Put the images of a generation batch into TRL's table of completions, on all processes together."""
        if not self._logs_images:
            return
        local = [row_images(row) for row in inputs] if self._shown_images is None else self._shown_images
        images = gather_object(local)
        # A batch of text between others has its empty places; a run of text alone has no column.
        if any(images) or self._logs["images"]:
            self._logs["images"].extend(images)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        begin = self.accelerator.process_index * len(prompts)
        local = rewards[begin : begin + len(prompts)]
        total = (local * self.reward_weights.to(local.device)).nansum(dim=1)
        self._rewards = total.masked_fill(local.isnan().all(dim=1), torch.nan)
        self._correct = list(self._pending_extra_logs.get("correct", []))
        return rewards

    # The visual signal: phase one wherever the policy's hidden states pass by, phase two over all processes.

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *rest: Any, **named: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's pass; before the loss, the policy's signal is read on the way."""
        if self._videos is not None:
            named |= self._videos.others(input_ids.shape, logits_to_keep)
        plain = WithoutEmptyImages(model) if 0 in (named.get("num_images") or ()) else model
        if self.is_fsdp_enabled and torch.is_grad_enabled():
            gather_head(model)
        if self._loss_views is not None:
            plain = self._loss_views.of(plain, logits_to_keep)
        reader = self._reader
        # With an adapter TRL passes the policy once more without it, as the reference.
        if reader is None or reader.passes is None or model is not self.model or reader.passes.any:
            result = self._pass(plain, input_ids, attention_mask, logits_to_keep, *rest, **named)
            self._latest_logp = result[0].detach()
            return result
        sequence = Sequences(input_ids, attention_mask, attention_mask[:, -logits_to_keep:])
        with reader.read(model, *sequence) as signal:
            if isinstance(signal, ViewSignal):
                assert self._views is not None
                plain = self._views.compare(self._views.spoil(sequence, named), signal).of(plain, logits_to_keep)
            named["compute_entropy"] = named.get("compute_entropy", False) or signal.wants_entropy
            result = self._pass(plain, input_ids, attention_mask, logits_to_keep, *rest, **named)
        if signal.wants_entropy:
            assert result[1] is not None
            signal.take_entropy(result[1])
        reader.passes.add(result[0], signal)
        return result

    def _pass(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *rest: Any, **named: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's pass, with the videos of its rows."""
        if self._video_inputs is not None:
            model = WithVideos(model, self._video_inputs)
        with naming_placeholders(self, input_ids[:, -logits_to_keep:]):
            result: tuple[Tensor, Tensor | None, Tensor | None] = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *rest, **named
            )
        return result

    def _scoring_pass(self, batch: Mapping[str, Any], mode: str) -> VisualSignal:
        """Read the signal of a whole generation batch: one forward pass of the policy without its LM head."""
        assert self._reader is not None
        sequence = Sequences.of(batch)
        length = sequence.response_mask.shape[1]
        size = self.args.per_device_train_batch_size if mode == "train" else self.args.per_device_eval_batch_size
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpointing, self._reader.read(self.model, *sequence) as signal:
            model: Any = WithoutEmptyImages(self.model)
            if isinstance(signal, ViewSignal):
                assert self._views is not None
                model = self._views.compare(batch, signal, head=False).of(model, length)
            elif not self._scores_with_head and not signal.wants_entropy:
                model = WithoutHead(model)
            _, entropy, _ = self._pass(
                model,
                sequence.input_ids,
                sequence.attention_mask,
                length,
                batch_size=size,
                compute_entropy=signal.wants_entropy,
                **{name: batch.get(name) for name in FORWARD_INPUTS},
            )
        if entropy is not None:
            signal.take_entropy(entropy)
        return signal

    def _signal_factors(self, batch: Mapping[str, Any], signal: VisualSignal, mode: str) -> Factors:
        """Compute the factors of a batch from its signal; both are recorded and logged."""
        assert self._signal_config is not None
        response_mask = Sequences.of(batch).response_mask
        # A batch of text, or one whose images TRL drops, those that a tool cut short; or none to swap them for.
        seen = batch.get("pixel_values") is not None or any(batch.get(VIDEO_INPUTS) or ())
        if not seen or (isinstance(signal, ViewSignal) and not has_view(batch)):
            signal.batch = signal.batch._replace(image_mask=torch.zeros_like(signal.batch.image_mask))
        config, progress = self._signal_config, min(self.state.global_step / max(self.state.max_steps, 1), 1.0)
        found = batch_factors(signal, response_mask, batch["prompt_group"], config, self.accelerator, progress)
        shown = signal.marked_shown()
        self._record(batch, mode, shown, found)
        groups = isinstance(config, VGPOConfig) and config.inter
        records = signal_records(shown, found, self.accelerator, groups=groups)
        add_records(self._metrics[mode], records)
        if mode == "train" and self._shaping is not None and self.accelerator.is_main_process:
            self._phi_length.see(records)
        return found

    def _expected_selection(self, batch: Mapping[str, Any]) -> Tensor:
        """Return how many tokens of a generation batch will be selected, over all processes, 0-dimensional."""
        assert isinstance(self._shaping, ShapingConfig) and self._views is not None
        mask = Sequences.of(batch).response_mask
        selected = expected_selection(self._views.counted(batch), mask, self._shaping)
        return self.accelerator.gather(selected).sum()  # type: ignore[no-any-return]

    def _record(
        self, batch: Mapping[str, Any], mode: str, shown: Tensor | None = None, found: Factors | None = None
    ) -> None:
        """Complete the rollouts of a batch; without a signal they have zeros in its place."""
        if not self._recorder.enabled:
            return
        response_mask = Sequences.of(batch).response_mask
        zeros = torch.zeros(response_mask.shape, dtype=torch.float32, device=response_mask.device)
        ones, nothing = torch.ones_like(zeros), zeros.sum(dim=1)
        self._recorder.complete(
            mode,
            batch["rollout_index"],
            batch["completion_ids"],
            batch["completion_mask"],
            response_mask,
            cos=zeros if shown is None else shown,
            psi=zeros if found is None else found.psi,
            factors=ones if found is None or self._shaping is None else found.factors,
            phi=nothing if found is None else found.phi,
            late_early=nothing + torch.nan if found is None else found.late_early,
        )

    # The loss.

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        mode = "train" if self.model.training else "eval"
        reads = self._reader is not None and "visual_factors" not in inputs
        compares = self._views is not None and (bool(self.args.view_coef) or reads)
        views = None
        if compares:
            assert self._views is not None
            views = self._views.compare(inputs, gradient=self.args.view_coef > 0, detach=bool(self.args.view_detach))
        reading = self._read(model, inputs, views) if reads else nullcontext()
        compute = self._trl_loss if self._shaping is None else self._shaped_loss
        self._loss_views, self._video_inputs = views, inputs.get(VIDEO_INPUTS)
        try:
            loss = compute(model, inputs, mode, reading)
        finally:
            self._loss_views = self._video_inputs = None
        if self.args.view_coef:
            loss = loss + self._view_term(inputs, views, mode)
        if mode == "train":
            self._loss_inputs = {**inputs, "logp": self._latest_logp, "loss": loss.detach()}
            if not loss.isfinite():
                self._break_off(self.state.global_step + 1, f"loss is {loss.item()}")
        return loss

    @contextmanager
    def _read(self, model: nn.Module, inputs: Mapping[str, Any], views: TwoViews | None) -> Iterator[VisualSignal]:
        """Read the signal of a batch from the pass of its loss in the block."""
        assert self._reader is not None
        with self._reader.read(model, *Sequences.of(inputs)) as signal:
            if views is not None:
                views.read_by(signal)
            yield signal

    def _trl_loss(
        self, model: nn.Module, inputs: dict[str, Any], mode: str, reading: AbstractContextManager[VisualSignal | None]
    ) -> Tensor:
        """TRL's loss as it is, with its metrics and its control of entropy; the signal is only looked at."""
        with reading as signal:
            loss: Tensor = super()._compute_loss(model, inputs)
        if signal is not None:
            self._signal_factors(inputs, signal, mode)
        logp, mask = self._latest_logp, Sequences.of(inputs).response_mask
        _, metrics = policy_loss(logp, rollout_logp(inputs, logp), inputs["advantages"], mask, ratio_clamp=None)
        self._log_policy({}, metrics, mode)
        return loss

    def _shaped_loss(
        self, model: nn.Module, inputs: dict[str, Any], mode: str, reading: AbstractContextManager[VisualSignal | None]
    ) -> Tensor:
        """TRL's loss on re-weighted advantages, by policy_loss."""
        sequence = Sequences.of(inputs)
        mask = sequence.response_mask
        with reading as signal, self._first_batch.watching(model):
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
        self._first_batch.passed(inputs, logp)
        if signal is None:
            factors, selected = inputs["visual_factors"], inputs.get("selected")
        else:
            if signal.wants_entropy:
                signal.take_entropy(entropy)
            found = self._signal_factors(inputs, signal, mode)
            factors = found.factors
            selected = found.selected if self._over_selected and isinstance(found, ShapedFactors) else None

        old = rollout_logp(inputs, logp)
        entropy_mask = None
        if self.top_entropy_quantile < 1.0:
            entropy_mask = self.get_high_entropy_mask(entropy, mask, 1 - self.top_entropy_quantile)
        advantages, weights = importance_weights(self, inputs, logp, old, mask, entropy_mask)
        loss, metrics = policy_loss(
            logp,
            old,
            advantages,
            mask,
            factors=factors,
            ref_logp=inputs.get("ref_per_token_logps"),
            entropy=entropy.detach(),  # for the metric; TRL's bonus has a denominator of its own
            importance_weights=weights,
            selected=selected,
            **denominators(self, inputs, mask, mode, selected),
            **loss_options(self),
        )
        self._log_policy(policy_records(self, inputs, logp, old, mask, metrics), metrics, mode)

        accumulated = self.current_gradient_accumulation_steps if mode == "train" else 1
        if self._entropy_bonus_enabled:
            self._log_bonus(loss.detach(), accumulated, mode)
            counted = mask if entropy_mask is None else mask * entropy_mask
            mean_entropy = (entropy * counted).sum() / counted.sum().clamp(min=1)
            loss = loss - self.entropy_coef * mean_entropy / accumulated
        if self.aux_loss_enabled:
            assert aux_loss is not None
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulated
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather(aux_loss.detach()).mean().item())
        return loss

    def _view_term(self, inputs: Mapping[str, Any], views: TwoViews | None, mode: str) -> Tensor:
        """Return the term of the loss that compares its two views; what is logged of it is."""
        assert self._views is not None and views is not None
        counted = self._views.counted(inputs)
        term, logged = view_term(self, inputs, views, counted, mode)
        add_records(self._metrics[mode], token_records(logged, counted, self.accelerator))
        return term

    # A run stops at a number that is not finite, before it is in a checkpoint, and leaves the batch that made it.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's; after the record is written, a gradient that is not finite ends the run.

        Raises:
            RunFailure: The norm of the gradient is not finite, where no loss scale is to be found by trying.
        """
        if self.log_completions and "wandb" in self.args.report_to:
            tell_in_words(self._logs)
        super().log(logs, start_time)
        if not math.isfinite(norm := float(logs.get("grad_norm", 0.0))) and not self.args.fp16:
            self._break_off(self.state.global_step, f"gradient's norm is {norm}")

    def _break_off(self, step: int, what: str) -> None:
        process = f"-{self.accelerator.process_index}" if self.accelerator.num_processes > 1 else ""
        path = Path(self.args.output_dir) / f"nonfinite-step-{step}{process}.safetensors"
        store_batch(path, self._loss_inputs, f"step {step}: {what}")
        raise RunFailure(f"step {step}: the {what}; its batch is in {path}")

    # Reading rows: one that cannot be read ends the run where its batch is reached.

    def _get_dataloader(self, dataset: Any, *rest: Any, **named: Any) -> Any:
        return super()._get_dataloader(readable(dataset), *rest, **named)

    def get_batch_samples(self, *arguments: Any, **named: Any) -> Any:
        """Trainer's; the rows of a stream are read here."""
        with reading(Exception if isinstance(self.train_dataset, IterableDataset) else DatasetError):
            return super().get_batch_samples(*arguments, **named)

    def evaluation_loop(self, *arguments: Any, **named: Any) -> Any:
        """Trainer's; a row of a stream that cannot be read ends the run in one line."""
        with reading(DatasetError):
            return super().evaluation_loop(*arguments, **named)

    # Records, through TRL's ordinary logging.

    def _log_policy(self, records: Mapping[str, float], metrics: Mapping[str, Tensor], mode: str) -> None:
        """Log TRL's metrics of the policy, where it has not done so itself, and ours."""
        for key, value in records.items():
            self._metrics[mode][key].append(value)
        add_records(self._metrics[mode], loss_records(metrics, self.accelerator, self._shaping is not None))

    def _log_bonus(self, loss: Tensor, accumulated: int, mode: str) -> None:
        """Log what TRL logs where an entropy bonus is added to the loss."""
        # TRL reads the loss before it is divided among the micro-batches, which a count of tokens has done already.
        if LOSS_TYPES[self.loss_type].average_over != "generation batch":
            loss = loss * accumulated
        self._metrics[mode]["policy_loss"].append(self.accelerator.gather(loss).nanmean().item())
        if mode == "train" and self.accelerator.sync_gradients:
            self._metrics[mode]["entropy_coef"].append(self.entropy_coef)

"""Passes of the policy over two views of a batch, its images as they are and spoilt, and the term of the loss of both.

How far the policy's distribution of a token is from the one without its image says how much the token needs the image.
That is the signal ``"dependency"``, and what PAPO (arXiv 2507.06448) maximises: ``-view_coef * KL`` in the loss. The
distribution of token t comes from the state before it, so the divergence there belongs to token t.

The other view is a pass of the decoder without its LM head. What differs in its inputs is made for a whole generation
batch, as another row's image must come from some other prompt; rows of it travel with the micro-batches. In the view
``"blind"`` the inputs are the same, and text does not attend to the images; what travels says where these are.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.trainer.utils import split_pixel_values_by_grid

from vgpo_kernels import policy_loss
from vgpo_kernels.integrations.methods import k3
from vgpo_kernels.integrations.transformers import (
    NoOtherImageError,
    blind_attention,
    reuse_vision_tower,
    spoilt_view,
)
from vgpo_trainer.config import VGPOTrainingConfig
from vgpo_trainer.fused_head import OURS, ViewCall, ViewOutput
from vgpo_trainer.methods import METHODS
from vgpo_trainer.signals import BLIND, Comparison, SignalBatch, ViewSignal, VisualSignal
from vgpo_trainer.signals.reader import image_positions
from vgpo_trainer.trl_loss import denominators
from vgpo_trainer.trl_surface import FORWARD_INPUTS, LOSS_TYPES, Sequences, WithoutEmptyImages

PREFIX = "view_"  # of what a batch keeps of its spoilt view
IMAGES_PER_ROW = {"num_images", "num_tiles"}
DRAWN = ("mask", "noise")  # kinds that are drawn anew for each image


class ViewPasses:
    """Spoils the images of generation batches as a run's settings say.

    Args:
        args: Of the run.
        model: The policy.
        visual_tokens: Ids of image and video tokens.
        process_index: Of this process: each spoils its own rows, differently.
        norm: The final norm or its name, for a model in which it is not found.
    """

    def __init__(
        self,
        args: VGPOTrainingConfig,
        model: nn.Module,
        visual_tokens: tuple[int, ...],
        process_index: int,
        norm: str | nn.Module | None = None,
    ) -> None:
        self._args = args
        self._model = model
        self._visual_tokens = visual_tokens
        self._process_index = process_index
        self._norm = norm
        self._warned = False
        self._groups: list[int] = []
        self._seed = 0
        self._made: dict[str, Any] | None = None  # of the generation batch that is being made

    def begin(self, groups: Tensor, step: int) -> None:
        """Begin a generation batch.

        Args:
            groups: Of its rows, ``[B]``.
            step: The number of optimisation steps before it; the same step of a run gives the same view, also after
                the run was resumed.
        """
        self._groups = groups.tolist()
        self._seed = random.Random(f"{self._args.seed} {step} {self._process_index}").getrandbits(31)
        self._made = None

    def spoil(self, sequence: Sequences, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return what differs in the spoilt view of the generation batch, by rows, under names that begin ``view_``.

        Nothing, where there is no image or, with ``"swap"``, no other one.

        Args:
            sequence: Its sequences.
            batch: Its further inputs, by TRL's names.
        """
        if self._made is None:
            self._made = self._spoil(sequence, batch)
        return self._made

    def end(self, sequence: Sequences, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the same, and forget it: pixels take memory."""
        made, self._made = self.spoil(sequence, batch), None
        return made

    def _spoil(self, sequence: Sequences, batch: Mapping[str, Any]) -> dict[str, Any]:
        kind: Any = self._args.view
        inputs: dict[str, Any] = {"input_ids": sequence.input_ids, "attention_mask": sequence.attention_mask}
        inputs |= {name: batch[name] for name in FORWARD_INPUTS if batch.get(name) is not None}
        if "pixel_values" not in inputs:
            return {}
        if kind == BLIND:
            return {PREFIX + BLIND: image_positions(*sequence, self._visual_tokens)}
        groups = self._groups if kind == "swap" else None
        try:
            spoilt = spoilt_view(
                inputs,
                kind,
                self._model,
                strength=self._args.view_strength,
                seed=self._seed,
                response_mask=sequence.response_mask,
                groups=groups,
            )
        except NoOtherImageError as error:
            if not self._warned:  # as in an evaluation, whose last batch may hold one prompt
                warnings.warn(f"{error}; such batches have neither a signal nor a term of view_coef", stacklevel=2)
            self._warned = True
            return {}
        rows: dict[str, Any] = split_pixel_values_by_grid(spoilt)
        batch_size = sequence.input_ids.shape[0]
        changed = {}
        for name in inputs.keys() - IMAGES_PER_ROW:
            if name not in spoilt:  # nothing in each row
                changed[name] = [None] * batch_size
            elif spoilt[name] is not inputs[name]:
                changed[name] = rows[name] if len(rows[name]) else [rows[name]] * batch_size
        if METHODS[self._args.method].view_of == "prompt" and kind in DRAWN and "pixel_values" in changed:
            drawn = _first_alike(self._groups, split_pixel_values_by_grid(inputs)["pixel_values"])
            pixels = changed["pixel_values"]
            changed["pixel_values"] = pixels[drawn] if isinstance(pixels, Tensor) else [pixels[row] for row in drawn]
        return {PREFIX + name: value for name, value in changed.items()}

    def compare(self, batch: Mapping[str, Any], reads: VisualSignal | None = None, **settings: Any) -> TwoViews:
        """Return what passes both views of a batch, which has what :meth:`spoil` returned.

        ``reads`` is the signal that reads what passes; ``settings`` are those of a :class:`TwoViews`.
        """

        def hide(images: Tensor) -> AbstractContextManager[None]:
            return blind_attention(self._model, images, norm=self._norm)

        views = TwoViews(batch, hide=hide, once=self._once, **settings)
        if reads is not None:
            views.read_by(reads)
        return views

    def _once(self) -> AbstractContextManager[None]:
        """Run the vision tower once for equal images in the block, where the model lets it be told apart."""
        has_tower = any(callable(getattr(part, "get_image_features", None)) for part in self._model.modules())
        return reuse_vision_tower(self._model) if has_tower else nullcontext()

    def counted(self, batch: Mapping[str, Any]) -> Tensor:
        """True at scored tokens of a batch that have seen an image of which there is a spoilt view, ``[B, T]``."""
        sequence = Sequences.of(batch)
        scored = sequence.response_mask.bool()
        images = image_positions(*sequence, self._visual_tokens)
        seen = SignalBatch(images, scored, sequence.attention_mask).seen()
        return scored & seen if has_view(batch) else torch.zeros_like(scored)


def has_view(batch: Mapping[str, Any]) -> bool:
    """Whether a batch has a spoilt view of its images."""
    return any(name.startswith(PREFIX) for name in batch)


class TwoViews:
    """Stands in for a model in TRL's pass: each call is of the next rows, and passes their spoilt view before them.

    Without a spoilt view it passes the rows as they are twice: processes that train together make the same passes.

    Args:
        batch: What :meth:`ViewPasses.spoil` returned, or a batch that has it.
        hide: Makes a block in which text does not attend to images, from their places ``[b, S]``.
        once: Makes a block in which equal images pass the vision tower once.
        gradient: Whether the divergence needs a gradient.
        detach: Whether none of it goes through the spoilt view.
        head: Whether TRL's pass is for log-probabilities; else the LM head serves the comparison alone.
    """

    def __init__(
        self,
        batch: Mapping[str, Any],
        *,
        hide: Callable[[Tensor], AbstractContextManager[None]],
        once: Callable[[], AbstractContextManager[None]],
        gradient: bool = False,
        detach: bool = False,
        head: bool = True,
    ) -> None:
        self._reads: VisualSignal | None = None  # what is read on the way, of the model as it is
        self._rows = {name.removeprefix(PREFIX): rows for name, rows in batch.items() if name.startswith(PREFIX)}
        self._images: Tensor | None = self._rows.pop(BLIND, None)
        self._hide, self._once = hide, once
        self._gradient = gradient
        self._detach = detach
        self._head = head
        self._passed = 0  # rows so far
        self._found: list[Any] = []

    def read_by(self, signal: VisualSignal) -> None:
        """Let a signal read what passes: the model as it is, or how both views differ."""
        self._reads = signal

    def of(self, model: Any, length: int) -> TwoViews:
        """Stand in for this model, in a pass over responses of this length."""
        self._model, self._length = model, length
        return self

    def __call__(self, labels: Tensor, fused_lm_head: bool, **inputs: Any) -> Any:
        """Run the decoder over the spoilt view, then the model."""
        with nullcontext() if self._images is None else self._once():
            return self._pass(labels, inputs)

    def _pass(self, labels: Tensor, inputs: dict[str, Any]) -> Any:
        rows = slice(self._passed, self._passed + labels.shape[0])
        self._passed = rows.stop
        spoilt = inputs | {name: _joined(value[rows]) for name, value in self._rows.items()}
        spoilt = {name: value for name, value in spoilt.items() if value is not None}
        call = {"labels": labels, "fused_lm_head": True}
        graph = torch.is_grad_enabled() and self._gradient and not self._detach
        hidden = nullcontext() if self._images is None else self._hide(self._images[rows])
        with torch.set_grad_enabled(graph), self._not_reading(), hidden:
            states = WithoutEmptyImages(self._model)(**spoilt, **call, view=ViewCall(self._length)).states
        # Releases of torch keep weights that autocast has cast without a graph for the pass that needs one.
        torch.clear_autocast_cache()
        measures = set(self._reads.measures) if isinstance(self._reads, ViewSignal) else set()
        measures |= {"kl"} if self._gradient else set()
        view = ViewCall(self._length, states, self._head, self._gradient, self._detach, tuple(sorted(measures)))
        output = self._model(**inputs, **call, view=view)
        if isinstance(self._reads, ViewSignal):
            self._reads.take(comparison(output))
        if self._gradient:
            self._found.append(output)
        if self._head:
            return output
        return SimpleNamespace(log_probs=labels.new_zeros(labels.shape, dtype=torch.float32))

    @contextmanager
    def _not_reading(self) -> Iterator[None]:
        """Let no signal be read in the block."""
        if self._reads is not None:
            self._reads.paused = True
        try:
            yield
        finally:
            if self._reads is not None:
                self._reads.paused = False

    def kl(self) -> Tensor:
        """KL(real view || spoilt view) of each token's distribution, ``[B, T]``, with its gradient; 0 at padding."""
        return torch.cat([output.kl for output in self._found])

    def k3(self) -> Tensor:
        """PAPO's estimate of it from the token that was sampled alone: ``exp(d) - d - 1`` of its log-ratio d."""
        logp = torch.cat([output.view_logp for output in self._found])
        other = torch.cat([output.other_logp for output in self._found])
        return k3(logp, other.detach() if self._detach else other)


def comparison(output: ViewOutput) -> Comparison:
    """Return what signals read of a head's output, detached."""
    found = {
        "logp": output.view_logp,
        "other_logp": output.other_logp,
        "kl": output.kl,
        "js": output.js,
        "entropy": output.view_entropy,
        "other_entropy": output.other_entropy,
    }
    return Comparison(**{name: None if value is None else value.detach() for name, value in found.items()})


def _first_alike(groups: Sequence[int], pixels: Sequence[Tensor]) -> list[int]:
    """Return for each row the first of its group that has the same pixels."""
    return [
        next(other for other in range(row + 1) if groups[other] == group and torch.equal(pixels[other], pixels[row]))
        for row, group in enumerate(groups)
    ]


def _joined(rows: Tensor | list[Any]) -> Tensor | None:
    """Join what rows have of an input; ``None``, where they have nothing."""
    if isinstance(rows, Tensor):
        return rows
    return None if rows[0] is None else torch.cat(rows)


def view_term(
    trainer: GRPOTrainer,
    inputs: Mapping[str, Any],
    views: TwoViews,
    counted: Tensor,  # [B, T]
    mode: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the term ``-view_coef * divergence`` of the loss, aggregated as the policy's, and what is logged of it.

    Args:
        trainer: Its settings say what the term is.
        inputs: TRL's batch.
        views: What passed.
        counted: Of :meth:`ViewPasses.counted`; the divergence of other scored tokens is 0.
        mode: ``"train"`` or ``"eval"``.
    """
    args, mask = trainer.args, Sequences.of(inputs).response_mask
    logged = {"view_kl": torch.where(counted, views.kl(), 0.0)}
    values = logged["view_kl"]
    if args.view_estimator == "k3":
        values = logged["view_k3"] = torch.where(counted, views.k3(), 0.0)
    if args.view_clamp is not None:
        logged["view_clamped"] = (values > args.view_clamp).float()
        values = values.clamp(max=args.view_clamp)
    nothing = torch.zeros_like(values)
    # What policy_loss subtracts from a token's loss, times a coefficient, it calls entropy.
    term = policy_loss(
        nothing,
        None,
        nothing[:, 0],
        mask,
        entropy=values,
        entropy_coef=args.view_coef,
        aggregation=LOSS_TYPES[trainer.loss_type].aggregation,
        **denominators(trainer, inputs, mask, mode),
    ).loss
    return term, {name: value.detach() for name, value in logged.items()}


def check_views(trainer: GRPOTrainer, head: str, norm: str | nn.Module | None = None) -> None:
    """Raise ValueError where two views of a batch cannot be compared: by the model, its wrapping or the settings.

    Args:
        trainer: After TRL has set it up.
        head: What :func:`~vgpo_trainer.fused_head.fuse_heads` returned.
        norm: The final norm or its name, for a model in which it is not found.
    """
    args = trainer.args
    if args.view == BLIND:
        if args.view_strength is not None:
            raise ValueError(f"view='blind' has no strength, got view_strength={args.view_strength}")
        with blind_attention(trainer.model, torch.zeros(1, 1, dtype=torch.bool), norm=norm):  # refuses a decoder
            pass
    else:
        spoilt_view({}, args.view, trainer.model, strength=args.view_strength)  # refuses a strength out of range
    asked = f"view_coef={args.view_coef}" if args.view_coef else f"signal={args.signal!r}"
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ValueError(f"{asked} is not supported with FSDP 1; set version: 2 in fsdp_config")
    if head != OURS:
        raise ValueError(
            f"{asked} compares distributions by linear_divergence, from hidden states and the LM head: it needs "
            f"fused_head=True and a model whose logits are no more than that; here {head} computes log-probabilities"
        )
    if trainer.aux_loss_enabled:
        raise ValueError(f"{asked} is not supported beside a router's loss; set router_aux_loss_coef=0")
    rows = args.per_device_train_batch_size * args.steps_per_generation
    if args.view == "swap" and trainer.num_generations % rows == 0:
        raise ValueError(
            f"view='swap' takes the image of another prompt, and the {rows} responses of a process's generation batch "
            f"are to one (num_generations={trainer.num_generations}): raise per_device_train_batch_size or "
            "steps_per_generation, or choose another view"
        )

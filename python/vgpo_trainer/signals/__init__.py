"""Visual signals: what the trainer reads from forward passes of the policy, and the factors that it becomes.

A signal is one number per response token, higher where the token leans on the images before it. It is a subclass of
:class:`VisualSignal` in a file of its own, and a line in :data:`SIGNALS`; everything else asks the table.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch

from vgpo_kernels import ShapingConfig, VGPOConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

# Name and class of every signal. The class is imported when it is asked for: a command line needs the names alone.
SIGNALS = {
    "focus": "vgpo_trainer.signals.focus:FocusSignal",
    "attention": "vgpo_trainer.signals.attention:AttentionSignal",
    "dependency": "vgpo_trainer.signals.dependency:DependencySignal",
    "similarity": "vgpo_trainer.signals.similarity:SimilaritySignal",
    "k3": "vgpo_trainer.signals.k3:K3Signal",
    "logp_change": "vgpo_trainer.signals.logp_change:LogpChangeSignal",
    "js": "vgpo_trainer.signals.js:JSSignal",
}

# The kinds of spoilt_view, for the same reason.
VIEWS = ("mask", "noise", "pixelation", "blank", "swap", "none")
# A view in which images are as they are and text does not attend to them.
BLIND = "blind"


def signal_class(name: str) -> type[VisualSignal]:
    """Return the class of a signal.

    Raises:
        ValueError: There is no signal of this name.
    """
    if name not in SIGNALS:
        raise ValueError(f"signal must be one of {', '.join(SIGNALS)}, got {name!r}")
    module, _, attribute = SIGNALS[name].partition(":")
    found: type[VisualSignal] = getattr(import_module(module), attribute)
    return found


def as_cosines(scores: Tensor, config: VGPOConfig | ShapingConfig) -> Tensor:
    """Return what to hand to ``visual_weights`` as cosines, so that the score that it makes of them is ``scores``.

    An offset that is left to the batch is 0 where no score is negative.
    """
    return 2 * scores - 1 if isinstance(config, VGPOConfig) and config.score == "affine" else scores


class SignalBatch(NamedTuple):
    """Where the images and responses of B sequences are.

    Attributes:
        image_mask: True at visual tokens, ``[B, S]``.
        response_mask: True at scored response tokens, ``[B, T]``: the last T positions.
        attention_mask: True at tokens, ``[B, S]``.
    """

    image_mask: Tensor
    response_mask: Tensor
    attention_mask: Tensor

    def seen(self) -> Tensor:
        """True at response positions with a visual token before them, ``[B, T]``."""
        images = self.image_mask.long()
        before = images.cumsum(dim=1) - images
        return before[:, before.shape[1] - self.response_mask.shape[1] :] > 0


@dataclass(frozen=True)
class SignalSettings:
    """What a signal is told once per run.

    Attributes:
        config: The settings that the signal's values are scored with.
        layers: Indices of layers, negative ones counted from the last; ``None``: all.
        norm: The model's final norm or its name, where it has to be told.
    """

    config: VGPOConfig | ShapingConfig
    layers: Sequence[int] | None = None
    norm: str | nn.Module | None = None

    def needs(self) -> tuple[str, ...]:
        """Return which signals the factors are made of: ``"visual"``, and ``"entropy"`` and ``"gap"`` beside it."""
        return self.config.needs() if isinstance(self.config, ShapingConfig) else ("visual",)


class VisualSignal(ABC):
    """The signal of one batch: made before the forward pass, filled while the pass runs, read after it.

    Args:
        batch: Where images and responses are.
        settings: Those of the run.
    """

    reads_layers: ClassVar[bool] = False  # whether ``signal_layers`` has a meaning

    def __init__(self, batch: SignalBatch, settings: SignalSettings) -> None:
        self.batch = batch
        self.settings = settings
        self.paused = False  # set in a block: passes of another view are not read
        self._rows = 0  # of the batch, read so far
        self._entropy: Tensor | None = None

    def next_rows(self, number: int) -> slice:
        """Return which rows of the batch the next ones are that a forward pass has reached."""
        self._rows += number
        return slice(self._rows - number, self._rows)

    def check_read(self, complaint: str) -> None:
        """Raise RuntimeError unless every row was read; ``complaint`` has places for ``{read}`` and ``{rows}``."""
        rows = self.batch.response_mask.shape[0]
        if self._rows != rows:
            raise RuntimeError(complaint.format(read=self._rows, rows=rows))

    @classmethod
    @abstractmethod
    def check(cls, model: nn.Module, settings: SignalSettings) -> None:
        """Raise TypeError or ValueError for a model that the signal cannot be read from, before any work is done."""

    @abstractmethod
    def capture(self, model: nn.Module) -> AbstractContextManager[object]:
        """Read every forward pass of the model in the block; a batch may pass in slices of its rows, in order."""

    @property
    def wants_entropy(self) -> bool:
        """Whether it is to be told the entropies of the pass that it is read in."""
        return "entropy" in self.settings.needs()

    def take_entropy(self, entropy: Tensor) -> None:
        """Take the entropies of the distributions that the batch's tokens were drawn from, in nats, ``[B, T]``."""
        self._entropy = entropy.detach()

    @property
    def others(self) -> dict[str, Tensor]:
        """What the factors need beside the visual signal, by name, ``[B, T]`` fp32.

        Raises:
            RuntimeError: The pass gave no entropies.
        """
        if not self.wants_entropy:
            return {}
        if self._entropy is None:
            raise RuntimeError("the entropies of the pass that the signal was read in were not handed over")
        return {"entropy": self._entropy.float()}

    @property
    @abstractmethod
    def values(self) -> Tensor:
        """The signal as ``visual_weights`` takes it, in place of cosines, ``[B, T]``, fp32.

        What it holds off the mask, and at tokens that have seen no image, is not read.

        Raises:
            RuntimeError: Not every row was read.
        """

    @property
    def shown(self) -> Tensor:
        """The signal as logs and rollouts show it, ``[B, T]``; by default :attr:`values`."""
        return self.values

    def marked_values(self) -> Tensor:
        """Return :attr:`values` with NaN at tokens that have seen no image, ``[B, T]``.

        An image changes nothing for the tokens before it. They have no signal, which is not the same as a signal of 0.
        Values that are not finite elsewhere become infinite, so that none is taken for the lack of a signal.
        """
        return self._mark_faults(self.values)

    def signals(self) -> dict[str, Tensor]:
        """Return what factors are made of, by name: of VGPO :attr:`values`, else :attr:`shown`; and :attr:`others`.

        The visual one is marked as in :meth:`marked_values`.
        """
        values = self.shown if isinstance(self.settings.config, ShapingConfig) else self.values
        return {"visual": self._mark_faults(values), **self.others}

    def marked_shown(self) -> Tensor:
        """Return :attr:`shown` with NaN at tokens that have seen no image and 0 off the mask, ``[B, T]``."""
        return self._mark(self.shown).masked_fill(~self.batch.response_mask.bool(), 0.0)

    def _mark_faults(self, values: Tensor) -> Tensor:
        return self._mark(values.masked_fill(~values.isfinite(), math.inf))

    def _mark(self, found: Tensor) -> Tensor:
        return found.masked_fill(~self.batch.seen(), math.nan)


class Comparison(NamedTuple):
    """What a pass of some rows in two views gave, of the distribution that each token was drawn from, ``[b, T]``.

    Detached, fp32, 0 at padding; ``None`` for what was not asked for.

    Attributes:
        logp: Log-probability of the token, with the images as they are.
        other_logp: The same in the spoilt view.
        kl: KL(the images as they are || the spoilt view), in nats, over the whole vocabulary.
        js: Jensen-Shannon divergence, likewise.
        entropy: Of the distribution with the images as they are, in nats.
        other_entropy: Of that in the spoilt view.
    """

    logp: Tensor | None = None
    other_logp: Tensor | None = None
    kl: Tensor | None = None
    js: Tensor | None = None
    entropy: Tensor | None = None
    other_entropy: Tensor | None = None


class ViewSignal(VisualSignal):
    """A signal that compares two views of a batch: the trainer passes both, and hands over how they differ."""

    compares: ClassVar[tuple[str, ...]] = ()  # fields of a Comparison that ``measure`` reads beside the log-probs

    def __init__(self, batch: SignalBatch, settings: SignalSettings) -> None:
        super().__init__(batch, settings)
        self._slices: list[dict[str, Tensor]] = []

    @classmethod
    def check(cls, model: nn.Module, settings: SignalSettings) -> None:
        """Nothing here: what two views need of a model and a run, the trainer checks, for its loss as well."""

    def capture(self, model: nn.Module) -> AbstractContextManager[object]:
        """Read nothing on the way."""
        return nullcontext()

    @abstractmethod
    def measure(self, found: Comparison) -> Tensor:
        """Return the visual signal of some rows, ``[b, T]``; what it says off the mask is not read."""

    @property
    def measures(self) -> tuple[str, ...]:
        """Which fields of a :class:`Comparison` are read, beside the log-probabilities, which are always there."""
        needs = self.settings.needs()
        entropy = ["entropy"] * ("entropy" in needs or "gap" in needs)
        return (*self.compares, *entropy, *["other_entropy"] * ("gap" in needs))

    def take(self, found: Comparison) -> None:
        """Take what a pass of the next b rows gave."""
        kept, needs = {"visual": self.measure(found)}, self.settings.needs()
        if "entropy" in needs:
            assert found.entropy is not None
            kept["entropy"] = found.entropy
        if "gap" in needs:
            assert found.entropy is not None and found.other_entropy is not None
            kept["gap"] = (found.other_entropy - found.entropy).abs()
        self.next_rows(kept["visual"].shape[0])
        self._slices.append({name: value.to(self.batch.response_mask.device) for name, value in kept.items()})

    @property
    def wants_entropy(self) -> bool:
        """No: that of the pass is among what is taken."""
        return False

    @property
    def others(self) -> dict[str, Tensor]:
        """The entropy, and the gap of both views' entropies, as far as they are needed."""
        return {name: self._joined(name) for name in ("entropy", "gap") if name in self.settings.needs()}

    @property
    def shown(self) -> Tensor:
        """The signal of all rows, ``[B, T]``, 0 off the mask.

        Raises:
            RuntimeError: The passes did not reach every row.
        """
        return self._joined("visual").masked_fill(~self.batch.response_mask.bool(), 0.0)

    def _joined(self, name: str) -> Tensor:
        self.check_read("{read} of {rows} responses passed in two views")
        return torch.cat([found[name] for found in self._slices])

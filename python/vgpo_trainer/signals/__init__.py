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

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vgpo_kernels import VGPOConfig

# Name and class of every signal. The class is imported when it is asked for: a command line needs the names alone.
SIGNALS = {
    "focus": "vgpo_trainer.signals.focus:FocusSignal",
    "attention": "vgpo_trainer.signals.attention:AttentionSignal",
    "dependency": "vgpo_trainer.signals.dependency:DependencySignal",
}

# The kinds of spoilt_view, for the same reason.
VIEWS = ("mask", "noise", "pixelation", "blank", "swap", "none")


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


def as_cosines(scores: Tensor, config: VGPOConfig) -> Tensor:
    """Return what to hand to ``visual_weights`` as cosines, so that the score that it makes of them is ``scores``.

    An offset that is left to the batch is 0 where no score is negative.
    """
    return 2 * scores - 1 if config.score == "affine" else scores


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
        layers: Indices of decoder layers, negative ones counted from the last; ``None``: all.
        norm: The model's final norm or its name, where it has to be told.
    """

    config: VGPOConfig
    layers: Sequence[int] | None = None
    norm: str | nn.Module | None = None


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
        values = self.values
        return self._mark(values.masked_fill(~values.isfinite(), math.inf))

    def marked_shown(self) -> Tensor:
        """Return :attr:`shown` with NaN at tokens that have seen no image and 0 off the mask, ``[B, T]``."""
        return self._mark(self.shown).masked_fill(~self.batch.response_mask.bool(), 0.0)

    def _mark(self, found: Tensor) -> Tensor:
        return found.masked_fill(~self.batch.seen(), math.nan)


class ViewSignal(VisualSignal):
    """A signal that compares two views of a batch: the trainer passes both, and hands over how they differ."""

    @classmethod
    def check(cls, model: nn.Module, settings: SignalSettings) -> None:
        """Nothing here: what two views need of a model and a run, the trainer checks, for its loss as well."""

    def capture(self, model: nn.Module) -> AbstractContextManager[object]:
        """Read nothing on the way."""
        return nullcontext()

    @abstractmethod
    def take(self, kl: Tensor) -> None:
        """Take KL(this view || the spoilt one) of the distributions of the next b rows' tokens, ``[b, T]``, detached.

        In nats, fp32, 0 at padding.
        """

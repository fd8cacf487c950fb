"""What the passes of a model over its responses say about each token: signals, and how much it needs the image.

Everything is read twice. *At the token*: the state of the token itself, which has read the token and predicts the next
one. *At the state* that predicted the token: one position earlier. A divergence belongs to a prediction, so at the
state it is that of the token's own prediction, and at the token that of the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from vgpo_kernels import VGPOConfig, linear_divergence, linear_logprob, visual_focus
from vgpo_kernels.integrations.transformers import spoilt_view, unwrap, visual_mask
from vgpo_trainer.fused_head import last_hidden_states, linear_head
from vgpo_trainer.probe.sampling import ProbeError, RolloutBatch
from vgpo_trainer.signals import SignalBatch, SignalSettings
from vgpo_trainer.signals.attention import AttentionSignal

VIEWS = ("swap", "blank", "noise")
SIGNALS = ("focus", "attention", "kl", "js", "k3", "logp change", "entropy")
PLACES = ("token", "state")
NOT_FINITE = "a signal of the model is not finite: {name} of {count} tokens"


class Key(NamedTuple):
    """A signal and where it is read."""

    signal: str
    place: str

    def __str__(self) -> str:
        return f"{self.signal} at the {self.place}"


KEYS = tuple(Key(signal, place) for signal in SIGNALS for place in PLACES)
DEPENDENCY = Key("kl", "state")


@dataclass
class Measured:
    """Numbers per token of B responses, on the CPU; what lies off the mask is 0.

    Attributes:
        mask: True at sampled tokens that were predicted with an image in view, ``[B, T]``, from the first column on.
        ids: Token ids, ``[B, T]``.
        groups: The prompt of each response, ``[B]``.
        signals: Each of :data:`KEYS`, fp32 ``[B, T]``.
        views: KL of each prediction to that with another view, by the name of the view, likewise.
        again: The same for a second swap, whose images come from other rows; ``None`` where there is none.
        energy: Squared norm of the gradient of a token's log-probability by the logits, likewise.
        seconds: Time that each part took, over all batches.
        rewards: ``[B]``, or ``None``.
        correct: Whether an answer is right, or ``None``.
    """

    mask: Tensor
    ids: Tensor
    groups: Tensor
    signals: dict[Key, Tensor]
    views: dict[str, Tensor]
    again: Tensor | None
    energy: Tensor
    seconds: dict[str, float]
    rewards: Tensor | None
    correct: list[bool] | None


class Head(NamedTuple):
    """A model's LM head, and what becomes of its products."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    def options(self, temperature: float) -> dict[str, Any]:
        """Keyword arguments of :func:`vgpo_kernels.linear_divergence` and :func:`vgpo_kernels.linear_logprob`."""
        return {
            "weight": self.weight,
            "bias": self.bias,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
            "temperature": temperature,
        }


def measure(
    model: Any,
    batches: Sequence[RolloutBatch],
    *,
    view: str = "swap",
    temperature: float = 1.0,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> Measured:
    """Read every signal of every response.

    Args:
        model: A vision-language model of transformers, in inference mode.
        batches: The responses, each batch with the images of two prompts at least.
        view: What the dependency is the divergence to, one of :data:`VIEWS`.
        temperature: That the responses were sampled with.
        layers: Decoder layers whose attention is averaged; by default all.
        seed: Of the views.

    Raises:
        ProbeError: No image token reached the model, or its logits are not what its LM head says.
        ValueError: A view that cannot be made of such inputs; attention that cannot be captured.
        TypeError: No final norm was found in the model.
    """
    head = read_head(model)
    parts: list[dict[str, Any]] = []
    clock = Clock(model.device)
    with torch.no_grad():
        for number, batch in enumerate(batches):
            reading = _Reading(model, head, batch, temperature, clock)
            if number == 0:
                reading.states()  # the first pass is no measure of time
                clock.seconds.clear()
            parts.append(reading.everything(view, layers, seed))
    return _joined(parts, batches, clock.seconds)


@dataclass
class Clock:
    """Adds up the time of named parts of the work, the work of a GPU included."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what runs in the block."""
        start = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


def read_head(model: Any) -> Head:
    """Return a model's LM head, with the scale and the cap of its logits; a few of them are compared.

    Raises:
        ProbeError: Its logits are not its hidden states times a linear head, scaled and capped as its configuration
            says.
    """
    inner: Any = unwrap(model)
    mapping, why_not = linear_head(inner, None)
    if why_not is not None:
        raise ProbeError(f"{why_not}: divergences cannot be computed from its hidden states")
    linear = inner.get_output_embeddings()
    return Head(linear.weight, linear.bias, *mapping)


def last_states(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Run the decoder without its head and return what the head would read, ``[B, S, D]``, with its gradient."""
    inner: Any = unwrap(model)
    return last_hidden_states(inner, inner.forward, None, **inputs, use_cache=False)


class _Reading:
    """The passes over one batch."""

    def __init__(self, model: Any, head: Head, batch: RolloutBatch, temperature: float, clock: Clock) -> None:
        self._model, self._head, self._batch, self._clock = model, head, batch, clock
        self._temperature = temperature
        self._ids: Tensor = batch.inputs["input_ids"]
        mask = batch.response_mask.bool().to(self._ids.device)
        self._mask, self._length = mask, mask.shape[1]
        attended = batch.inputs["attention_mask"].bool()
        if self._ids.shape[1] <= self._length:
            raise ProbeError(
                f"response_mask {list(mask.shape)} leaves no prompt of input_ids {list(self._ids.shape)}: "
                "the sequences must hold prompt and response"
            )
        images = visual_mask(self._ids, model, mask) & attended
        if not images.any():
            raise ProbeError("no image token reached the model: its processor left the images out of the prompts")
        # Tokens and the states that predicted them: one position more.
        wide = pad(mask, (1, 0)) | pad(mask, (0, 1))
        self._signal_batch = SignalBatch(images, wide, batch.inputs["attention_mask"])
        self._counted = mask & self._signal_batch.seen()[:, :-1]
        self._targets = self._ids[:, -self._length :].masked_fill(~mask, -100)

    def everything(self, view: str, layers: Sequence[int] | None, seed: int) -> dict[str, Any]:
        """Return all numbers of the batch, by the names of :class:`Measured`."""
        with self._clock("pass"):
            hidden = self.states()
        images, wide, _ = self._signal_batch
        with self._clock("focus"):
            focus = visual_focus(hidden, images, wide, visibility="causal")
        attention = AttentionSignal(self._signal_batch, SignalSettings(VGPOConfig.paper(), layers))
        with self._clock("pass with attention"), attention.capture(self._model):
            self.states()

        predicting = hidden[:, -self._length - 1 : -1]
        others = {}
        for kind in dict.fromkeys((view, *VIEWS)):
            others[kind] = self._divergence(predicting, kind, seed, exact=kind == view)
        again = self._divergence(predicting, "swap", seed + 1) if view == "swap" else None
        chosen = others[view]
        change = chosen.other_logp - chosen.logp
        signals: dict[Key, Tensor] = {}
        for name, value in (("focus", focus), ("attention", attention.shown)):
            signals[Key(name, "token")], signals[Key(name, "state")] = value[:, 1:], value[:, :-1]
        for name, value in (
            ("kl", chosen.kl),
            ("js", chosen.js),
            ("k3", change.clamp(max=20).exp() - 1 - change),
            ("logp change", change.abs()),
            ("entropy", chosen.entropy),
        ):
            signals[Key(name, "state")] = value
            signals[Key(name, "token")] = pad(value[:, 1:], (0, 1))  # of the next token, and nothing after the last
        return {
            "mask": self._counted,
            "ids": self._ids[:, -self._length :],
            "signals": {key: signals[key] for key in KEYS},
            "views": {kind: found.kl for kind, found in others.items()},
            "again": None if again is None else again.kl,
            "energy": self._energy(predicting),
        }

    def _divergence(self, predicting: Tensor, kind: str, seed: int, exact: bool = False) -> Any:
        """Compare the predictions with those of another view."""
        with self._clock("view" if exact else "other views"):
            groups = self._batch.groups if kind == "swap" else None
            inputs = spoilt_view(self._batch.inputs, kind, self._model, seed=seed, groups=groups)
            other = last_states(self._model, inputs)[:, -self._length - 1 : -1]
        measures = ("kl", "js", "entropy") if exact else ("kl",)
        with self._clock("divergence" if exact else "other divergences"):
            return linear_divergence(
                predicting,
                other,
                targets=self._targets,
                measures=measures,
                **self._head.options(self._temperature),
            )

    def _energy(self, predicting: Tensor) -> Tensor:
        """Squared norm of the gradient of log p by the logits, ``1 - 2 p + sum of p^2``."""
        options = self._head.options(self._temperature)
        found: Any = linear_logprob(predicting, targets=self._targets, return_sum_squares=True, **options)
        energy: Tensor = 1 - 2 * found.logp.exp() + found.sum_squares
        return energy.clamp(min=0) * self._mask

    def states(self) -> Tensor:
        """What the head would read, ``[B, S, D]``."""
        return last_states(self._model, self._batch.inputs)


def _joined(parts: list[dict[str, Any]], batches: Sequence[RolloutBatch], seconds: dict[str, float]) -> Measured:
    """Put batches of different lengths into one, and check that every counted number is finite.

    Raises:
        ProbeError: One is not.
    """
    length = max(part["mask"].shape[1] for part in parts)

    def join(select: Callable[[dict[str, Any]], Tensor]) -> Tensor:
        return torch.cat([pad(select(part).cpu(), (0, length - part["mask"].shape[1])) for part in parts])

    mask = join(lambda part: part["mask"])

    def numbers(name: str, select: Callable[[dict[str, Any]], Tensor]) -> Tensor:
        joined = join(select).float()
        broken = int((~joined.isfinite() & mask).sum())
        if broken:
            raise ProbeError(NOT_FINITE.format(name=name, count=broken))
        return joined.masked_fill(~mask, 0.0)

    rewards = [batch.rewards for batch in batches]
    verdicts = [batch.correct for batch in batches]
    return Measured(
        mask=mask,
        ids=join(lambda part: part["ids"]),
        groups=torch.cat([batch.groups.cpu() for batch in batches]),
        signals={key: numbers(str(key), lambda part, key=key: part["signals"][key]) for key in KEYS},
        views={kind: numbers(kind, lambda part, kind=kind: part["views"][kind]) for kind in parts[0]["views"]},
        again=None if parts[0]["again"] is None else numbers("the second swap", lambda part: part["again"]),
        energy=numbers("the gradient's energy", lambda part: part["energy"]),
        seconds=seconds,
        rewards=None
        if None in rewards
        else torch.cat([found.cpu().double() for found in rewards if found is not None]),
        correct=None if None in verdicts else [right for found in verdicts for right in found or []],
    )

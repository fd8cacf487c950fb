"""Visual focus of verl's micro-batches, and what its engines' passes are told and leave of visual signals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vgpo_kernels import checks, visual_focus
from vgpo_kernels.integrations.sequence_parallel import parallel_focus
from vgpo_kernels.integrations.surface import look_at_first_batch
from vgpo_kernels.integrations.transformers import visual_mask

FLAG = "calculate_visual_focus"
ALONE = "visual_focus_alone"  # without log-probs
FIELD = "visual_focus"
SECONDS = "visual_focus_seconds"  # a response's share of what its micro-batch took
# Of the other methods: the name, the signals that shape_tokens needs of it with commas between, the trainer's step.
METHOD, NEEDS, STEP = "visual_method", "visual_method_needs", "visual_method_step"


def field_of(signal: str) -> str:
    """Return the field of verl's model output that a method beside VGPO leaves one of its signals in."""
    return f"visual_method_{signal}"


def sampled_of_packed(input_ids: Any, response_mask: Any) -> Tensor:
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


def focus_of_packed(
    hidden: Tensor,
    input_ids: Any,
    model: Any,
    response_mask: Any,
    group: dist.ProcessGroup | None = None,
    *,
    pooling: Literal["mean", "unit_mean"] = "mean",
) -> Tensor:
    """Compute the focus of the tokens that the policy sampled in a nested batch of sequences (prompt and response).

    A token is compared with the images before it, those that tools have shown by then included. Visual tokens that the
    policy sampled itself are no image.

    Args:
        hidden: Last hidden states of the forward pass: packed ``[1, N (+ padding), D]``, or ``[B, S, D]`` padded
            to the right.
        input_ids: verl's nested token ids, B sequences of N tokens in all.
        model: The model, whose configuration names its visual tokens.
        response_mask: As for :func:`sampled_of_packed`.
        group: The ranks of Ulysses where they split the packed sequence evenly between them: ``[1, n, D]`` each.
        pooling: As in :func:`visual_focus`; ``"unit_mean"`` without ``group``.

    Returns:
        fp32 ``[N]``, on every rank of ``group``: cosines, 0 at tokens that were not sampled and NaN where no image was
        seen yet, **shifted one place to the left**, as verl stores log-probs, so that verl's own slicing finds the
        focus of token t where it finds the log-prob of token t.

    Raises:
        TypeError: ``response_mask`` is not nested.
        ValueError: The model's configuration names no visual token, or ranks share a mean of unit states.

    """
    if group is not None and pooling != "mean":
        raise ValueError(f"pooling={pooling!r} needs whole sequences, and the ranks of group have parts of them")
    ids, offsets, sampled, visual = _tokens(input_ids, model, response_mask, hidden.device)
    options: dict[str, Any] = {"visibility": "causal", "pooling": pooling}
    if group is not None:
        cos = parallel_focus(hidden[0], visual, sampled, cu_seqlens=offsets, visibility="causal", group=group)
    elif hidden.shape[0] == 1:
        cos = visual_focus(hidden[0, : ids.shape[0]], visual, sampled, cu_seqlens=offsets, **options)
    else:
        real = inside(hidden, offsets)
        images, answers = (torch.zeros_like(real).masked_scatter(real, mask) for mask in (visual, sampled))
        cos = visual_focus(hidden, images, answers, **options)[real]
    return cos.roll(-1)


def _tokens(input_ids: Any, model: Any, response_mask: Any, device: torch.device) -> tuple[Tensor, ...]:
    """Return a nested batch's ids ``[N]``, boundaries ``[B + 1]``, sampled tokens and images, bool ``[N]``."""
    sampled = sampled_of_packed(input_ids, response_mask).to(device)
    ids = input_ids.values().to(device)
    return ids, input_ids.offsets().to(device), sampled, visual_mask(ids, model, sampled)


def inside(hidden: Tensor, offsets: Tensor) -> Tensor:
    """Return True at the rows of states ``[B, S, D]``, padded right, that are no padding, ``[B, S]``."""
    return torch.arange(hidden.shape[1], device=hidden.device) < offsets.diff()[:, None]


class PackedTokens(NamedTuple):
    """The tokens of a nested micro-batch, B sequences of N tokens in all.

    Attributes:
        ids: ``[N]``.
        offsets: Boundaries, ``[B + 1]``.
        sampled: True at tokens that the policy sampled, ``[N]``.
        visual: True at the images' tokens, ``[N]``.

    """

    ids: Tensor
    offsets: Tensor
    sampled: Tensor
    visual: Tensor

    @classmethod
    def of(cls, micro_batch: Any, model: Any, device: torch.device) -> PackedTokens:
        """Read those of a micro-batch of verl's.

        Raises:
            TypeError: ``response_mask`` is not nested.
            ValueError: The model's configuration names no visual token.

        """
        return cls(*_tokens(micro_batch["input_ids"], model, micro_batch["response_mask"], device))

    def marked(self, signal: Tensor) -> Tensor:
        """Mark a signal ``[N]``, shifted one place to the left: 0 at tokens that were not sampled.

        NaN at those with no image before them, and infinite where it is not finite for another reason.
        """
        before = self.visual.long().cumsum(0) - self.visual.long()
        lengths = self.offsets.diff()
        # Where a sequence begins, what is before it is none of its own.
        own = nn.functional.pad(before, (0, 1))[self.offsets[:-1]]
        seen = before > own.repeat_interleave(lengths, output_size=len(self.ids))
        sampled, seen = (mask.roll(-1).to(signal.device) for mask in (self.sampled, seen))
        signal = signal.masked_fill(~signal.isfinite(), math.inf).masked_fill(~seen, math.nan)
        return signal.masked_fill(~sampled, 0.0)


def look(engine: Any, hidden: Tensor, micro_batch: Any, log_probs: Any) -> None:
    """Look at the first micro-batch of a worker: its states, masks, and the log-probs that verl computed."""
    if getattr(engine, "vgpo_looked", False):
        return
    engine.vgpo_looked = True
    ids, offsets, sampled, visual = PackedTokens.of(micro_batch, engine.module, hidden.device)
    temperature = setting(micro_batch, "temperature", None)
    known = log_probs is not None and isinstance(temperature, float)  # not one for each response
    look_at_first_batch(
        "VGPO's first micro-batch",
        model_or_head=engine.module,
        hidden=hidden[0, : len(ids)] if hidden.shape[0] == 1 else hidden[inside(hidden, offsets)],
        ids=ids,
        # verl's are shifted to the left.
        old_logp=log_probs.values().roll(1).to(hidden.device) if known else None,
        visual_mask=visual if bool(visual.any()) else None,
        response_mask=sampled,
        cu_seqlens=offsets,
        temperature=temperature if known else 1.0,
    )


def nested_outputs(cos: Tensor, input_ids: Any, seconds: float) -> dict[str, Tensor]:
    """Return what a micro-batch adds to verl's model output: the focus, and the time that it took.

    Args:
        cos: Of :func:`focus_of_packed`, ``[N]``.
        input_ids: verl's nested token ids, B sequences of N tokens in all.
        seconds: What the micro-batch took.

    """
    offsets = input_ids.offsets().to(cos.device)
    return {FIELD: torch.nested.nested_tensor_from_jagged(cos, offsets)} | nested_seconds(seconds, offsets)


def nested_seconds(seconds: float, offsets: Tensor) -> dict[str, Tensor]:
    """Return each response's share of the time that a micro-batch took, as a nested field of verl's model output."""
    rows = len(offsets) - 1
    share = torch.full((rows,), seconds / rows, device=offsets.device)
    return {SECONDS: torch.nested.nested_tensor_from_jagged(share, torch.arange(rows + 1, device=offsets.device))}


def asked(micro_batch: Any, flag: str) -> bool:
    """Whether a flag of a micro-batch is set."""
    return bool(setting(micro_batch, flag, False))


def setting(micro_batch: Any, key: str, default: Any) -> Any:
    """Return what a micro-batch says that is no tensor."""
    from verl.utils.tensordict_utils import get_non_tensor_data

    return get_non_tensor_data(data=micro_batch, key=key, default=default)


def clock(tensor: Tensor) -> Callable[[], float]:
    """Return a function that returns the seconds since now, those of the tensor's GPU or NPU where it is on one."""
    if tensor.device.type == "cpu":
        began = time.perf_counter()
        return lambda: time.perf_counter() - began
    module = torch.get_device_module(tensor.device)
    start, end = (module.Event(enable_timing=True) for _ in range(2))
    start.record()

    def stop() -> float:
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return stop

"""Visual focus in the forward pass of verl's FSDP engine, for log-probs or by itself."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vgpo_kernels import checks, visual_focus
from vgpo_kernels.integrations.sequence_parallel import parallel_focus
from vgpo_kernels.integrations.surface import look_at_first_batch, require
from vgpo_kernels.integrations.transformers import capture_hidden_states, unwrap, visual_mask
from vgpo_kernels.integrations.verl.losses import KNOWN

FLAG = "calculate_visual_focus"
ALONE = "visual_focus_alone"  # without log-probs
FIELD = "visual_focus"
SECONDS = "visual_focus_seconds"  # a response's share of what its micro-batch took


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
    hidden: Tensor, input_ids: Any, model: Any, response_mask: Any, group: dist.ProcessGroup | None = None
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

    Returns:
        fp32 ``[N]``, on every rank of ``group``: cosines, 0 at tokens that were not sampled and NaN where no image was
        seen yet, **shifted one place to the left**, as verl stores log-probs, so that verl's own slicing finds the
        focus of token t where it finds the log-prob of token t.

    Raises:
        TypeError: ``response_mask`` is not nested.
        ValueError: The model's configuration names no visual token.

    """
    ids, offsets, sampled, visual = _tokens(input_ids, model, response_mask, hidden.device)
    if group is not None:
        cos = parallel_focus(hidden[0], visual, sampled, cu_seqlens=offsets, visibility="causal", group=group)
    elif hidden.shape[0] == 1:
        cos = visual_focus(hidden[0, : ids.shape[0]], visual, sampled, cu_seqlens=offsets, visibility="causal")
    else:
        inside = _inside(hidden, offsets)
        images, answers = (torch.zeros_like(inside).masked_scatter(inside, mask) for mask in (visual, sampled))
        cos = visual_focus(hidden, images, answers, visibility="causal")[inside]
    return cos.roll(-1)


def _tokens(input_ids: Any, model: Any, response_mask: Any, device: torch.device) -> tuple[Tensor, ...]:
    """Return a nested batch's ids ``[N]``, boundaries ``[B + 1]``, sampled tokens and images, bool ``[N]``."""
    sampled = sampled_of_packed(input_ids, response_mask).to(device)
    ids = input_ids.values().to(device)
    return ids, input_ids.offsets().to(device), sampled, visual_mask(ids, model, sampled)


def _inside(hidden: Tensor, offsets: Tensor) -> Tensor:
    """Return True at the rows of states ``[B, S, D]``, padded right, that are no padding, ``[B, S]``."""
    return torch.arange(hidden.shape[1], device=hidden.device) < offsets.diff()[:, None]


def change_fsdp(transformer_impl: ModuleType) -> None:
    """Make verl's FSDP engine, and those that inherit from it, compute the focus when they are asked to.

    Raises:
        UnknownSurfaceError: The engine's methods are not those of the known versions.

    """
    engine: Any = require(transformer_impl, "FSDPEngineWithLMHead", (), KNOWN)
    score_focus(engine, transformer_impl)


def score_focus(engine: type, transformer_impl: ModuleType) -> None:
    """Make an FSDP engine of verl compute the focus in its forward pass when ``calculate_visual_focus`` is set.

    With ``visual_focus_alone`` the pass computes nothing else: it leaves out the LM head, but for one position.

    Args:
        engine: The class, whose ``forward_step`` is replaced, once.
        transformer_impl: The module it is defined in.

    Raises:
        UnknownSurfaceError: The engine's methods are not those of the known versions.

    """
    forward_step = require(engine, "forward_step", ("self", "micro_batch", "loss_function", "forward_only"), KNOWN)
    require(engine, "prepare_model_inputs", ("self", "micro_batch"), KNOWN)
    for name in ("get_device_name", "get_device_id"):
        require(transformer_impl, name, (), KNOWN)
    if getattr(forward_step, "scores_visual_focus", False):
        return

    def decoder_pass(self: Any, micro_batch: Any) -> tuple[Tensor, dict[str, Any]]:
        inputs, _ = self.prepare_model_inputs(micro_batch=micro_batch.to(transformer_impl.get_device_id()))
        dtype = getattr(self, "_autocast_dtype", torch.bfloat16)
        lower = nullcontext() if dtype == torch.float32 else torch.autocast(transformer_impl.get_device_name(), dtype)
        with lower:
            self.module(**inputs, use_cache=False)
        return torch.ones(()), {"model_output": {}, "loss": 1.0, "metrics": {}}

    @functools.wraps(forward_step)
    def with_focus(self: Any, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        if not asked(micro_batch, FLAG):
            return forward_step(self, micro_batch, loss_function, forward_only)
        # verl's fused kernels put a forward pass in the model's place that always computes log-probs.
        alone = asked(micro_batch, ALONE) and not asked(micro_batch, "use_fused_kernels")
        with capture_hidden_states(self.module) as captured:
            if alone:
                with _head_of_one_row(self.module):
                    loss, output = decoder_pass(self, micro_batch)
            else:
                loss, output = forward_step(self, micro_batch, loss_function, forward_only)
        group = self.ulysses_parallel_group if getattr(self, "use_ulysses_sp", False) else None
        input_ids = micro_batch["input_ids"]
        if group is None and not getattr(self, "vgpo_looked", False):
            self.vgpo_looked = True
            _look(captured.hidden, micro_batch, self.module, output["model_output"].get("log_probs"))
        stop = clock(captured.hidden)
        cos = focus_of_packed(captured.hidden, input_ids, self.module, micro_batch["response_mask"], group)
        seconds = stop()
        output["model_output"] |= nested_outputs(cos, input_ids, seconds)
        return loss, output

    with_focus.scores_visual_focus = True  # type: ignore[attr-defined]
    engine.forward_step = with_focus  # type: ignore[attr-defined]


def _look(hidden: Tensor, micro_batch: Any, model: Any, log_probs: Any) -> None:
    """Look at the first micro-batch of a worker: its states, masks, and the log-probs that verl computed."""
    tokens = _tokens(micro_batch["input_ids"], model, micro_batch["response_mask"], hidden.device)
    ids, offsets, sampled, visual = tokens
    temperature = _of_micro_batch(micro_batch, "temperature", None)
    known = log_probs is not None and isinstance(temperature, float)  # not one for each response
    look_at_first_batch(
        "VGPO's first micro-batch",
        model_or_head=model,
        hidden=hidden[0, : len(ids)] if hidden.shape[0] == 1 else hidden[_inside(hidden, offsets)],
        ids=ids,
        # verl's are shifted to the left.
        old_logp=log_probs.values().roll(1).to(hidden.device) if known else None,
        visual_mask=visual if bool(visual.any()) else None,
        response_mask=sampled,
        cu_seqlens=offsets,
        temperature=temperature if known else 1.0,
    )


@contextmanager
def _head_of_one_row(model: Any) -> Iterator[None]:
    """Let the LM head compute the logits of the last position alone, whatever forward pass verl gave the model."""
    whole: Any = unwrap(model)
    head = whole.get_output_embeddings()
    before, forward = vars(head).get("forward"), head.forward
    head.forward = lambda states: forward(states[:, -1:])
    try:
        yield
    finally:
        del head.forward
        if before is not None:
            head.forward = before


def nested_outputs(cos: Tensor, input_ids: Any, seconds: float) -> dict[str, Tensor]:
    """Return what a micro-batch adds to verl's model output: the focus, and the time that it took.

    Args:
        cos: Of :func:`focus_of_packed`, ``[N]``.
        input_ids: verl's nested token ids, B sequences of N tokens in all.
        seconds: What the micro-batch took.

    """
    offsets = input_ids.offsets().to(cos.device)
    rows = len(offsets) - 1
    share = cos.new_full((rows,), seconds / rows)
    return {
        FIELD: torch.nested.nested_tensor_from_jagged(cos, offsets),
        SECONDS: torch.nested.nested_tensor_from_jagged(share, torch.arange(rows + 1, device=cos.device)),
    }


def asked(micro_batch: Any, flag: str) -> bool:
    return bool(_of_micro_batch(micro_batch, flag, False))


def _of_micro_batch(micro_batch: Any, key: str, default: Any) -> Any:
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

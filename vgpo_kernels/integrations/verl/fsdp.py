"""Visual signals in the forward pass of verl's FSDP engine: visual focus, for log-probs or by itself, and others."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vgpo_kernels.integrations.surface import require
from vgpo_kernels.integrations.transformers import capture_hidden_states, unwrap
from vgpo_kernels.integrations.verl.losses import KNOWN
from vgpo_kernels.integrations.verl.scoring import (
    ALONE,
    FLAG,
    METHOD,
    asked,
    clock,
    focus_of_packed,
    look,
    nested_outputs,
    setting,
)
from vgpo_kernels.integrations.verl.signals import pass_with_signals


def change(transformer_impl: ModuleType) -> None:
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
        if setting(micro_batch, METHOD, ""):
            return pass_with_signals(self, micro_batch, forward_step, decoder_pass)
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
        if group is None:
            look(self, captured.hidden, micro_batch, output["model_output"].get("log_probs"))
        stop = clock(captured.hidden)
        cos = focus_of_packed(captured.hidden, input_ids, self.module, micro_batch["response_mask"], group)
        seconds = stop()
        output["model_output"] |= nested_outputs(cos, input_ids, seconds)
        return loss, output

    with_focus.scores_visual_focus = True  # type: ignore[attr-defined]
    engine.forward_step = with_focus  # type: ignore[attr-defined]


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

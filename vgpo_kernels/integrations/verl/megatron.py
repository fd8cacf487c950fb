"""Visual focus in the forward pass of verl's Megatron engine, for log-probs or by itself.

Megatron spreads a micro-batch over ranks: the last pipeline stage has the final norm, context parallel ranks have parts
of every sequence, and tensor parallel ranks parts of those (sequence parallelism). Where a rank's rows stand is asked
of verl's own preprocessing, which splits the tokens' numbers here as it splits their ids. So the focus follows every
layout that log-probs have, fused or not, and no hidden state leaves its rank.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vgpo_kernels.integrations.sequence_parallel import parallel_focus
from vgpo_kernels.integrations.surface import require
from vgpo_kernels.integrations.transformers import capture_hidden_states, unwrap, visual_mask
from vgpo_kernels.integrations.verl.losses import KNOWN
from vgpo_kernels.integrations.verl.scoring import ALONE, FLAG, asked, clock, nested_outputs, sampled_of_packed

PARAMETERS = ("self", "batch_iter", "model", "logits_processor_func", "postprocess_micro_batch_func")


def refusals(config: Any) -> list[str]:
    """Return why the Megatron engine cannot compute the focus under verl's configuration, a reason each.

    Args:
        config: verl's, of any trainer.

    """
    if config.actor_rollout_ref.actor.megatron.get("dynamic_context_parallel", False):
        return [
            "actor_rollout_ref.actor.megatron.dynamic_context_parallel=true, with which verl itself runs no "
            "vision-language model; context_parallel_size works"
        ]
    return []


def change(transformer_impl: ModuleType) -> None:
    """Make verl's Megatron engine compute the focus when it is asked to.

    Raises:
        UnknownSurfaceError: The engine's methods are not those of the known versions.

    """
    engine: Any = require(transformer_impl, "MegatronEngineWithLMHead", (), KNOWN)
    score_focus(engine)


def score_focus(engine: type) -> None:
    """Make a Megatron engine of verl compute the focus in its forward pass when ``calculate_visual_focus`` is set.

    The focus stands beside the log-probs in the model output: on the last pipeline stage alone, with the same bits on
    each of its ranks that share a batch. With ``visual_focus_alone`` the pass leaves out the LM head.

    Args:
        engine: The class, whose ``forward_step`` is replaced, once.

    Raises:
        UnknownSurfaceError: The engine's methods are not those of the known versions.

    """
    forward_step = require(engine, "forward_step", PARAMETERS, KNOWN)
    require(engine, "_get_context_parallel_layout", ("unwrapped_model",), KNOWN)
    if getattr(forward_step, "scores_visual_focus", False):
        return

    @functools.wraps(forward_step)
    def with_focus(
        self: Any, batch_iter: Iterator[Any], model: Any, logits_processor_func: Any, postprocess_micro_batch_func: Any
    ) -> Any:
        batch = next(batch_iter)
        step = functools.partial(
            forward_step, self, iter((batch,)), model, logits_processor_func, postprocess_micro_batch_func
        )
        whole: Any = unwrap(model)
        if not asked(batch, FLAG) or not whole.post_process:
            return step()
        language = getattr(whole, "language_model", whole)
        with ExitStack() as during:
            captured = during.enter_context(capture_hidden_states(whole, norm=_final_norm(language)))
            if asked(batch, ALONE):
                during.enter_context(_without_head({whole, language}))
            output, postprocess = step()
        stop = clock(captured.hidden)
        cos = _focus(self, whole, captured.hidden, batch)
        output = {} if asked(batch, ALONE) else output
        return output | nested_outputs(cos, batch["input_ids"], stop()), postprocess

    with_focus.scores_visual_focus = True  # type: ignore[attr-defined]
    engine.forward_step = with_focus  # type: ignore[attr-defined]


def _final_norm(language: Any) -> nn.Module:
    """Return the module whose output the LM head reads, in the last pipeline stage."""
    decoder: nn.Module = language.decoder
    # With multi-token prediction in a stage of its own, the norm is in the stage before, and no layer in this decoder.
    return decoder if decoder.final_layernorm is None else decoder.final_layernorm  # type: ignore[return-value]


@contextmanager
def _without_head(models: set[Any]) -> Iterator[None]:
    """Let models end with their final norm, as those of other pipeline stages end without it."""
    for model in models:
        model.post_process = False
    try:
        yield
    finally:
        for model in models:
            model.post_process = True


def _focus(engine: Any, whole: Any, hidden: Tensor, batch: Any) -> Tensor:
    """Compute the focus of the tokens that the policy sampled, as :func:`scoring.focus_of_packed` does.

    Args:
        engine: verl's engine.
        whole: Its model, without wrappers.
        hidden: This rank's rows of the last hidden states, ``[S, B, D]``.
        batch: The micro-batch, B sequences of N tokens in all.

    Returns:
        fp32 ``[N]``, shifted one place to the left.

    Raises:
        TypeError: ``response_mask`` is not nested.
        ValueError: verl's preprocessing makes other rows than the model has, or the model's configuration names no
            visual token.

    """
    from megatron.core import parallel_state

    input_ids = batch["input_ids"].to(hidden.device)
    ids, offsets = input_ids.values(), input_ids.offsets()
    sampled = sampled_of_packed(input_ids, batch["response_mask"].to(hidden.device))
    numbers = _numbers(engine, whole, batch, offsets)
    group = parallel_state.get_context_parallel_group()
    if whole.config.sequence_parallel:
        group = parallel_state.get_tensor_and_context_parallel_group()
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        numbers = numbers.chunk(ranks, dim=1)[parallel_state.get_tensor_model_parallel_rank()]
    states = hidden.transpose(0, 1)
    if numbers.shape != states.shape[:2]:
        raise ValueError(
            f"this rank has hidden states [S, B, D] {list(hidden.shape)} of a micro-batch that verl's preprocessing "
            f"lays out as [B, S] {list(numbers.shape)}"
        )
    inside = numbers > 0
    cos = parallel_focus(
        states[inside],
        visual_mask(ids, engine.model_config.hf_config, sampled),
        sampled,
        positions=numbers[inside] - 1,
        group=group,
        cu_seqlens=offsets,
        visibility="causal",
    )
    return cos.roll(-1)


def _numbers(engine: Any, whole: Any, batch: Any, offsets: Tensor) -> Tensor:
    """Return which token of the micro-batch stands where among a context parallel rank's rows.

    Args:
        engine: verl's engine.
        whole: Its model, without wrappers.
        batch: The micro-batch, B sequences of N tokens in all.
        offsets: Boundaries of the sequences, ``[B + 1]``.

    Returns:
        int64 ``[B, S]``, packed ``[1, S]``: 1 to N, and 0 at padding.

    """
    from verl.models.mcore import util
    from verl.utils.tensordict_utils import get_non_tensor_data

    tokens = torch.arange(1, int(offsets[-1]) + 1, device=offsets.device)
    numbers = torch.nested.nested_tensor_from_jagged(tokens, offsets)
    settings = engine.engine_config
    padding = {"use_fp8_padding": whole.config.fp8 in ("e4m3", "hybrid")}
    preprocessed: Any
    if settings.use_remove_padding:
        preprocessed = util.preprocess_thd_engine(
            numbers,
            pad_to_length_bucket=settings.pad_to_length_bucket if settings.pad_to_length else None,
            cp_layout=engine._get_context_parallel_layout(whole),
            **padding,
        )
    else:
        longest = get_non_tensor_data(data=batch, key="forced_max_seqlen", default=None)
        preprocessed = util.preprocess_bshd_engine(numbers, forced_max_seqlen=longest, **padding)
    rows: Tensor = preprocessed[0]
    return rows

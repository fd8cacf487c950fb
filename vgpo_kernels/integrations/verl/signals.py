"""Signals of the methods beside VGPO, in the FSDP engine's pass for log-probs and one more of another view."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vgpo_kernels import linear_divergence
from vgpo_kernels.integrations.methods import Method, k3
from vgpo_kernels.integrations.transformers import capture_hidden_states, capture_layer_mean, unwrap
from vgpo_kernels.integrations.verl.methods import METHODS
from vgpo_kernels.integrations.verl.scoring import (
    ALONE,
    METHOD,
    NEEDS,
    STEP,
    PackedTokens,
    asked,
    clock,
    field_of,
    focus_of_packed,
    inside,
    look,
    nested_seconds,
    setting,
)
from vgpo_kernels.integrations.verl.second_views import hidden_images, quiet, spoilt_images, text_alone, without_images


def pass_with_signals(
    engine: Any, micro_batch: Any, forward_step: Callable[..., Any], decoder_pass: Callable[..., Any]
) -> Any:
    """Compute log-probs as the engine does, and a method's signals beside them.

    Args:
        engine: verl's FSDP engine.
        micro_batch: verl's, which names the method, the signals that it needs and the trainer's step.
        forward_step: The engine's own, of ``(engine, micro_batch, loss_function, forward_only)``.
        decoder_pass: Runs the engine's model over ``(engine, micro_batch)`` and returns no log-probs.

    Returns:
        What ``forward_step`` returns, with a nested field for each signal in its model output, shifted one place to
        the left as log-probs are. NaN in the visual one where no image was seen yet, infinite where it is not finite.

    """
    model, name = engine.module, setting(micro_batch, METHOD, "")
    needs, step = setting(micro_batch, NEEDS, "visual").split(","), setting(micro_batch, STEP, 0)
    method = METHODS[name]
    layers: Any = nullcontext()
    if method.signal == "similarity":

        def reduce(hidden: Tensor) -> Tensor:
            ids, mask = micro_batch["input_ids"], micro_batch["response_mask"]
            return focus_of_packed(hidden, ids, model, mask, pooling="unit_mean")

        layers = capture_layer_mean(model, reduce)
    with capture_hidden_states(model) as captured, layers as reduced:
        loss, output = forward_step(engine, micro_batch, None, True)
    found, hidden = output["model_output"], captured.hidden
    tokens = PackedTokens.of(micro_batch, model, hidden.device)
    if not getattr(engine, "use_ulysses_sp", False):
        look(engine, hidden, micro_batch, found.get("log_probs"))

    signals, seconds = {}, None
    if method.view is None:
        signals["visual"] = reduced.mean
    else:
        stop = clock(hidden)
        if method.signal == "js":
            with _in_the_head(model, hidden, tokens, _temperatures(micro_batch, tokens)) as compared:
                decoder_pass(engine, spoilt_images(quiet(micro_batch), method, model, step))
            signals |= compared
        else:
            logp = found["log_probs"].values()
            other = _other_log_probs(engine, micro_batch, tokens, method, step, forward_step).to(logp.device)
            signals["visual"] = k3(logp, other) if method.signal == "k3" else (logp - other).abs()
        seconds = stop()
    signals["visual"] = tokens.marked(signals["visual"])
    if "entropy" in needs and "entropy" not in signals:
        if found.get("entropy", None) is None:
            raise RuntimeError(f"method={name} needs the entropies of the pass, and calculate_entropy was not set")
        signals["entropy"] = found["entropy"].values()
    if asked(micro_batch, ALONE):
        found.clear()
    offsets = tokens.offsets
    for signal in needs:
        values = signals[signal].to(offsets.device).float()
        found[field_of(signal)] = torch.nested.nested_tensor_from_jagged(values, offsets)
    return loss, output if seconds is None else output | {"model_output": found | nested_seconds(seconds, offsets)}


def _other_log_probs(
    engine: Any,
    micro_batch: Any,
    tokens: PackedTokens,
    method: Method,
    step: int,
    forward_step: Callable[..., Any],
) -> Tensor:
    """Return the log-probs of another view, ``[N]``, shifted to the left."""
    during: AbstractContextManager[None] = nullcontext()
    if method.view == "none":
        other, during = without_images(micro_batch, tokens.visual), text_alone(engine.module)
    elif method.view == "blind":
        other, during = quiet(micro_batch), hidden_images(engine.module, micro_batch, tokens.visual)
    else:
        other = spoilt_images(micro_batch, method, engine.module, step)
    with during:
        _, output = forward_step(engine, other, None, True)
    found: Tensor = output["model_output"]["log_probs"].values()
    if method.view != "none":
        return found
    # Each log-prob beside its token, there where that token is with the images.
    kept = ~tokens.visual
    whole = found.new_zeros(kept.shape)
    whole[kept.to(found.device)] = found.roll(1)
    return whole.roll(-1)


def _temperatures(micro_batch: Any, tokens: PackedTokens) -> float | Tensor:
    """Return the temperature, or one for each of N tokens where responses have their own."""
    temperature = micro_batch["temperature"]
    if not isinstance(temperature, Tensor) or temperature.numel() == 1:
        return float(temperature)
    of_rows = temperature.to(tokens.offsets.device).float()
    return of_rows.repeat_interleave(tokens.offsets.diff(), output_size=len(tokens.ids))


@contextmanager
def _in_the_head(
    model: nn.Module, hidden: Tensor, tokens: PackedTokens, temperature: float | Tensor
) -> Iterator[dict[str, Tensor]]:
    """Compare the distributions of two views while the LM head runs, where FSDP has gathered its weight.

    The head is handed the other view's states; it returns the logits of one position.

    Args:
        model: The engine's.
        hidden: States of the view with the images as they are, packed ``[1, N (+ padding), D]`` or ``[B, S, D]``.
        tokens: The N tokens.
        temperature: A number, or one for each token.

    Yields:
        Where the divergence, the entropy and the entropies' gap will be, each ``[N]``, shifted to the left.

    """
    whole: Any = unwrap(model)
    head = whole.get_output_embeddings()
    found: dict[str, Tensor] = {}
    predict = tokens.sampled.roll(-1)

    def of_tokens(states: Tensor) -> Tensor:
        rows = states[0, : len(tokens.ids)] if states.shape[0] == 1 else states[inside(states, tokens.offsets)]
        return rows[predict]

    def forward(states: Tensor) -> Tensor:
        apart = linear_divergence(
            of_tokens(hidden),
            of_tokens(states),
            head.weight,
            bias=head.bias,
            temperature=temperature if isinstance(temperature, float) else temperature[predict],
            measures=("js", "entropy", "other_entropy"),
        )
        assert apart.js is not None and apart.entropy is not None and apart.other_entropy is not None
        values = (apart.js.clamp(min=0.0), apart.entropy, (apart.other_entropy - apart.entropy).abs())
        for name, value in zip(("visual", "entropy", "gap"), values, strict=True):
            found[name] = value.new_zeros(predict.shape).masked_scatter(predict, value)
        return plain(states[:, -1:])  # type: ignore[no-any-return]

    before, plain = vars(head).get("forward"), head.forward
    head.forward = forward
    try:
        yield found
    finally:
        del head.forward
        if before is not None:
            head.forward = before

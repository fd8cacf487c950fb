"""The mean over layers of what is made of their hidden states, of which none is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vgpo_kernels import checks
from vgpo_kernels.integrations.attention_capture import resolve_layers
from vgpo_kernels.model_surface import decoder_of, final_norm


class CapturedLayerMean:
    """The means over layers of the forward passes inside a :func:`capture_layer_mean` block."""

    def __init__(self) -> None:
        self._passes: list[Tensor] = []

    @property
    def passes(self) -> list[Tensor]:
        """The mean of every forward pass so far, in order."""
        return list(self._passes)

    @property
    def mean(self) -> Tensor:
        """The mean of the one forward pass, in the shape that ``reduce`` returns.

        Raises:
            RuntimeError: No forward pass went through the decoder, or more than one did.

        """
        if len(self._passes) != 1:
            raise RuntimeError(
                f"{len(self._passes)} forward passes went through the decoder inside capture_layer_mean, so `mean` is "
                "ambiguous; read `passes`"
                if self._passes
                else "no forward pass went through the decoder inside capture_layer_mean"
            )
        return self._passes[0]


@contextmanager
def capture_layer_mean(
    model: nn.Module,
    reduce: Callable[[Tensor], Tensor],
    *,
    layers: Sequence[int] | None = None,
    norm: str | nn.Module | None = None,
) -> Iterator[CapturedLayerMean]:
    """Reduce the hidden states of each layer as they pass, and average over layers: no layer's states are kept.

    PEPO's visual similarity is the mean over all layers of a token's cosines with its image's tokens::

        with capture_layer_mean(
            model, lambda hidden: visual_focus(hidden, images, response_mask, pooling="unit_mean")
        ) as captured:
            logits = model(**inputs).logits
        similarity = captured.mean  # [B, T]

    Gradients are untouched: ``reduce`` gets detached states, without autograd. Recomputation under gradient
    checkpointing is not captured again.

    Args:
        model: A model of transformers, wrapped or not, as for :func:`capture_hidden_states`.
        reduce: Called in every forward pass with the hidden states ``[B, S, D]`` of each layer; returns a tensor of the
            same shape and dtype for each. A batch that is scored in slices is reduced slice by slice.
        layers: Which of the ``hidden_states`` that transformers would return, by index: 0 enters the first layer, i is
            what layer i of L puts out, and the last, L or -1, comes after the final norm. Default: all L + 1.
        norm: The final norm, as for :func:`capture_hidden_states`.

    Yields:
        The captured means; ``.mean`` is that of the one pass.

    Raises:
        TypeError: The model has no final norm or no list of decoder layers beside it, or ``reduce`` cannot be called.
        ValueError: A layer is out of range, or a pass leaves one out or reaches it twice.

    """
    checks.function("reduce", reduce)
    _, decoder = decoder_of(model, norm)
    modules = decoder_layers(decoder)
    chosen = set(range(len(modules) + 1) if layers is None else resolve_layers(layers, len(modules) + 1))
    captured = CapturedLayerMean()
    under_way: list[_Pass] = []

    def add(index: int, hidden: Any) -> None:
        if under_way and index in chosen:
            under_way[-1].add(index, hidden, reduce)

    def enter(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        under_way.append(_Pass())

    def leave(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        ended = under_way.pop() if under_way else None
        if ended is not None and output is not None:  # None: the pass raised
            captured._passes.append(ended.mean(chosen))

    def before_first(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        add(0, arguments[0] if arguments else options["hidden_states"])

    def after(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            add(index, output[0] if isinstance(output, tuple) else output)

        return hook

    ends = [*modules[:-1], final_norm(model, norm)]
    hooks = [
        decoder.register_forward_pre_hook(enter),
        modules[0].register_forward_pre_hook(before_first, with_kwargs=True),
        *(module.register_forward_hook(after(index)) for index, module in enumerate(ends, start=1)),
        decoder.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()


def decoder_layers(decoder: nn.Module) -> list[nn.Module]:
    """Return the layers of a decoder in order: its longest list of modules.

    Raises:
        TypeError: It has none.

    """
    lists: list[nn.ModuleList] = [
        module for module in decoder.children() if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        raise TypeError(f"{type(decoder).__name__}, the module of the final norm, has no list of decoder layers")
    longest = max(lists, key=len)
    return list(longest)


class _Pass:
    """The sum over layers of a pass that is under way."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.reached: list[int] = []

    def add(self, index: int, hidden: Tensor, reduce: Callable[[Tensor], Tensor]) -> None:
        hidden = hidden.detach()
        with torch.no_grad():
            value = reduce(hidden.full_tensor() if hasattr(hidden, "full_tensor") else hidden)
            if not isinstance(value, Tensor):
                raise TypeError(f"reduce must return a tensor, got {type(value).__name__}")
            self.total = value if self.total is None else self.total + value
        self.reached.append(index)

    def mean(self, chosen: set[int]) -> Tensor:
        if sorted(self.reached) != sorted(chosen) or self.total is None:
            raise ValueError(
                f"a forward pass reached the layers {self.reached} where {sorted(chosen)} were expected, once each: "
                "they are skipped, repeated, or compiled before"
            )
        return self.total / len(chosen)

"""Following a decoder's forward passes: which tokens each has, and how layers are given an attention function.

What a layer's queries and keys are is known from outside of it only: how many tokens a pass has, how many its cache
held, and which of them. Nothing here is guessed: a cache that is not recognised, or that keeps other keys than the
last ones, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor

from vgpo_kernels.integrations.surface import UnknownSurfaceError, known, require

# Where transformers defines the caches whose layers keep all keys, or the last ones of a window.
CACHES = "transformers.cache_utils"


class CapturedFunction(partial[Any]):
    """An attention function inside a capture's; its first argument is the function it stands for."""


def plain_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the attention function inside those of captures."""
    while isinstance(function, CapturedFunction):
        function = function.args[0]
    return function


_LOCK = Lock()
_CAPTURES: list[Callable[..., Any]] = []  # those of the blocks that are open, in the order they were opened
_FOUND_BY: list[Callable[..., Any]] = []  # transformers' own look-up, while it is replaced


def _find(registry: Any, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
    function: Callable[..., Any] = _FOUND_BY[0](registry, attn_implementation, default)
    for capture in tuple(_CAPTURES):
        function = CapturedFunction(capture, function, attn_implementation)
    return function


@contextmanager
def looked_up_by(capture: Callable[..., Any]) -> Iterator[None]:
    """Let every layer of transformers that asks for its attention function inside the block get ``capture`` of it.

    Args:
        capture: Called with the function, its name, and the arguments of the layer's call.

    Raises:
        UnknownSurfaceError: Layers of this transformers ask for it in another way.

    """
    from transformers import AttentionInterface

    interface: Any = AttentionInterface
    with _LOCK:
        if not _CAPTURES:
            _FOUND_BY[:] = [
                require(interface, "get_interface", ("attn_implementation", "default"), known("transformers"))
            ]
            interface.get_interface = _find
        _CAPTURES.append(capture)
    try:
        yield
    finally:
        with _LOCK:
            _CAPTURES.remove(capture)
            if not _CAPTURES:
                interface.get_interface = _FOUND_BY[0]


@dataclass
class Pass:
    """A forward pass of the decoder that is under way.

    Attributes:
        decoder: Name of the decoder's class.
        tokens: Number of tokens in the pass.
        cache: The cache that the decoder was handed, or ``None`` if there is none that this adapter recognises.
        tokens_before: Number of tokens in the cache.
        sequence: Number of the sequence that the pass begins or goes on with.
        reordered: Whether rows of the cache were exchanged since the pass before.
        reached: The chosen layers whose attention has been computed.

    """

    decoder: str
    tokens: int
    cache: Any
    tokens_before: int
    sequence: int
    reordered: bool
    reached: set[int] = field(default_factory=set)

    def check_keys(self, layer: int, key: Tensor) -> None:
        """Refuse keys that cannot be told to be those of which tokens.

        Raises:
            UnknownSurfaceError: There are others than those of the pass, and no cache that they come from.
            ValueError: The cache has dropped keys, and may not have dropped the first ones.

        """
        keys, total = key.shape[2], self.tokens_before + self.tokens
        if self.cache is None and keys != self.tokens:
            raise UnknownSurfaceError(
                f"{self.decoder} attends to {keys} keys in a pass of {self.tokens} tokens, and no argument of it is a "
                f"cache that tells how many tokens came before: this adapter knows {known('transformers')}"
            )
        if keys < total and not all(type(one).__module__ == CACHES for one in getattr(self.cache, "layers", [self])):
            raise ValueError(
                f"the cache of layer {layer} of {self.decoder} ({type(self.cache).__name__}) keeps {keys} of {total} "
                "keys, and not the last ones as far as is known: their tokens cannot be told"
            )


class Follower:
    """Tells which passes go on with one another: those that share a cache."""

    def __init__(self) -> None:
        self._sequence = -1
        self._total = 0  # tokens of the sequence after the last pass
        self._cache: Callable[[], Any] = lambda: None
        self.reordered = False

    def begin(self, decoder: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> Pass:
        """Return the pass that a decoder begins with these arguments."""
        values = (*arguments, *options.values())
        cache = next((value for value in values if callable(getattr(value, "get_seq_length", None))), None)
        before = 0 if cache is None else int(cache.get_seq_length())
        embeds = options.get("inputs_embeds")
        ids = embeds if embeds is not None else options.get("input_ids")
        if ids is None:
            ids = next((value for value in values if isinstance(value, Tensor)), None)
        if ids is None:
            raise UnknownSurfaceError(f"{decoder} is called without tokens: this adapter knows {known('transformers')}")
        known_cache = self._cache()
        goes_on = before > 0 and (cache is known_cache or (known_cache is None and before == self._total))
        if not goes_on:
            self._sequence += 1
            self.reordered = False
        self._total = before + ids.shape[1]
        if cache is not None and cache is not known_cache:
            self._cache = ref(cache)
            self._watch(cache)
        elif cache is None:
            self._cache = lambda: None
        return Pass(decoder, ids.shape[1], cache, before, self._sequence, self.reordered)

    def _watch(self, cache: Any) -> None:
        if not callable(getattr(cache, "reorder_cache", None)):
            return
        _WATCHED.setdefault(cache, []).append(self)
        # A method, so that a copy of the cache gets one of its own.
        cache.reorder_cache = MethodType(_reorder_noticed, cache)

    def let_go(self) -> None:
        """Leave the caches that were watched as they were."""
        for cache, followers in list(_WATCHED.items()):
            followers[:] = [one for one in followers if one is not self]
            if not followers:
                del _WATCHED[cache], cache.reorder_cache


# The caches in which beam search is noticed when it exchanges rows, and by whom.
_WATCHED: WeakKeyDictionary[Any, list[Follower]] = WeakKeyDictionary()


def _reorder_noticed(cache: Any, *arguments: Any, **options: Any) -> Any:
    for follower in _WATCHED.get(cache, ()):
        follower.reordered = True
    return type(cache).reorder_cache(cache, *arguments, **options)

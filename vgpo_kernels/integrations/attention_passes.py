"""Follows a decoder's forward passes: which tokens each pass has, and how layers get an attention function.

Which tokens the queries and keys of a layer belong to is only known outside the layer: how many tokens the pass has,
how many the cache held, and which ones. A cache that is not recognised, or that keeps other keys than the last ones,
raises an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from vgpo_kernels.integrations.surface import UnknownSurfaceError, known, require

# Where transformers defines the caches whose layers keep all keys, or the last ones of a window.
CACHES = "transformers.cache_utils"


class CapturedFunction(partial[Any]):
    """A capture's attention function; its first argument is the function that it calls."""


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
    """Make ``capture`` the attention function of every layer of transformers inside the block.

    Args:
        capture: Called with the function, its name, and the arguments of the layer's call.

    Raises:
        UnknownSurfaceError: In this release of transformers, layers look up their attention function in another way.

    """
    from transformers import AttentionInterface, Cache, EncoderDecoderCache

    interface: Any = AttentionInterface
    with _LOCK:
        if not _CAPTURES:
            _FOUND_BY[:] = [
                require(interface, "get_interface", ("attn_implementation", "default"), known("transformers"))
            ]
            interface.get_interface = _find
            _count_exchanges((Cache, EncoderDecoderCache))
        _CAPTURES.append(capture)
    try:
        yield
    finally:
        with _LOCK:
            _CAPTURES.remove(capture)
            if not _CAPTURES:
                interface.get_interface = _FOUND_BY[0]
                for kind, name, plain in _COUNTED:
                    setattr(kind, name, plain)
                _COUNTED.clear()


# How often the rows of a cache were exchanged while a block was open, as beam search does; and the methods that count.
_EXCHANGES: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
_COUNTED: list[tuple[type, str, Callable[..., Any]]] = []


def _count_exchanges(kinds: Iterable[type]) -> None:
    """Let these classes of caches count; the caller holds the lock."""
    counted = {(kind, name) for kind, name, _ in _COUNTED}
    for kind in kinds:
        for name in ("reorder_cache", "batch_select_indices"):
            if name in vars(kind) and (kind, name) not in counted:
                _COUNTED.append((kind, name, vars(kind)[name]))
                setattr(kind, name, _counting(vars(kind)[name]))


def _counting(plain: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)
    def exchange(self: Any, *arguments: Any, **options: Any) -> Any:
        with _LOCK:
            _EXCHANGES[self] = _EXCHANGES.get(self, 0) + 1
        return plain(self, *arguments, **options)

    return exchange


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
        own = getattr(self.cache, "self_attention_cache", self.cache)  # of an encoder-decoder
        layers = getattr(own, "layers", None)
        if keys < total and (layers is None or not all(type(one).__module__ == CACHES for one in layers)):
            raise ValueError(
                f"the cache of layer {layer} of {self.decoder} ({type(self.cache).__name__}) keeps {keys} of {total} "
                "keys, and it is not known which: their attention cannot be assigned to tokens"
            )


class Follower:
    """Tells which passes go on with one another: those that share a cache."""

    def __init__(self) -> None:
        self._number = 0  # of sequences
        self._last = -1  # the sequence of the last pass
        # Of each cache its sequence, how often its rows had been exchanged, and whether they were between its passes.
        self._known: WeakKeyDictionary[Any, tuple[int, int, bool]] = WeakKeyDictionary()

    def begin(self, decoder: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> Pass:
        """Return the pass that a decoder begins with these arguments.

        Raises:
            UnknownSurfaceError: There are no tokens among them.

        """
        values = (*arguments, *options.values())
        cache = _cache_of(values)
        before = 0 if cache is None else int(cache.get_seq_length())
        embeds = options.get("inputs_embeds")
        ids = embeds if embeds is not None else options.get("input_ids")
        if ids is None:
            ids = next((value for value in values if isinstance(value, Tensor)), None)
        if ids is None:
            raise UnknownSurfaceError(f"{decoder} is called without tokens: this adapter knows {known('transformers')}")
        reordered = False
        if before > 0 and cache in self._known:
            self._last, exchanges, reordered = self._known[cache]
            reordered = reordered or _exchanges(cache) != exchanges
        else:
            self._last, self._number = self._number, self._number + 1
        self._follow(cache, reordered)
        return Pass(decoder, ids.shape[1], cache, before, self._last, reordered)

    def end(self, output: Any) -> None:
        """Follow the cache that a decoder made itself, which its output hands over."""
        cache = None if output is None else _cache_of(output.values() if isinstance(output, Mapping) else output)
        if cache is not None and cache not in self._known:
            self._follow(cache, False)

    def _follow(self, cache: Any, reordered: bool) -> None:
        if cache is None:
            return
        if cache not in self._known:
            with _LOCK:  # a class of its own, perhaps
                _count_exchanges(type(cache).__mro__)
        self._known[cache] = (self._last, _exchanges(cache), reordered)


def _cache_of(values: Any) -> Any:
    """Return the cache among values, whatever its name; ``None`` without one."""
    values = values if isinstance(values, Iterable) and not isinstance(values, Tensor) else ()
    return next((value for value in values if callable(getattr(value, "get_seq_length", None))), None)


def _exchanges(cache: Any) -> int:
    with _LOCK:
        return _EXCHANGES.get(cache, 0)

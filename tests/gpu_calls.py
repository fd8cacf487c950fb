"""Calls on a GPU: captured into a graph, on a stream of their own, watched for synchronisation; marks of such tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch

from vgpo_kernels import backends

Result = TypeVar("Result")


def is_hopper() -> bool:
    """Return whether the first GPU is one of NVIDIA's of compute capability 9.0."""
    gpu = torch.cuda.is_available() and torch.version.cuda is not None
    return gpu and torch.cuda.get_device_capability() == (9, 0)


def has_hopper_kernels() -> bool:
    """Return whether the first GPU runs the kernels for Hopper that the extension has."""
    built = backends.describe()["extension"]
    return built is not None and built["hopper"] and is_hopper()


NEEDS_HOPPER_KERNELS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_hopper_kernels(), reason="needs a Hopper GPU and an extension built for it"),
]


def captured(call: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Capture a call; its result is there once the graph is replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def without_synchronising(call: Callable[[], Any]) -> None:
    """Make a call that raises where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_a_sleeping_stream(call: Callable[[], Result]) -> Result:
    """Call on a stream that first sleeps; the result must not be there before the stream gets to it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        result = call()
        assert not stream.query(), "the call waited for its stream, or ran elsewhere"
    stream.synchronize()
    return result

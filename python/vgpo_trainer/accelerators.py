"""The device that a model computes on here, and its name: a GPU of NVIDIA's or Apple's, or what else torch knows."""

from __future__ import annotations

import torch


def best_device() -> torch.device:
    """Return the accelerator of this machine, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def device_name(device: torch.device) -> str:
    """Return what a device calls itself, or its type in capitals where it has no name (CPUs, Apple's GPUs).

    Args:
        device: Of a type that torch has here.

    """
    name_of = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(name_of(device)) if name_of else device.type.upper()

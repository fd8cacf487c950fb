"""SIMD levels as they are measured: with a PyTorch that uses no wider registers either.

Rows of a level below the best stand for machines that have no better one, so PyTorch is held to the same instructions.
Its libraries read these settings when they are first used: a process measures one level. Import this before torch.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# What holds PyTorch's own kernels, MKL and oneDNN to the instructions of a level; above them there is nothing to hold.
LIMITS = {
    "portable": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}
# From the simplest. The last is avx512 on processors that multiply bfloat16 in hardware, with a PyTorch that does so.
LEVELS = ("portable", "neon", "neon-bf16", "avx2", "avx512", "avx512, AMX")


def hold_torch() -> None:
    """Hold PyTorch to the level that VGPO_SIMD names, if it names one below the best."""
    level = os.environ.get("VGPO_SIMD", "")
    if level not in LIMITS:
        return
    os.environ.update(LIMITS[level])
    # Code that torch.compile made for wider registers lies in its cache.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"vgpo_inductor_{level}"))


def parts_of(device: str) -> tuple[str, str]:
    """Split the name of a device into its machine and its level, which is empty where it is none of these."""
    for level in sorted(LEVELS, key=len, reverse=True):
        if device.endswith(f", {level}"):
            return device.removesuffix(f", {level}"), level
    return device, ""


def is_best(device: str) -> bool:
    """Whether rows of a device stand for its machine, not for others that have less."""
    return parts_of(device)[1] not in LIMITS


def rank(device: str) -> int:
    """Say how good the level of a device is."""
    _, level = parts_of(device)
    return LEVELS.index(level) if level else -1

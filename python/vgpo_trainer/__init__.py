"""Train vision-language models with VGPO on TRL, and the demo, the report and the ``vgpo`` command around it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Loaded when asked for: TRL takes seconds to import, and `vgpo --help` should not.
_LAZY = {
    "Inspection": "reports.inspection",
    "RolloutSample": "rollouts",
    "TokenView": "reports.tokens",
    "VGPOTrainer": "trainer",
    "VGPOTrainingConfig": "config",
    "inspect_answer": "inspection",
    "load_demo_model": "demo.warm_start",
    "show_tokens": "reports.tokens",
}
__all__ = [
    "Inspection",
    "RolloutSample",
    "TokenView",
    "VGPOTrainer",
    "VGPOTrainingConfig",
    "inspect_answer",
    "load_demo_model",
    "show_tokens",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)

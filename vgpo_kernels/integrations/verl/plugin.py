"""Change modules of verl when verl imports them, so that installing this library costs other runs of verl nothing."""

from __future__ import annotations

import importlib.abc
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from vgpo_kernels.integrations.surface import UnknownSurfaceError
from vgpo_kernels.integrations.verl import fsdp, losses, megatron, run, separate_trainers, trainers

PACKAGE = "vgpo_kernels.integrations.verl"

# What is done to a module of verl once it has been imported.
CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "verl.trainer.ppo.core_algos": losses.register,
    "verl.workers.engine.fsdp.transformer_impl": fsdp.change,
    "verl.workers.engine.megatron.transformer_impl": megatron.change,
    "verl.trainer.ppo.v1.trainer_base": trainers.change,
    "verl.trainer.ppo.ray_trainer": separate_trainers.refuse_legacy,
    "verl.experimental.separation.ray_trainer": separate_trainers.change,
}


def attach() -> None:
    """Change the modules of ``CHANGES`` that are imported already, and the others when they are. Once per process.

    Raises:
        UnknownSurfaceError: A module is not that of the known versions, and ``VERL_USE_EXTERNAL_MODULES`` names this
            package. Where verl found it by its entry point, the run may not want VGPO: an error is logged instead, and
            runs with ``algorithm.vgpo`` are refused.

    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name in CHANGES:
        if name in sys.modules:
            _change(sys.modules[name])


def _change(module: ModuleType) -> None:
    try:
        CHANGES[module.__name__](module)
    except UnknownSurfaceError as error:
        if PACKAGE in os.environ.get("VERL_USE_EXTERNAL_MODULES", ""):
            raise
        run.unknown.append(error)
        logging.getLogger(PACKAGE).error("VGPO does not know this verl, so it refuses algorithm.vgpo: %s", error)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules of verl as they would be found without it, and has them changed after they have run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in CHANGES:
            return None
        for finder in sys.meta_path:
            find_spec: Any = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec(name, path, target) if find_spec is not None else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """A module's own loader, and what comes after it."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        _change(module)

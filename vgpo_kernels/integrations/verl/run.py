"""What a run of verl is asked about VGPO before it samples anything, and what it is told."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch

import vgpo_kernels
from vgpo_kernels import ShapingConfig, VGPOConfig, backends
from vgpo_kernels.integrations.surface import UnknownSurfaceError
from vgpo_kernels.integrations.transformers import final_norm, visual_token_ids
from vgpo_kernels.integrations.verl import losses, megatron, methods, second_views
from vgpo_kernels.integrations.verl.scoring import ALONE, FIELD, FLAG, METHOD, NEEDS, STEP, field_of

# verl's strategies whose engines compute the focus: FSDP's, those that inherit its forward pass, and Megatron's.
SCORED = ("fsdp", "fsdp2", "fsdp_turbo", "veomni", "megatron")
SWITCH = "+algorithm.vgpo.preset=paper"

# What could not be changed in this process, because it is of another verl.
unknown: list[UnknownSurfaceError] = []


class Switch(NamedTuple):
    """What the configuration of a run says about VGPO.

    Attributes:
        config: The settings of the factors.
        bypass: verl makes no old-log-prob pass, so the signal needs one of its own.
        method: Whose factors they are.

    """

    config: VGPOConfig | ShapingConfig
    bypass: bool
    method: str = "vgpo"

    def fields(self) -> dict[str, str]:
        """Return where workers leave each signal: the field of verl's model output by the signal's name."""
        if isinstance(self.config, VGPOConfig):
            return {"visual": FIELD}
        return {name: field_of(name) for name in self.config.needs()}

    def flags(self, step: int) -> dict[str, Any]:
        """Return what a pass is told that reads the signals, by verl's way to tell a pass something.

        Args:
            step: Number of the trainer's step, which second views are drawn by.

        """
        alone = {ALONE: True} if self.bypass else {}
        if isinstance(self.config, VGPOConfig):
            return {FLAG: True, **alone}
        needs = self.config.needs()
        return {METHOD: self.method, NEEDS: ",".join(needs), STEP: step, **alone}


def switch(config: Any) -> Switch | None:
    """Read verl's configuration; None if it does not ask for VGPO.

    Args:
        config: verl's, of any trainer.

    Raises:
        TypeError: ``algorithm.vgpo`` is no mapping, or a setting has the wrong type.
        UnknownSurfaceError: Something of this verl could not be changed.
        ValueError: A setting is unknown or out of range, ``loss_mode`` names VGPO and nothing re-weights advantages, or
            the engine computes no focus, or distillation drops the advantages.

    """
    actor = config.actor_rollout_ref.actor
    settings: Any = config.algorithm.get("vgpo", None)
    loss_mode = actor.policy_loss.get("loss_mode", "vanilla")
    if settings is None:
        if loss_mode in losses.LOSS_MODES:
            raise ValueError(
                f"actor.policy_loss.loss_mode={loss_mode} without algorithm.vgpo is plain PPO: set {SWITCH}, or choose "
                "one of verl's own losses"
            )
        return None
    if actor.strategy not in SCORED:
        raise ValueError(
            f"actor_rollout_ref.actor.strategy={actor.strategy} does not work with algorithm.vgpo: visual focus is "
            f"computed by verl's engines {', '.join(SCORED)}"
        )
    refused = megatron.refusals(config) if actor.strategy == "megatron" else []
    if refused:
        raise ValueError(f"algorithm.vgpo does not work with {'; '.join(refused)}")
    distillation: Any = config.get("distillation", None)
    if distillation and distillation.enabled and not distillation.distillation_loss.use_task_rewards:
        raise ValueError(
            "distillation.distillation_loss.use_task_rewards=false drops the advantages, which algorithm.vgpo would "
            "re-weight: leave out one of them"
        )
    _refuse_unknown()
    correction = config.algorithm.get("rollout_correction", None) or {}
    method, factors = methods.method_from(settings)
    refused = methods.refusals(config, method)
    if refused:
        raise ValueError(f"algorithm.vgpo.method={method} does not work with {'; '.join(refused)}")
    return Switch(factors, bool(correction.get("bypass_mode", False)), method)


def _refuse_unknown() -> None:
    if unknown:
        raise UnknownSurfaceError("; ".join(map(str, unknown)))


def start(config: Any, found: Switch, groups: Iterable[Any]) -> None:
    """Attach VGPO in the workers of a run, and print what it does.

    Args:
        config: verl's.
        found: Of :func:`switch`.
        groups: verl's worker groups.

    Raises:
        RuntimeError: As in :func:`join_all`.

    """
    print(banner(config, found, join_all(groups, found.method)), flush=True)


class Worker(NamedTuple):
    """What a worker says about itself."""

    host: str
    version: str
    backend: str


def join(worker: Any, method: str = "vgpo") -> Worker:
    """Attach VGPO in a worker's process, which Ray calls with the worker; importing this module has attached it.

    Args:
        worker: verl's, alone or several in one process.
        method: Whose signal is read.

    Raises:
        TypeError: Its model has no final norm that is found.
        UnknownSurfaceError: Something of its verl could not be changed.
        ValueError: Its model names no visual token, so nothing could be weighted, or the method's signal cannot be
            read from it.

    """
    _refuse_unknown()
    losses.expect_reweighted_advantages()
    device = "cpu"
    for part in [worker, *getattr(worker, "worker_dict", {}).values()]:
        engine: Any = getattr(getattr(part, "actor", None), "engine", None)
        model = getattr(engine, "module", None)
        if isinstance(model, list):  # Megatron's, of which this rank may have no norm
            visual_token_ids(engine.model_config.hf_config)
        elif isinstance(model, torch.nn.Module):
            visual_token_ids(model)
            final_norm(model)
            second_views.check_model(model, methods.METHODS[method])
            device = next(model.parameters()).device.type
    # Offloaded parameters say nothing about where the passes run.
    kind = torch.accelerator.current_accelerator(check_available=True) or torch.device(device)
    return Worker(platform.node(), vgpo_kernels.__version__, backends.select(kind))


def join_all(groups: Iterable[Any], method: str = "vgpo") -> list[Worker]:
    """Attach VGPO in every worker of verl's worker groups.

    Args:
        groups: verl's ``RayWorkerGroup``.
        method: Whose signal is read.

    Returns:
        What the workers say, one for each process.

    Raises:
        RuntimeError: A worker cannot import this library, has another version of it, or its model does not serve.

    """
    import ray

    actors = {id(actor): actor for group in groups for actor in group.workers}
    try:
        workers: list[Worker] = ray.get([actor.__ray_call__.remote(join, method) for actor in actors.values()])
    except Exception as error:
        raise RuntimeError(
            "a worker cannot join VGPO. vgpo_kernels has to be installed, in one version, on every node, or be brought "
            f"by ray_kwargs.ray_init.runtime_env. It said: {error}"
        ) from error
    different = sorted({worker.version for worker in workers} - {vgpo_kernels.__version__})
    if different:
        raise RuntimeError(
            f"workers have vgpo_kernels {', '.join(different)}, and the driver {vgpo_kernels.__version__}"
        )
    return workers


def banner(config: Any, found: Switch, workers: list[Worker]) -> str:
    """Describe a run: versions, engine, signal, groups, settings.

    Args:
        config: verl's.
        found: Of :func:`switch`.
        workers: Of :func:`join_all`.

    """
    names = ("verl", "torch", "transformers", "ray")
    versions = ", ".join(f"{name} {_version(name)}" for name in ("vgpo_kernels", *names))
    actor = config.actor_rollout_ref.actor
    kernels = ", ".join(sorted({worker.backend for worker in workers}))
    hosts = len({worker.host for worker in workers})
    return (
        f"VGPO re-weights advantages: {versions}\n"
        f"  engine {actor.strategy}; workers: {len(workers)}, nodes: {hosts}, kernels: {kernels}\n"
        f"  signal: {_signal(found)}; groups by uid, {config.actor_rollout_ref.rollout.n} responses each\n"
        f"  settings: {_settings(config.algorithm.vgpo, found)}; "
        f"loss_mode {actor.policy_loss.get('loss_mode', 'vanilla')}"
    )


def _version(name: str) -> str:
    if name == "vgpo_kernels":
        return vgpo_kernels.__version__
    try:
        return version(name)
    except PackageNotFoundError:
        return "?"


def _signal(found: Switch) -> str:
    """Say what is read of a token, and in which passes."""
    method = methods.METHODS[found.method]
    beside = "entropy" in found.fields() and method.signal != "js"
    signal = methods.describe(method) + " and entropy" * beside
    if found.method == "vgpo":
        own = "a pass of the decoder by itself (bypass_mode)"
    else:
        own = "a pass by itself (bypass_mode)"
    passes = own if found.bypass else "the old-log-prob pass"
    return f"{signal}, in {passes}{' and one more' if method.view else ''}"


def _settings(given: Mapping[str, Any], found: Switch) -> str:
    base = f"preset {given.get('preset', 'paper')}" if found.method == "vgpo" else f"method {found.method}"
    chosen = {name: getattr(found.config, name) for name in given if name not in ("preset", "method")}
    return ", ".join([base, *(f"{name}={value}" for name, value in chosen.items())])

"""LM heads of models whose parameters DeepSpeed's ZeRO-3 or FSDP keeps in parts.

ZeRO-3 leaves a parameter empty, and fills it where its module is called: for the call, and again for the module's part
of the backward pass, after which it takes the gradient. A weight that is read without calling its module is empty both
times. So what a head's weight is needed for happens inside a call of the head, where its hooks do what they do for
every layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from accelerate.utils import fsdp_utils
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.integrations import deepspeed as zero
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from vgpo_kernels.integrations.transformers import unwrap


def with_head(head: Any, compute: Callable[..., dict[str, Tensor]], *states: Tensor) -> dict[str, Tensor]:
    """Return ``compute(weight, bias, *states)`` of an LM head, whose weight and bias are whole in both passes.

    Args:
        head: A linear layer, or what PEFT wraps around one to train it.
        compute: What is computed, by name. Gradients go to the states, the weight and the bias.
        *states: Hidden states.
    """
    weight = head.weight
    if not is_cut(weight):
        return compute(whole(weight), whole(head.bias), *states)
    owner: Any = next(module for module in head.modules() if module._parameters.get("weight") is weight)
    before = vars(owner).get("forward")  # with cast_lm_head_to_fp32 one of TRL's
    owner.forward = lambda *given: compute(owner.weight, owner.bias, *given)
    try:
        found: dict[str, Tensor] = owner(*states)
    finally:
        del owner.forward
        if before is not None:
            owner.forward = before
    return found


def name_layers_to_shard(model: nn.Module | None) -> None:
    """Let a model name as layers that FSDP wraps one by one those alone that it has.

    A class lists what its vision tower could be made of, CLIP's text layers with CLIP's others, and accelerate stops at
    a name that it does not find.
    """
    if model is None:
        return
    plain: Any = unwrap(model)
    present = {type(module).__name__ for module in plain.modules()}
    plain._no_split_modules = [name for name in plain._no_split_modules or () if name in present]


@contextmanager
def left_whole() -> Iterator[None]:
    """Build models in the block as they are, though the run's own is cut by ZeRO-3 while it is built."""
    reference = zero._hf_deepspeed_config_weak_ref
    configuration = None if reference is None else reference()
    zero.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if configuration is not None:
            zero.set_hf_deepspeed_config(configuration)


@contextmanager
def untrained_parameters_allowed() -> Iterator[None]:
    """Let FSDP load an optimiser that has no state for some parameters in the block.

    The loss does not reach the last norm of LLaVA's vision tower, which takes an earlier layer. So the optimiser never
    had a state for it, and PyTorch would refuse to load one without.
    """
    options = fsdp_utils._prepare_sd_options

    def lenient(plugin: Any) -> Any:
        found = options(plugin)
        return found and dataclasses.replace(found, strict=False)

    fsdp_utils._prepare_sd_options = lenient
    try:
        yield
    finally:
        fsdp_utils._prepare_sd_options = options


def is_cut(parameter: Any) -> bool:
    """Whether a parameter is one of ZeRO-3's."""
    return hasattr(parameter, "ds_id")


def whole(parameter: Tensor | None) -> Tensor | None:
    """Gather a parameter that FSDP has left sharded."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def rows_of(weight: Any) -> int:
    """Return the number of rows of a weight, which ZeRO-3 may have left empty."""
    return int(getattr(weight, "ds_shape", weight.shape)[0])


@contextmanager
def filled_in_calls(model: nn.Module) -> Iterator[None]:
    """Let a model that is to be trained with ZeRO-3 run in the block as it is, for passes without gradient.

    If it was loaded for that it is cut already, but DeepSpeed's hooks come when training starts: here a module's
    parameters are filled for each call of it. Every process has to make the same calls. If it was loaded before, its
    parameters say that they are filled, which TRL's head asks each.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

    def cut_ones(module: nn.Module) -> list[Any]:
        return [one for one in module.parameters(recurse=False) if is_cut(one)]

    def fill(module: nn.Module, inputs: Any) -> None:
        running.append(ExitStack())
        # One that is tied to another is filled already where that one's module is calling.
        if empty := [one for one in cut_ones(module) if one.ds_status is not ZeroParamStatus.AVAILABLE]:
            running[-1].enter_context(GatheredParameters(empty))

    def release(module: nn.Module, inputs: Any, output: Any) -> None:
        running.pop().close()

    running: list[ExitStack] = []  # of the calls that have not returned
    with ExitStack() as stack:
        for module in filter(cut_ones, model.modules()):
            stack.callback(module.register_forward_pre_hook(fill).remove)
            stack.callback(module.register_forward_hook(release).remove)
        for parameter in model.parameters():
            if not is_cut(parameter):
                parameter.ds_status = ZeroParamStatus.AVAILABLE
                stack.callback(delattr, parameter, "ds_status")
        try:
            yield
        finally:  # an error leaves calls that never return
            while running:
                running.pop().close()

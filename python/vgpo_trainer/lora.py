"""Which modules of a vision-language model a LoRA adapter goes to: linear layers of the decoder, and nothing else.

Families name their parts differently (``text_model`` or ``language_model``, ``o_proj`` or ``out_proj``, linear
attention beside softmax attention), and a vision tower's projections often have the decoder's names. So targets are
read off the decoder itself, the module that ends in the final norm.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from torch import nn

from vgpo_kernels.integrations.transformers import decoder_of, unwrap

ALL_LINEAR = "all-linear"


class LoraTargetError(ValueError):
    """Targets that a decoder does not have; the message says which it has."""


def lora_config(arguments: Namespace, model: nn.Module | None = None) -> Any:
    """Return the adapter's settings, or ``None`` where all weights are trained.

    Args:
        arguments: ``lora_rank``, ``lora_alpha`` and ``lora_targets`` of ``vgpo train``; ``model`` and
            ``trust_remote_code`` too, where the model is not given.
        model: The model; by default one of the same structure without weights.

    Raises:
        LoraTargetError: The decoder has no linear layer of a name asked for, or there is no rank.
        OSError: The model's configuration cannot be read.
        TypeError: No decoder was found in the model.

    """
    if arguments.lora_rank is None:
        for option in ("lora_alpha", "lora_targets"):
            if getattr(arguments, option) is not None:
                raise LoraTargetError(f"--{option.replace('_', '-')} has no effect without --lora-rank")
        return None
    from peft import LoraConfig

    structure = skeleton(arguments.model, arguments.trust_remote_code) if model is None else model
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha or 2 * arguments.lora_rank,
        **decoder_targets(structure, arguments.lora_targets),
    )


def decoder_targets(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, str]:
    """Return PEFT's ``target_modules`` and ``exclude_modules`` for linear layers in the decoder's layers.

    Args:
        model: A model of transformers.
        names: Last parts of the layers' names (``q_proj``), or ``all-linear``; by default all, except those that choose
            experts or keys and so pass no gradient on, or should stay as they were trained.

    Raises:
        LoraTargetError: The decoder has no linear layer of a name.
        TypeError: No decoder was found in the model.

    """
    prefix, found = decoder_linears(model)
    if names is not None and not names:
        raise LoraTargetError("no linear layer is named for the adapter")
    if names is not None and list(names) != [ALL_LINEAR]:
        missing = [name for name in names if not any(ends_in(path, name) for path in found)]
        if missing:
            raise LoraTargetError(
                f"the decoder of {type(unwrap(model)).__name__} has no linear layer {', '.join(missing)}; it has "
                f"{', '.join(sorted({path.rpartition('.')[2] for path in found}))}"
            )
        found = [path for path in found if any(ends_in(path, name) for name in names)]
    # Layers and experts differ by their numbers only.
    patterns = sorted({re.sub(r"(^|\\\.)\d+(?=\\\.|$)", r"\1\\d+", re.escape(path)) for path in found})
    return {
        "target_modules": rf"{re.escape(prefix)}\.\d+\.(?:{'|'.join(patterns)})",
        # For some mixtures of experts PEFT reduces its targets to the last parts of their names.
        "exclude_modules": rf"(?!{re.escape(prefix)}\.).*",
    }


def decoder_linears(model: nn.Module) -> tuple[str, list[str]]:
    """Return the name of the decoder's layers, and the paths in a layer of the linear modules an adapter is for."""
    decoder_name, decoder = decoder_of(model)
    # Some decoders hold a vision tower too, beside their layers.
    stacks = (
        (name, stack)
        for name, stack in decoder.named_children()
        if isinstance(stack, nn.ModuleList) and any(hasattr(module, "layer_idx") for module in stack.modules())
    )
    stack_name, layers = next(stacks, ("", nn.ModuleList()))
    paths = {
        path: None
        for layer in layers
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear) and not _chooses(layer, path)
    }
    if not paths:
        raise TypeError(f"the decoder of {type(unwrap(model)).__name__} has no layers with linear modules")
    return f"{decoder_name}.{stack_name}".lstrip("."), list(paths)


def _chooses(layer: nn.Module, path: str) -> bool:
    """Whether a module belongs to one that chooses experts or keys."""
    parts = path.split(".")
    parents = [layer.get_submodule(".".join(parts[: end + 1])) for end in range(len(parts))]
    names = [*parts, *(type(parent).__name__ for parent in parents)]
    return any(re.search("[Rr]outer|[Ii]ndexer", name) for name in names)


def ends_in(path: str, name: str) -> bool:
    """Whether the last parts of a path are those of a name."""
    return f".{path}".endswith(f".{name}")


def skeleton(name: str, trust_remote_code: bool) -> nn.Module:
    """Build a model without its weights, as TRL chooses its class."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    architecture: Any = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if architecture is not None:
            return architecture(config)  # type: ignore[no-any-return]
        automatic = transformers.AutoModelForImageTextToText
        return automatic.from_config(config, trust_remote_code=trust_remote_code)  # type: ignore[no-any-return]

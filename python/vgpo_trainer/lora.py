"""Which modules of a vision-language model a LoRA adapter goes to: linear layers of the decoder, and nothing else.

Families name their parts differently (``text_model`` or ``language_model``, ``o_proj`` or ``out_proj``, linear
attention beside softmax attention), and a vision tower's projections often have the decoder's names. So targets are
read off the decoder itself, the module that ends in the final norm.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from vgpo_kernels.integrations.transformers import decoder_of, unwrap

if TYPE_CHECKING:
    from trl import ModelConfig

ALL_LINEAR = "all-linear"


class LoraTargetError(ValueError):
    """Targets that a decoder does not have; the message says which it has."""


def lora_config(settings: ModelConfig, trust_remote_code: bool = False, model: nn.Module | None = None) -> Any:
    """Return the adapter's settings, or ``None`` where all weights are trained.

    Args:
        settings: TRL's, with ``use_peft`` for an adapter; ``lora_target_modules`` names linear layers of the decoder,
            by default all of them.
        trust_remote_code: Run code that comes with the model, where that is not given.
        model: The model; by default one of the same structure without weights.

    Raises:
        LoraTargetError: The decoder has no linear layer of a name asked for, or there are settings of an adapter, or of
            quantized weights, which only an adapter can train, without ``use_peft``.
        OSError: The model's configuration cannot be read.
        TypeError: No decoder was found in the model.

    """
    if not settings.use_peft:
        for field in dataclasses.fields(settings):
            of_adapters = field.name.startswith("lora_") or field.name in ("use_rslora", "use_dora")
            if of_adapters and getattr(settings, field.name) != field.default:
                raise LoraTargetError(f"{field.name} has no effect without --lora-rank, or use_peft")
        if settings.load_in_4bit or settings.load_in_8bit:
            bits = "load_in_4bit" if settings.load_in_4bit else "load_in_8bit"
            raise LoraTargetError(f"{bits} needs --lora-rank: quantized weights are not trained, an adapter on them is")
        return None
    from peft import LoraConfig

    if model is None:
        assert settings.model_name_or_path is not None
        model = skeleton(settings.model_name_or_path, trust_remote_code, settings.model_revision)
    named = settings.lora_target_modules
    parameters = settings.lora_target_parameters
    return LoraConfig(
        task_type=settings.lora_task_type,
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        modules_to_save=settings.lora_modules_to_save,
        **decoder_targets(model, [named] if isinstance(named, str) else named),
        **({} if parameters is None else {"target_parameters": parameters}),
    )


def quantization_config(settings: ModelConfig) -> Any:
    """Return how the model's weights are quantized (``load_in_4bit``, ``load_in_8bit``), or ``None``.

    Raises:
        ValueError: bitsandbytes, which does that, is not installed.

    """
    from trl import get_quantization_config

    if (settings.load_in_4bit or settings.load_in_8bit) and importlib.util.find_spec("bitsandbytes") is None:
        bits = "load_in_4bit" if settings.load_in_4bit else "load_in_8bit"
        raise ValueError(f"{bits} needs bitsandbytes: pip install bitsandbytes")
    return get_quantization_config(settings)


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


@contextmanager
def dtypes_kept(model: nn.Module) -> Iterator[None]:
    """Keep the dtypes of a model's trained weights while a checkpoint is loaded in the block.

    TRL trains the adapters of a quantized model in bfloat16, and PEFT loads adapters in float32: a resumed run would go
    on with other numbers.
    """
    before = {name: weight.dtype for name, weight in model.named_parameters() if weight.requires_grad}
    yield
    for name, weight in model.named_parameters():
        if name in before and weight.dtype != before[name]:
            weight.data = weight.data.to(before[name])


def skeleton(name: str, trust_remote_code: bool, revision: str = "main") -> nn.Module:
    """Build a model without its weights, as TRL chooses its class."""
    import torch
    import transformers

    from vgpo_trainer.sharded import left_whole

    config = transformers.AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    architecture: Any = getattr(transformers, (config.architectures or [""])[0], None)
    with left_whole(), torch.device("meta"):
        if architecture is not None:
            return architecture(config)  # type: ignore[no-any-return]
        automatic = transformers.AutoModelForImageTextToText
        return automatic.from_config(config, trust_remote_code=trust_remote_code)  # type: ignore[no-any-return]

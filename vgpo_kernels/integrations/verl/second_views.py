"""verl's micro-batches with other images, or none: what a method's second pass goes over."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vgpo_kernels.integrations.images import BESIDE_PIXELS, IMAGES_PER_ROW, PIXELS
from vgpo_kernels.integrations.methods import Method
from vgpo_kernels.integrations.transformers import blind_attention, spoilt_view, unwrap

ROWS = "multi_modal_inputs"  # verl's field of what a response shows, a dict for each
LENGTHS = "images_seqlens"  # which verl counts FLOPs by; no input of a model
# What a pass for log-probs alone leaves out.
LEFT_OUT = ("calculate_entropy", "calculate_sum_pi_squared")


def spoilt_images(micro_batch: Any, method: Method, model: nn.Module, step: int) -> Any:
    """Return a micro-batch whose images are spoilt, each response's by itself; the rest is the same objects.

    What is random is drawn from the step and the tokens of the response, or of its prompt where a prompt's responses
    share a view. So it does not depend on how verl cuts and orders batches.

    Args:
        micro_batch: verl's, nested.
        method: Whose view it is.
        model: The model of the images.
        step: Number of the trainer's step.

    Raises:
        ValueError: As :func:`spoilt_view`: such as for videos.

    """
    lengths = micro_batch["response_mask"].offsets().diff().tolist()
    sequences, rows = micro_batch["input_ids"].unbind(), _rows(micro_batch)
    spoilt = []
    for ids, length, row in zip(sequences, lengths, rows, strict=True):
        if not row:
            spoilt.append(row)
            continue
        drawn_by = ids[: len(ids) - length] if method.view_of == "prompt" else ids
        kind: Any = method.view
        inputs = {"input_ids": ids[None], **{name: value for name, value in row.items() if name != LENGTHS}}
        new = spoilt_view(inputs, kind, model, strength=method.strength, seed=seed_of(step, drawn_by))
        spoilt.append({name: new.get(name, value) for name, value in row.items()})
    return _with_rows(quiet(micro_batch), spoilt)


def seed_of(step: int, tokens: Tensor) -> int:
    digest = hashlib.blake2b(str(step).encode(), digest_size=6)
    digest.update(tokens.cpu().long().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little")


def without_images(micro_batch: Any, visual: Tensor) -> Any:
    """Return a micro-batch whose sequences are shorter by their visual tokens, with positions from 0 on.

    Args:
        micro_batch: verl's, nested, N tokens in all.
        visual: True at visual tokens, ``[N]``.

    """
    ids, positions = micro_batch["input_ids"], micro_batch["position_ids"]
    kept = ~visual.to(ids.device)
    before = nn.functional.pad(kept.long().cumsum(0), (1, 0))
    offsets = before[ids.offsets()]
    shorter = torch.nested.nested_tensor_from_jagged(ids.values()[kept], offsets)
    places = torch.arange(int(offsets[-1]), device=ids.device)
    places = places - offsets[:-1].repeat_interleave(offsets.diff(), output_size=len(places))
    if positions.dim() == 3:  # a number for each dimension of an image, alike for text
        places = places.expand(positions.values().shape[0], -1).contiguous()
        numbered = torch.nested.nested_tensor_from_jagged(places, offsets, jagged_dim=2)
    else:
        numbered = torch.nested.nested_tensor_from_jagged(places, offsets)
    new = quiet(micro_batch)
    new["input_ids"], new["position_ids"] = shorter, numbered
    images = {*PIXELS, *BESIDE_PIXELS, *IMAGES_PER_ROW, LENGTHS}
    rows = [row and {name: value for name, value in row.items() if name not in images} for row in _rows(micro_batch)]
    return _with_rows(new, rows)


@contextmanager
def text_alone(model: nn.Module) -> Iterator[None]:
    """Let verl's own forward passes of Qwen2-VL, Qwen2.5-VL and GLM-4V run without an image.

    They run the vision tower on zeros then and take the mean of what it returns, which is a tensor in older releases
    of transformers alone.
    """

    def with_mean(tower: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        features = getattr(output, "pooler_output", None)
        if isinstance(features, Tensor):
            output.mean = features.mean

    towers = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "visual"]
    hooks = [tower.register_forward_hook(with_mean) for tower in towers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def quiet(micro_batch: Any) -> Any:
    """Return a micro-batch for a pass for log-probs alone; its fields may be replaced."""
    from verl.utils.tensordict_utils import assign_non_tensor

    new = micro_batch.copy()
    assign_non_tensor(new, **dict.fromkeys(LEFT_OUT, False))
    return new


def _rows(micro_batch: Any) -> list[dict[str, Any]]:
    """Return what each response shows; a dict of nothing where it shows nothing."""
    found = micro_batch.get(ROWS, None)
    if found is None:
        return [{} for _ in range(len(micro_batch))]
    return [dict(getattr(row, "data", row) or {}) for row in found]


def _with_rows(micro_batch: Any, rows: list[dict[str, Any]]) -> Any:
    from tensordict import NonTensorData, NonTensorStack

    if micro_batch.get(ROWS, None) is not None:
        micro_batch[ROWS] = NonTensorStack(*(NonTensorData(row) for row in rows))
    return micro_batch


@contextmanager
def hidden_images(model: nn.Module, micro_batch: Any, visual: Tensor) -> Iterator[None]:
    """Let no text attend to images, in passes over a micro-batch that the engine packs or pads.

    Args:
        model: The model.
        micro_batch: verl's, nested, N tokens in all.
        visual: True at visual tokens, ``[N]``.

    Raises:
        ValueError: As :func:`blind_attention`: such as for flash attention.

    """
    from verl.utils.tensordict_utils import get_non_tensor_data

    places = visual[None]
    if not get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True):
        lengths = micro_batch["input_ids"].offsets().diff().to(visual.device)
        inside = torch.arange(int(lengths.max()), device=visual.device) < lengths[:, None]
        places = torch.zeros_like(inside).masked_scatter(inside, visual)
    with blind_attention(model, places):
        yield


def check_model(model: nn.Module, method: Method) -> None:
    """Raise TypeError or ValueError for a model that a method's signal cannot be read from.

    Args:
        model: The engine's.
        method: The method.

    """
    from vgpo_kernels.integrations.transformers import capture_layer_mean, logit_maps

    whole: Any = unwrap(model)
    if method.view == "blind":
        text = whole.config.get_text_config()
        patched = [one for one in model.modules() if type(one).forward.__module__.startswith("verl.models.")]
        own = sorted({type(one).__name__ for one in patched if "Attention" in type(one).__name__})
        if own or text._attn_implementation not in ("sdpa", "eager"):
            named = f"verl's own {own[0]}" if own else f"attn_implementation={text._attn_implementation}"
            raise ValueError(
                f"method=pgpo hides images by a mask of attention, which {named} does not take: set "
                "+actor_rollout_ref.model.override_config.attn_implementation=sdpa and "
                "actor_rollout_ref.model.use_remove_padding=False"
            )
        with blind_attention(model, torch.zeros(1, 1, dtype=torch.bool)):
            pass
    if method.signal == "similarity":
        with capture_layer_mean(model, lambda hidden: hidden):
            pass
    if method.signal == "js":
        head = whole.get_output_embeddings()
        if not isinstance(head, nn.Linear) or logit_maps(whole.config) != [(1.0, None)]:
            raise ValueError(
                f"method=vepo compares distributions in the LM head, and this model's logits are more than the product "
                f"with its weight ({type(head).__name__}, or a scale or cap): take method=vppo"
            )

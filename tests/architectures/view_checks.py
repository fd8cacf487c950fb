"""Second views of an architecture: spoilt images, and a pass in which text is blind to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from architectures.verdicts import Verdict, refused, run, works
from architectures.zoo import ANSWER, Example
from torch import Tensor, nn

from vgpo_kernels.integrations.images import BESIDE_PIXELS, PIXELS
from vgpo_kernels.integrations.transformers import (
    KINDS,
    blind_attention,
    decoder_of,
    reuse_vision_tower,
    spoilt_view,
    visual_mask,
)

SEED = 7  # another than the zoo's, whose images would be the noise of that seed
TEXT = 8  # an id of text
CLOSE = 2e-5


def answers(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return run(model, inputs).logits[:, -ANSWER:]


def views(example: Example) -> Verdict:
    """Each view shows the model other images and nothing else, and does not touch rows of text alone."""
    model, inputs = example
    before = answers(model, inputs)
    mixed = with_a_row_of_text(model, inputs)
    plain = None if mixed is None else answers(model, mixed)
    kinds, notes, exact, empty = [], [], True, True
    for kind in KINDS:
        try:
            view = spoilt_view(inputs, kind, model, seed=SEED)
        except ValueError as error:
            refusal = error
            continue
        kinds.append(kind)
        assert_other_images_only(inputs, view, kind)
        same = spoilt_view(inputs, kind, model, seed=SEED)
        assert all(torch.equal(value, same[name]) for name, value in view.items())
        after = answers(model, view)
        assert after.isfinite().all() and (after != before).flatten(1).any(1).all(), kind
        if kind == "none":
            # Does anything see what stands in the place of images?
            ids = inputs["input_ids"].masked_fill(visual_mask(inputs["input_ids"], model), TEXT)
            empty = (answers(model, {**view, "input_ids": ids}) - after).abs().max() < CLOSE
        if mixed is not None and kind != "swap":
            spoilt = answers(model, spoilt_view(mixed, kind, model, seed=SEED))
            assert not torch.equal(spoilt[0], plain[0]), kind
            torch.testing.assert_close(spoilt[1], plain[1], atol=CLOSE, rtol=0)
            exact = exact and torch.equal(spoilt[1], plain[1])
    if not kinds:
        return refused(refusal)
    if len(kinds) < len(KINDS):
        notes.append(f"only {', '.join(kinds)}: {refusal}")
    if not exact:
        notes.append("rows of text to rounding")
    if not empty:
        notes.append("without images, the tokens that stood for them are read all the same")
    return works("; ".join(notes))


def assert_other_images_only(inputs: dict[str, Any], view: dict[str, Any], kind: str) -> None:
    pixels = {name for name in PIXELS if name in inputs}
    if kind == "none":
        assert all(view[name] is inputs[name] for name in view if name not in ("attention_mask", "image_grid_thw"))
        assert len(view.get("image_grid_thw", ())) == 0
        return
    assert view.keys() == inputs.keys()
    assert all(view[name] is inputs[name] for name in view if name not in pixels)
    for name in pixels:
        given, spoilt = inputs[name], view[name]
        assert spoilt.shape == given.shape and spoilt.dtype == given.dtype
        first, second = halves(given, inputs)
        dim = 3 if "target_sizes" in inputs else 0
        exchanged = torch.equal(spoilt, torch.cat([second, first], dim=dim))
        assert exchanged == (kind == "swap") and not torch.equal(spoilt, given)


def halves(value: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """The parts of an input of images that belong to the first and to the second row."""
    strip = "target_sizes" in inputs and value.dim() == 4
    return value.chunk(2, dim=3 if strip else 0)


def with_a_row_of_text(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The batch without the image of its second row; ``None`` where the model itself does not run on that."""
    mixed: dict[str, Any] = {}
    for name, value in inputs.items():
        if name in (*PIXELS, *BESIDE_PIXELS):
            first, second = halves(value, inputs)
            by_row = "pixel_attention_mask" in inputs and "spatial_shapes" not in inputs
            mixed[name] = torch.cat([first, torch.zeros_like(second)]) if by_row else first
        else:
            mixed[name] = value.clone()
            if value.shape == inputs["input_ids"].shape:
                # Some images have tokens of their own beside those of their features.
                mixed[name][1, 2 : -ANSWER - 1] = TEXT if name == "input_ids" else value[1, 1]
    try:
        answers(model, mixed)
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None
    return mixed


def blind_pass(example: Example) -> Verdict:
    """In the block text gives images no weight and does not change with them; after it all is as before."""
    model, inputs = example
    visual = visual_mask(inputs["input_ids"], model)
    other = other_images(inputs)
    blind: dict[str, Tensor] = {}
    for function in ("eager", "sdpa"):
        try:
            model.set_attn_implementation(function)
        except ValueError:
            continue
        before = answers(model, inputs)
        try:
            with blind_attention(model, visual):
                output = run(model, inputs, **({"output_attentions": True} if function == "eager" else {}))
                changed = answers(model, other)
        except ValueError as error:
            return refused(error)
        blind[function] = output.logits[:, -ANSWER:]
        assert blind[function].isfinite().all() and not torch.equal(blind[function], before)
        assert torch.equal(answers(model, inputs), before)
        torch.testing.assert_close(changed, blind[function], atol=CLOSE, rtol=0)
        assert not torch.equal(answers(model, other), before)
        if function == "eager":
            assert_no_weight_on_images(output, visual, inputs["attention_mask"].bool())
        with explicit_masks(model, visual, inputs) as taken:
            expected = answers(model, inputs)
        if taken:
            torch.testing.assert_close(blind[function], expected, atol=CLOSE, rtol=1e-5)
    if len(blind) > 1:
        torch.testing.assert_close(blind["eager"], blind["sdpa"], atol=1e-4, rtol=1e-4)
    with blind_attention(model, visual):
        expected = answers(model, inputs)
    try:
        with reuse_vision_tower(model), called_modules(model) as first:
            run(model, inputs)
            with called_modules(model) as second, blind_attention(model, visual):
                found = answers(model, inputs)
    except TypeError as error:
        return works(f"the vision tower runs again: {error}")
    assert torch.equal(found, expected) and second < first
    return works()


def other_images(inputs: dict[str, Any]) -> dict[str, Any]:
    """The batch with images of noise."""
    generator = torch.Generator().manual_seed(SEED)
    noise = {name: torch.randn(inputs[name].shape, generator=generator) for name in PIXELS if name in inputs}
    return {**inputs, **noise}


def assert_no_weight_on_images(output: Any, visual: Tensor, real: Tensor) -> None:
    weights = output.attentions if "attentions" in output else output.language_model_outputs.attentions
    text = (real & ~visual)[:, None, :, None]
    on_images = [(layer * text * visual[:, None, None]).abs().max() for layer in weights if layer is not None]
    assert on_images and max(on_images) == 0


@contextmanager
def explicit_masks(model: nn.Module, visual: Tensor, inputs: dict[str, Any]) -> Iterator[list[str]]:
    """Hand the decoder masks ``[B, 1, S, S]`` that forbid images to text; lists whether it takes such masks."""
    _, decoder = decoder_of(model)
    config = decoder.config
    hidden = (visual[:, None, :] & ~visual[:, :, None])[:, None]
    size = visual.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool).tril() & inputs["attention_mask"].bool()[:, None, None]
    taken: list[str] = []

    def forbid(mask: Tensor | None) -> Tensor:
        mask = causal if mask is None else mask
        if mask.dtype == torch.bool:
            mask = mask & ~hidden
            return mask if model_is_sdpa(config) else torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)

    def hook(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        mask = options.get("attention_mask")
        if hasattr(module, "embed_positions"):  # OPT counts positions in its mask
            return None
        if isinstance(mask, dict):
            options["attention_mask"] = {name: forbid(one) for name, one in mask.items()}
        elif isinstance(mask, Tensor) and mask.dim() == 4:
            options["attention_mask"] = forbid(mask)
        elif len(set(getattr(config, "layer_types", None) or ["full_attention"]) | {"full_attention"}) == 1:
            options["attention_mask"] = forbid(None)
        else:
            return None
        taken.append(type(mask).__name__)
        return arguments, options

    handle = decoder.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield taken
    finally:
        handle.remove()


def model_is_sdpa(config: Any) -> bool:
    return config._attn_implementation == "sdpa"


@contextmanager
def called_modules(model: nn.Module) -> Iterator[set[str]]:
    """Collect the names of the modules that are called."""
    names: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, arguments, name=name: names.add(name))
        for name, module in model.named_modules()
    ]
    try:
        yield names
    finally:
        for hook in hooks:
            hook.remove()

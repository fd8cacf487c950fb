"""A pass blind to images: its gradients, checkpointing, generation; and a vision tower that runs once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")

from architectures.view_checks import called_modules, explicit_masks  # noqa: E402
from architectures.zoo import ANSWER, example  # noqa: E402

from vgpo_kernels.integrations.transformers import (  # noqa: E402
    IMAGE,
    attention_segments,
    blind_attention,
    capture_attention_mass,
    reuse_vision_tower,
    spoilt_view,
    visual_mask,
)

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl")


def built(family: str) -> tuple[nn.Module, dict[str, Any], Tensor]:
    model, inputs = example(family)
    return model, inputs, visual_mask(inputs["input_ids"], model)


def loss_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    logits = model(**inputs, use_cache=False).logits[:, -ANSWER - 1 : -1]
    return -logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, -ANSWER:, None]).sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = float(expected[name].abs().max()) + 1e-6
        assert float((gradient - expected[name]).abs().max()) <= 2e-4 * scale + 1e-6, name


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_an_explicit_mask_and_none_reach_the_image(family: str) -> None:
    model, inputs, visual = built(family)
    inputs = {**inputs, "pixel_values": inputs["pixel_values"].clone().requires_grad_()}
    with blind_attention(model, visual):
        loss = loss_of(model, inputs)
    loss.backward()  # after the block
    found = gradients(model)
    assert not inputs["pixel_values"].grad.any()
    with explicit_masks(model, visual, inputs) as taken:
        loss_of(model, inputs).backward()
    assert taken
    assert_same_gradients(found, gradients(model))
    loss_of(model, inputs).backward()
    assert inputs["pixel_values"].grad.any()
    assert any(not torch.equal(gradient, found[name]) for name, gradient in gradients(model).items())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_checkpointing_computes_blind_layers_again(family: str, reentrant: bool) -> None:
    model, inputs, visual = built(family)
    model.train()
    with blind_attention(model, visual):
        loss = loss_of(model, inputs)
    loss.backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    before = [getattr(one, "_gradient_checkpointing_func", None) for one in model.modules()]
    with blind_attention(model, visual):
        loss = loss_of(model, inputs)
    assert [getattr(one, "_gradient_checkpointing_func", None) for one in model.modules()] == before
    loss.backward()
    assert_same_gradients(gradients(model), expected)
    # Two passes whose graphs live side by side: each layer is computed again as it was.
    seeing = loss_of(model, inputs)
    with blind_attention(model, visual):
        blind = loss_of(model, inputs)
    (0.0 * seeing + blind).backward()
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_goes_on_blind(family: str) -> None:
    model, inputs, visual = built(family)
    if family == "llava":  # an image from the first token on
        inputs.update({name: inputs[name][:, 2:] for name in ("input_ids", "attention_mask")})
        visual = visual[:, 2:]
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    other = spoilt_view(inputs, "noise", model, seed=9)
    with blind_attention(model, visual):
        one, same = (model.generate(**batch, **options) for batch in (inputs, other))
        pair = model.generate(**inputs, **{**options, "do_sample": True}, num_return_sequences=2)
    assert torch.equal(one.sequences, same.sequences)
    torch.testing.assert_close(torch.stack(one.logits), torch.stack(same.logits), atol=2e-5, rtol=0)
    assert not torch.equal(torch.stack(model.generate(**inputs, **options).logits), torch.stack(one.logits))
    assert pair.sequences.shape[0] == 4
    # The cached steps are those of one pass over the whole.
    ids = one.sequences[:, :-1]
    grown = {"input_ids": ids, "attention_mask": nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)}
    types = {name: nn.functional.pad(inputs[name], (0, 4)) for name in inputs if name == "mm_token_type_ids"}
    with blind_attention(model, visual), torch.no_grad():
        logits = model(**{**inputs, **grown, **types}).logits[:, -5:]
    torch.testing.assert_close(torch.stack(one.logits, 1), logits, atol=2e-4, rtol=1e-4)


def test_attention_on_images_is_zero() -> None:
    model, inputs, visual = built("qwen2_5_vl")
    segments = attention_segments(inputs["input_ids"], model, inputs["attention_mask"])
    with capture_attention_mass(model, segments) as captured, blind_attention(model, visual), torch.no_grad():
        model(**inputs)
    text = inputs["attention_mask"].bool() & ~visual
    share = captured.masses[..., IMAGE].transpose(1, 2)
    assert not share[text].any() and share[visual].any()


def test_a_row_that_begins_with_its_image_and_a_row_that_is_padding() -> None:
    for function in ("sdpa", "eager"):
        model, inputs, _ = built("llava")
        model.set_attn_implementation(function)
        inputs["input_ids"] = torch.tensor([[90, 90, 90, 90, 10, 11], [0, 0, 0, 0, 0, 12]])
        inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
        inputs["pixel_values"] = inputs["pixel_values"][:1]
        visual = visual_mask(inputs["input_ids"], model)
        with blind_attention(model, visual):
            loss = model(**inputs).logits.square().sum()
        assert loss.isfinite()
        loss.backward()
        assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_a_query_of_images_alone_sees_itself() -> None:
    model, inputs, visual = built("llava")
    size = visual.shape[1]
    # The first token of the answer sees nothing but the image.
    mask = torch.ones(size, size, dtype=torch.bool).tril().expand(2, 1, size, size).clone()
    mask[:, :, -ANSWER] = visual[:, None]
    inputs["attention_mask"] = mask
    found = []
    for function in ("sdpa", "eager"):
        model.set_attn_implementation(function)
        inputs["attention_mask"] = mask if function == "sdpa" else torch.where(mask, 0.0, torch.finfo().min)
        with blind_attention(model, visual), torch.no_grad():
            one = model(**inputs).logits
            other = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
        assert one.isfinite().all() and torch.equal(one[:, -ANSWER:], other[:, -ANSWER:])
        found.append(one)
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


def test_other_models_see_inside_the_block() -> None:
    model, inputs, visual = built("llava")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = twin(**inputs).logits
        with blind_attention(model, visual):
            assert torch.equal(twin(**inputs).logits, expected)
            assert not torch.equal(model(**inputs).logits, expected)
        assert torch.equal(model(**inputs).logits, expected)


def test_what_is_refused() -> None:
    model, inputs, visual = built("llava")
    with pytest.raises(TypeError, match=r"visual_mask must be bool or an integer mask"):
        blind_attention(model, visual.float()).__enter__()
    with pytest.raises(ValueError, match=r"visual_mask must have shape \[B, S\]"):
        blind_attention(model, visual[0]).__enter__()
    with pytest.raises(TypeError, match=r"visual_mask must be a torch.Tensor"):
        blind_attention(model, [True]).__enter__()  # type: ignore[arg-type]
    with (
        pytest.raises(ValueError, match=r"visual_mask has 3 rows.*batch of 2"),
        blind_attention(model, visual[[0, 0, 0]]),
    ):
        model(**inputs)
    # Flash and flex attention get no mask of queries by keys; this one stands for any function of another name.
    transformers.AttentionInterface.register("another", transformers.integrations.sdpa_attention.sdpa_attention_forward)
    transformers.AttentionMaskInterface.register("another", transformers.masking_utils.sdpa_mask)
    model.set_attn_implementation("another")
    with pytest.raises(ValueError, match="attends by another, which takes no mask"), blind_attention(model, visual):
        model(**inputs)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    for family, match in (("qwen3_5", r"layers \[0, 2\] of Qwen3_5TextModel mix.*none"), ("dots3_note", "choose keys")):
        model, _, visual = built(family)
        with pytest.raises(ValueError, match=match):
            blind_attention(model, visual).__enter__()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pages_two_views(family: str) -> None:
    """The block as it stands in docs/attention.md: the divergences are those of logits."""
    model, inputs, visual = built(family)
    page = (Path(__file__).resolve().parents[2] / "docs" / "attention.md").read_text()
    block = page.partition("## Two views")[2].partition("```python\n")[2].partition("```")[0]
    scope: dict[str, Any] = {"model": model, "inputs": inputs, "response_mask": torch.ones(2, ANSWER, dtype=torch.bool)}
    exec(block, scope)
    with torch.no_grad():
        plain, spoilt = (model(**one).logits for one in (inputs, spoilt_view(inputs, "mask", model, seed=0)))
        with blind_attention(model, visual):
            blind = model(**inputs).logits
    for name, other in (("masked", spoilt), ("hidden_images", blind)):
        p, q = (one[:, -ANSWER - 1 : -1].log_softmax(-1) for one in (plain, other))
        torch.testing.assert_close(scope[name].detach(), (p.exp() * (p - q)).sum(-1), atol=1e-4, rtol=1e-4)
    (scope["masked"] + scope["hidden_images"]).sum().backward()
    assert gradients(model)


@contextmanager
def tower_runs(model: nn.Module) -> Iterator[list[int]]:
    """Count the runs of a model's vision tower."""
    runs: list[int] = []
    tower = next(one for name, one in model.named_modules() if name.endswith(("visual", "vision_tower")))
    handle = tower.register_forward_hook(lambda module, arguments, output: runs.append(1))
    try:
        yield runs
    finally:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_runs_once_and_gets_both_gradients(family: str) -> None:
    model, inputs, visual = built(family)
    expected: dict[str, Tensor] = {}
    for blind in (False, True):
        with blind_attention(model, visual & blind):
            loss_of(model, inputs).backward()
    expected = gradients(model)
    with tower_runs(model) as runs, reuse_vision_tower(model):
        first = loss_of(model, inputs)
        # An equal copy shows the same images.
        same = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
        with blind_attention(model, visual), called_modules(model) as called:
            second = loss_of(model, same)
    (first + second).backward()
    assert len(runs) == 1 and not any(".visual" in name or "vision_tower" in name for name in called)
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_runs_again_where_its_features_would_be_others(family: str) -> None:
    model, inputs, _ = built(family)
    other = spoilt_view(inputs, "noise", model, seed=9)
    with tower_runs(model) as runs, reuse_vision_tower(model):
        with torch.no_grad():
            model(**inputs)
            model(**inputs)
        assert len(runs) == 1
        loss_of(model, inputs)  # which needs a graph
        assert len(runs) == 2
        with torch.no_grad():
            found = model(**other).logits
            assert len(runs) == 3
            model(**inputs), model(**other)
            assert len(runs) == 3
            inputs["pixel_values"].mul_(0.5)
            model(**inputs)
            assert len(runs) == 4
            next(one for name, one in model.named_parameters() if "vis" in name).mul_(2)
            model(**other)
            assert len(runs) == 5
    with torch.no_grad():
        assert not torch.equal(model(**other).logits, found) and found.isfinite().all()
    assert all("get_image_features" not in vars(one) for one in model.modules())


def test_a_frozen_tower_needs_no_graph() -> None:
    model, inputs, _ = built("qwen2_5_vl")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("language_model.layers" in name)
    with tower_runs(model) as runs, reuse_vision_tower(model):
        with torch.no_grad():
            model(**inputs)
        loss_of(model, inputs).backward()
    assert len(runs) == 1 and gradients(model)


def test_what_a_pass_does_to_its_features_stays_there() -> None:
    model, inputs, _ = built("qwen2_5_vl")
    with reuse_vision_tower(model), torch.no_grad():
        for _ in range(3):
            found = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
            assert len(found.pooler_output) == 2
            found.pooler_output = found.pooler_output[:1]


def test_a_model_without_image_features_is_refused() -> None:
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(vocab_size=8, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(TypeError, match="Qwen2ForCausalLM has no get_image_features"):
        reuse_vision_tower(model).__enter__()

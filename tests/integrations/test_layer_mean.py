"""The mean over layers of what is made of their hidden states, on models as transformers builds them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from integrations.test_transformers import FAMILIES, batch_with_images, build

from vgpo_kernels import visual_focus
from vgpo_kernels.integrations.transformers import capture_layer_mean, final_norm, visual_mask

LAYERS = 3  # hidden states of a model of two layers
SCORED = torch.ones(2, 3, dtype=torch.bool)  # the last three tokens


def similarity_to(images):
    return lambda hidden: visual_focus(hidden, images, SCORED[: len(images)], pooling="unit_mean")


def by_all_pairs(hidden, images):
    """The mean of the cosines of every scored token with every image token."""
    hidden = hidden.double()
    rows = [
        torch.cosine_similarity(row[-3:, None], row[seen][None], dim=-1).mean(-1)
        for row, seen in zip(hidden, images, strict=True)
    ]
    return torch.stack(rows).float()


@pytest.mark.parametrize("layers", [None, (-1,), (0, 1)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_mean_over_output_hidden_states(family, layers):
    model, inputs = build(family), batch_with_images(family)
    images = visual_mask(inputs["input_ids"], model)
    with torch.no_grad(), capture_layer_mean(model, similarity_to(images), layers=layers) as captured:
        everything = model(**inputs, output_hidden_states=True).hidden_states
    assert len(everything) == LAYERS
    chosen = everything if layers is None else [everything[index] for index in layers]
    expected = torch.stack([by_all_pairs(hidden, images) for hidden in chosen]).mean(0)
    torch.testing.assert_close(captured.mean, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_captures_once_and_leaves_gradients_alone(reentrant):
    inputs = batch_with_images("qwen2_5_vl")

    def train(capture):
        model = build("qwen2_5_vl").train()
        images = visual_mask(inputs["input_ids"], model)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found = []
        if capture:
            calls = []

            def reduce(hidden):
                assert not hidden.requires_grad
                calls.append(hidden.shape)
                return similarity_to(images)(hidden)

            with capture_layer_mean(model, reduce) as captured:
                loss = model(**inputs, labels=inputs["input_ids"]).loss
                loss.backward()  # recomputes the layers inside the block
            assert len(calls) == LAYERS
            found = captured.passes
        else:
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return [weight.grad for weight in model.parameters() if weight.grad is not None], found

    plain, _ = train(capture=False)
    watched, found = train(capture=True)
    assert len(found) == 1
    assert not found[0].requires_grad
    assert len(plain) == len(watched)
    assert all(torch.equal(*pair) for pair in zip(plain, watched, strict=True))


def test_a_batch_may_be_scored_in_slices():
    model, inputs = build("llava"), batch_with_images("llava")
    images = visual_mask(inputs["input_ids"], model)
    with torch.no_grad(), capture_layer_mean(model, similarity_to(images)) as whole:
        model(**inputs)
    row = 0
    slices = {index: similarity_to(images[index : index + 1]) for index in range(2)}
    with torch.no_grad(), capture_layer_mean(model, lambda hidden: slices[row](hidden)) as captured:
        for row in range(2):  # reduce reads it
            model(**{name: value[row : row + 1] for name, value in inputs.items()})
    torch.testing.assert_close(torch.cat(captured.passes), whole.mean, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="2 forward passes"):
        captured.mean  # noqa: B018


def test_nothing_stays_behind():
    model, inputs = build("qwen2_vl"), batch_with_images("qwen2_vl")

    def broken(hidden):
        raise KeyError("of the caller's")

    with torch.no_grad(), capture_layer_mean(model, broken) as captured:
        with pytest.raises(KeyError, match="of the caller's"):
            model(**inputs)
        with pytest.raises(RuntimeError, match="no forward pass"):
            captured.mean  # noqa: B018
    before = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    with torch.no_grad(), capture_layer_mean(model, lambda hidden: hidden.mean(-1)) as captured:
        model(**inputs)
    assert captured.mean.shape == inputs["input_ids"].shape
    after = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    assert after == before


def test_what_cannot_be_captured_is_said():
    model, inputs = build("qwen2_vl"), batch_with_images("qwen2_vl")
    with pytest.raises(TypeError, match="reduce must be callable"), capture_layer_mean(model, 3):
        pass
    with pytest.raises(ValueError, match=r"layers must lie in \[-3, 3\)"):
        capture_layer_mean(model, torch.mean, layers=(3,)).__enter__()
    with (
        torch.no_grad(),
        capture_layer_mean(model, lambda hidden: 1.0),
        pytest.raises(TypeError, match="reduce must return a tensor, got float"),
    ):
        model(**inputs)
    norm = final_norm(model)

    def norm_again(module, arguments, output):
        norm(output)

    model.model.language_model.layers[-1].register_forward_hook(norm_again)
    with (
        torch.no_grad(),
        capture_layer_mean(model, lambda hidden: hidden.mean(-1)),
        pytest.raises(ValueError, match=r"reached the layers \[0, 1, 2, 2\]"),
    ):
        model(**inputs)

"""Attention masses captured from models as transformers builds them, against their own eager attention weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from eager_attention import TOLERANCE, assert_same, eager_weights, sums_by_segment  # noqa: E402
from integrations.test_transformers import TEXT, batch_with_images, build  # noqa: E402

from vgpo_kernels.integrations.transformers import (  # noqa: E402
    GENERATED,
    IGNORED,
    IMAGE,
    QUESTION,
    AttentionCall,
    attention_segments,
    capture_attention,
    capture_attention_mass,
)

FAMILIES = ["llava", "qwen2_5_vl", "qwen3_vl"]


def segments_of(model: nn.Module, inputs: dict[str, Tensor], response: int = 0) -> Tensor:
    """Segments of a batch whose last ``response`` tokens were generated."""
    sampled = torch.ones(len(inputs["input_ids"]), response, dtype=torch.bool)
    return attention_segments(inputs["input_ids"], model, inputs["attention_mask"], sampled)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_pass_equals_eager_weights(family: str, attention: str) -> None:
    model, inputs = build(family), batch_with_images(family)
    segments = segments_of(model, inputs, response=2)
    expected = sums_by_segment(eager_weights(model, inputs), segments)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        plain = model(**inputs).logits
        with capture_attention_mass(model, segments) as captured:
            logits = model(**inputs).logits
    assert torch.equal(logits, plain)
    assert captured.layers == (0, 1)
    assert captured.masses.shape == (*expected.shape[:2], *expected.shape[3:])
    assert_same(captured.masses, expected.mean(2), inputs["attention_mask"])
    with torch.no_grad(), capture_attention_mass(model, segments, per_head=True, layers=(-1,)) as captured:
        model(**inputs)
    assert captured.layers == (1,)
    assert_same(captured.masses[:, 0], expected[:, 1], inputs["attention_mask"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_registered_attention_with_the_masks_of_flash_attention_does_the_work(family: str) -> None:
    """A stand-in for flash attention, which needs a GPU: its masks are ``[B, S]``, or none where nothing is padded."""
    model, inputs = build(family), batch_with_images(family)
    segments = segments_of(model, inputs, response=2)
    expected = sums_by_segment(eager_weights(model, inputs), segments).mean(2)
    masks: list[Any] = []

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **options: Any) -> Any:
        mask = options.get("attention_mask", mask)
        masks.append(mask)
        causal = options.get("is_causal")
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        visible = visible.tril() if (module.is_causal if causal is None else causal) else visible
        if mask is not None:
            assert mask.dim() == 2
            visible = visible & mask[:, None, None].bool() | torch.eye(q.shape[2], dtype=torch.bool)
        result = nn.functional.scaled_dot_product_attention(q, k, v, visible, scale=options["scaling"], enable_gqa=True)
        return result.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("stand_in", attend)
    transformers.AttentionMaskInterface.register("stand_in", transformers.masking_utils.flash_attention_mask)
    try:
        model.set_attn_implementation("stand_in")
        with torch.no_grad():
            plain = model(**inputs).logits
            calls = len(masks)
            with capture_attention_mass(model, segments) as captured:
                logits = model(**inputs).logits
        assert len(masks) == 2 * calls and any(mask is not None for mask in masks)
        assert torch.equal(logits, plain)
        assert transformers.AttentionInterface()["stand_in"] is attend
    finally:
        transformers.AttentionInterface._global_mapping.pop("stand_in")
        transformers.AttentionMaskInterface._global_mapping.pop("stand_in")
    assert_same(captured.masses, expected, inputs["attention_mask"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_tokens_of_a_training_pass(family: str) -> None:
    """Gradients are the model's own, checkpointing records nothing twice, and a loss on attention reaches weights."""
    model, inputs = build(family).train(), batch_with_images(family)
    segments = segments_of(model, inputs, response=3)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    plain = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with capture_attention_mass(model, segments, last=3) as captured:
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert len(captured.passes) == 1 and not captured.masses.requires_grad
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(weight.grad, plain[name])
    expected = sums_by_segment(eager_weights(model.eval(), inputs), segments).mean(2)[:, :, -3:]
    assert_same(captured.masses, expected, inputs["attention_mask"][:, -3:])

    model.zero_grad()
    model.gradient_checkpointing_disable()
    with capture_attention_mass(model, segments, last=3, layers=(1,), differentiable=True) as captured:
        model(**inputs)
    captured.masses[..., IMAGE].sum().backward()
    weights = [weight for name, weight in model.named_parameters() if "1.self_attn.k_proj.weight" in name]
    assert weights and all(weight.grad.abs().sum() > 0 for weight in weights)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_one_pass_over_its_result(family: str, cache: str) -> None:
    model, inputs = build(family), batch_with_images(family)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    expected_ids = model.generate(**inputs, **options)
    with capture_attention_mass(model, segments_of(model, inputs)) as captured:
        ids = model.generate(**inputs, **options)
    assert torch.equal(ids, expected_ids)
    prompt = inputs["input_ids"].shape[1]
    # The last token is never a query.
    whole = inputs | {"input_ids": ids[:, :-1]}
    whole["attention_mask"] = nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    if "mm_token_type_ids" in inputs:
        whole["mm_token_type_ids"] = nn.functional.pad(inputs["mm_token_type_ids"], (0, 4))
    segments = nn.functional.pad(segments_of(model, inputs), (0, 4), value=GENERATED)
    expected = sums_by_segment(eager_weights(model, whole), segments).mean(2)
    assert captured.masses.shape[2] == prompt + 4
    assert_same(captured.masses, expected, whole["attention_mask"])


def test_several_sequences_a_prompt_share_its_segments() -> None:
    model, inputs = build("qwen2_5_vl"), batch_with_images("qwen2_5_vl")
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": True, "num_return_sequences": 2}
    with capture_attention_mass(model, segments_of(model, inputs), layers=(0,)) as captured:
        model.generate(**inputs, **options)
    masses = captured.masses
    prompt = inputs["input_ids"].shape[1]
    assert masses.shape == (4, 1, prompt + 2, 3)
    assert torch.equal(masses[0, :, :prompt], masses[1, :, :prompt])
    assert not torch.equal(masses[0, :, :prompt], masses[2, :, :prompt])


def shifts_of(weights: Tensor, segments: Tensor, segment: int) -> Tensor:
    """Fisher-Rao distances of successive rows of eager weights ``[..., T, S]``, over the keys that both see."""
    counted = weights.double() * (segments == segment)[:, None]
    both = (counted[..., 1:, :] > 0) & (counted[..., :-1, :] > 0)
    before, after = (both * part for part in (counted[..., :-1, :], counted[..., 1:, :]))
    before, after = (part / part.sum(-1, keepdim=True) for part in (before, after))
    shifts = 2 * (before * after).sqrt().sum(-1).clamp(max=1).arccos()
    return nn.functional.pad(shifts, (1, 0), value=float("nan")).float()


@pytest.mark.parametrize("family", [*FAMILIES, "chunks"])
def test_shifts_of_attention_equal_eager_weights(family: str) -> None:
    if family == "chunks":
        model, (inputs, segments) = chunked_model(), chunked_batch()
    else:
        model, inputs = build(family), batch_with_images(family)
        segments = segments_of(model, inputs)
    weights = eager_weights(model, inputs)[0]
    calls: list[Tensor] = []

    def consume(call: AttentionCall) -> None:
        assert (call.visible is not None) == (family == "chunks")
        calls.extend((call.shift(segments), call.shift(segments, segment=QUESTION, per_head=True)))

    model.set_attn_implementation("sdpa")
    with torch.no_grad(), capture_attention(model, consume, layers=(0,)):
        model(**inputs)
    image, question = calls
    real = inputs["attention_mask"].bool()
    real[:, 1:] &= real[:, :-1].clone()  # the token before is no padding
    wanted = shifts_of(weights.mean(1), segments, IMAGE)
    assert wanted[real].isfinite().any()
    torch.testing.assert_close(image[real], wanted[real], atol=1e-4, rtol=0, equal_nan=True)
    for head in range(weights.shape[1]):
        wanted = shifts_of(weights[:, head], segments, QUESTION)
        torch.testing.assert_close(question[:, head][real], wanted[real], atol=1e-4, rtol=0, equal_nan=True)


def sliding_model(window: int) -> nn.Module:
    """A text model whose first layer slides, as mixed Qwen2 and Gemma models do."""
    torch.manual_seed(0)
    options = {"use_sliding_window": True, "sliding_window": window}
    layer_types = ["sliding_attention", "full_attention"]
    config = transformers.Qwen2Config(**TEXT, **options, layer_types=layer_types)
    return transformers.Qwen2ForCausalLM(config).eval()


def test_sliding_windows_in_a_pass_and_in_a_cache_that_drops_keys() -> None:
    model = sliding_model(window=4)
    ids = torch.arange(20, 32).repeat(2, 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    segments = (torch.arange(12) // 4).expand(2, -1)
    expected = sums_by_segment(eager_weights(model, inputs), segments).mean(2)
    assert (expected[:, 0, -1, :2] == 0).all() and (expected[:, 1, -1] > 0).all()
    with torch.no_grad(), capture_attention_mass(model, segments) as captured:
        model(**inputs)
    assert_same(captured.masses, expected, inputs["attention_mask"])

    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with capture_attention_mass(model, segments[:, :9]) as captured:
        result = model.generate(ids[:, :9], **options)
    whole = {"input_ids": result[:, :-1], "attention_mask": torch.ones_like(result[:, :-1])}
    later = nn.functional.pad(segments[:, :9], (0, 5), value=GENERATED)
    assert_same(captured.masses, sums_by_segment(eager_weights(model, whole), later).mean(2), whole["attention_mask"])


def test_passes_are_told_apart_and_other_models_are_left_alone() -> None:
    model, other = sliding_model(window=8), sliding_model(window=8)
    ids = torch.arange(20, 26)[None]
    segments = torch.zeros(1, 6, dtype=torch.int64)
    with torch.no_grad(), capture_attention_mass(model, segments) as captured:
        with pytest.raises(RuntimeError, match="no attention of the model was called"):
            _ = captured.masses
        other(ids)
        model(ids)
        model(ids[:, :4])
        with pytest.raises(RuntimeError, match="2 forward passes began"):
            _ = captured.masses
    assert [masses.shape[2] for masses in captured.passes] == [6, 4]
    model(ids)
    assert len(captured.passes) == 2


def test_captures_nest_and_end_with_their_blocks() -> None:
    model, ids = sliding_model(window=8), torch.arange(20, 26)[None]
    registry = transformers.AttentionInterface()
    before = dict(registry)
    seen: list[AttentionCall] = []
    segments = torch.zeros(1, 6, dtype=torch.int64)
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        with torch.no_grad(), capture_attention(model, seen.append, layers=(1,)):
            with capture_attention_mass(model, segments) as captured:
                model(ids)
            assert len(captured.passes) == 1
        assert dict(registry) == before
    assert [call.layer for call in seen] == [1, 1]
    assert seen[0].query_positions.tolist() == [list(range(6))] and seen[0].window is None


def test_eager_attention_of_a_module_whose_class_was_wrapped() -> None:
    """FSDP2 gives a module a class of its own, which stands in no model's file."""
    model, ids = sliding_model(window=8), torch.arange(20, 26)[None]
    model.set_attn_implementation("eager")
    segments = torch.zeros(1, 6, dtype=torch.int64)
    with torch.no_grad():
        plain = model(ids).logits
        attention = model.model.layers[0].self_attn
        attention.__class__ = type("WrappedAttention", (type(attention),), {})
        with capture_attention_mass(model, segments) as captured:
            assert torch.equal(model(ids).logits, plain)
    assert captured.layers == (0, 1)


def test_an_error_inside_leaves_no_trace() -> None:
    model = sliding_model(window=8)
    before = dict(transformers.AttentionInterface())

    def fail(_: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), capture_attention(model, fail):
        model(torch.arange(20, 26)[None])
    assert dict(transformers.AttentionInterface()) == before
    model(torch.arange(20, 26)[None])


def test_what_cannot_be_captured_is_refused() -> None:
    model = sliding_model(window=8)
    with pytest.raises(ValueError, match=r"layers must lie in \[-2, 2\)"), capture_attention(model, print, layers=(2,)):
        pass
    with pytest.raises(TypeError, match="no final norm"), capture_attention(nn.Linear(2, 2), print):
        pass
    segments = torch.zeros(2, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match="segments has 2 rows"), capture_attention_mass(model, segments):
        model(torch.arange(20, 26)[None])
    torch.manual_seed(0)
    options = {**TEXT, "head_dim": 8, "attn_logit_softcapping": 30.0, "attn_implementation": "eager"}
    capped = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**options)).eval()
    with pytest.raises(ValueError, match="softcap"), capture_attention_mass(capped, segments[:1]):
        capped(torch.arange(20, 26)[None])


def test_segments_of_a_batch() -> None:
    ids = torch.tensor([[0, 90, 90, 5, 6, 90, 7], [90, 4, 90, 5, 6, 8, 0]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]])
    response = torch.tensor([[0, 1, 1], [1, 1, 0]])
    found = attention_segments(ids, (90,), mask, response)
    assert found.tolist() == [
        [IGNORED, IMAGE, IMAGE, QUESTION, QUESTION, GENERATED, GENERATED],
        [IMAGE, QUESTION, IMAGE, QUESTION, GENERATED, GENERATED, IGNORED],
    ]
    assert attention_segments(ids, (90,)).tolist()[0] == [1, 0, 0, 1, 1, 0, 1]


# ---- masks that are no causal ones ---------------------------------------------------------------------------------


def chunked_model(chunk: int = 8) -> nn.Module:
    """Llama 4's decoder: three layers see their own chunk only, and only the mask says so."""
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        **{**TEXT, "num_hidden_layers": 4},
        head_dim=8,
        intermediate_size_mlp=64,
        num_local_experts=2,
        attention_chunk_size=chunk,
    )
    return transformers.Llama4ForCausalLM(config).eval()


def chunked_batch() -> tuple[dict[str, Tensor], Tensor]:
    """Two rows, the second padded on its left, so that its chunks begin elsewhere; and segments of them."""
    ids = torch.arange(10, 34).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}, (torch.arange(24) // 8).expand(2, -1).masked_fill(mask == 0, -1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_chunks_are_followed_in_a_pass_and_in_generate(attention: str) -> None:
    model = chunked_model()
    inputs, segments = chunked_batch()
    expected = sums_by_segment(eager_weights(model, inputs), segments)
    assert (expected[0, 0, :, 23, 0] == 0).all(), "the first chunk is out of sight"
    model.set_attn_implementation(attention)
    with torch.no_grad(), capture_attention_mass(model, segments) as captured:
        model(**inputs)
    assert_same(captured.masses, expected.mean(2), inputs["attention_mask"])
    with torch.no_grad(), capture_attention_mass(model, segments, per_head=True, last=5) as captured:
        model(**inputs)
    torch.testing.assert_close(captured.masses, expected[:, :, :, -5:], atol=TOLERANCE, rtol=0)

    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    with capture_attention_mass(model, segments) as captured:
        ids = model.generate(**inputs, **options)
    whole = {"input_ids": ids[:, :-1], "attention_mask": nn.functional.pad(inputs["attention_mask"], (0, 9), value=1)}
    later = nn.functional.pad(segments, (0, 9), value=GENERATED)
    assert_same(captured.masses, sums_by_segment(eager_weights(model, whole), later).mean(2), whole["attention_mask"])
    assert [masses.shape[2] for masses in captured.passes] == [24] + [1] * 9
    assert len(captured.sequences) == 1 and torch.equal(captured.sequences[0], captured.masses)


def test_gradients_and_heat_maps_follow_the_mask() -> None:
    model = chunked_model()
    inputs, segments = chunked_batch()
    shown = segments == IMAGE
    weights = eager_weights(model, inputs)[0]
    kept = inputs["attention_mask"].bool()[:, None, :, None]
    expected = (weights * kept).sum((1, 2)) / weights.shape[1] / kept.sum((1, 2))
    heats: list[Tensor] = []
    rows: list[Tensor] = []

    def consume(call: AttentionCall) -> None:
        assert call.visible is not None
        heats.append(call.heatmap(shown))
        one = call._replace(
            **{name: getattr(call, name)[:1] for name in ("q", "k", "query_positions", "kept", "visible")}
        )
        rows.append(one.last(4).one_query_each().heatmap(shown[:1].expand(4, -1)))

    with torch.no_grad(), capture_attention(model, consume, layers=(0,)):
        model(**inputs)
    torch.testing.assert_close(heats[0], expected.masked_fill(~shown, 0), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(rows[0], weights[0].mean(0)[-4:].masked_fill(~shown[0], 0), atol=TOLERANCE, rtol=0)

    gradients = []
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        model.zero_grad()
        if attention == "eager":
            masses = sums_by_segment(model(**inputs, output_attentions=True).attentions, segments).mean(2)
        else:
            with capture_attention_mass(model, segments, differentiable=True) as captured:
                model(**inputs)
            masses = captured.masses
        masses[:, :, 3:, IMAGE].sum().backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-3)


def test_scores_under_a_mask_exist_a_few_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from vgpo_kernels.integrations import attention_call

    model = chunked_model()
    inputs, segments = chunked_batch()
    with torch.no_grad(), capture_attention_mass(model, segments, layers=(0,)) as captured:
        model(**inputs)
    shapes: list[int] = []
    softmax = attention_call.masked_softmax

    def recorded(q: Tensor, *rest: Any) -> Tensor:
        shapes.append(q.shape[2])
        return softmax(q, *rest)

    monkeypatch.setattr(attention_call, "masked_softmax", recorded)
    monkeypatch.setattr(attention_call, "CHUNK_BYTES", 2 * 4 * 24 * 4 * 5)  # five queries of both rows' four heads
    with torch.no_grad(), capture_attention_mass(model, segments, layers=(0,)) as again:
        model(**inputs)
    assert max(shapes) == 5 and sum(shapes) == 24
    torch.testing.assert_close(again.masses, captured.masses)


def test_a_block_mask_of_flex_attention_is_read() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    from vgpo_kernels.integrations.attention_call import MaskReader, read_call

    q, k = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8)

    def read(mask_mod: Any) -> AttentionCall:
        mask = create_block_mask(mask_mod, 2, None, 12, 12, device="cpu")
        return read_call(0, q, k, mask, 0, {}, causal=True, masks=MaskReader())

    plain = read(lambda b, h, i, j: (j <= i) & (j >= b))
    assert plain.visible is None and plain.kept is not None and plain.kept.sum(1).tolist() == [12, 11]
    chunks = read(lambda b, h, i, j: (j <= i) & (i // 4 == j // 4))
    assert chunks.visible is not None and chunks.visible[0, 0, 11].nonzero()[:, 0].tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_a_mask_a_layer_may_see_both_ways(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA then goes by the layer's is_causal; eager attention sees everything."""
    model, ids = sliding_model(window=64), torch.arange(20, 32)[None]
    modeling = transformers.models.qwen2.modeling_qwen2
    for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
        monkeypatch.setattr(modeling, name, lambda *_, **__: None)
    for layer in model.model.layers:
        layer.self_attn.is_causal = attention == "eager"
    segments = (torch.arange(12) // 4)[None]
    expected = sums_by_segment(eager_weights(model, {"input_ids": ids}), segments).mean(2)
    assert (expected[:, :, 0, GENERATED] > 0).all(), "the first token sees the last"
    model.set_attn_implementation(attention)
    with torch.no_grad(), capture_attention_mass(model, segments) as captured:
        model(ids)
    assert_same(captured.masses, expected, torch.ones(1, 12))


def test_a_mask_is_read_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from vgpo_kernels.integrations import attention_call

    model = chunked_model()
    inputs, segments = chunked_batch()
    read: list[int] = []
    dense = attention_call.dense_mask
    monkeypatch.setattr(attention_call, "dense_mask", lambda mask, call: read.append(call.layer) or dense(mask, call))
    with torch.no_grad(), capture_attention_mass(model, segments) as captured:
        model(**inputs)
        model(**inputs)
    assert read == [0, 3] * 2, "three layers share a mask"
    assert len(captured.passes) == 2

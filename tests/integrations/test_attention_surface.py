"""Captured attention where a model, a cache or a kernel is not what it usually is: followed, or refused by name."""

from __future__ import annotations

import inspect
import pickle
import weakref
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from architectures.zoo import example, randomized  # noqa: E402
from integrations.test_attention_capture import (  # noqa: E402
    assert_same,
    eager_weights,
    segments_of,
    sliding_model,
    sums_by_segment,
)
from integrations.test_transformers import TEXT  # noqa: E402

from vgpo_kernels.integrations.surface import UnknownSurfaceError  # noqa: E402
from vgpo_kernels.integrations.transformers import GENERATED, capture_attention, capture_attention_mass  # noqa: E402


def hybrid_model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    layer_types = ["linear_attention", "full_attention"] * 2
    config = transformers.Qwen3_5TextConfig(
        **{**TEXT, "num_hidden_layers": 4}, head_dim=8, layer_types=layer_types, **sizes
    )
    return transformers.Qwen3_5ForCausalLM(config).eval()


def test_layers_of_a_hybrid_model_have_the_decoders_numbers() -> None:
    model, ids = hybrid_model(), torch.arange(20, 26)[None]
    segments = torch.zeros(1, 6, dtype=torch.int64)
    for layers, expected in ((None, (1, 3)), ((-1,), (3,)), ((1,), (1,))):
        with torch.no_grad(), capture_attention_mass(model, segments, layers=layers) as captured:
            model(ids)
        assert captured.layers == expected and captured.masses.shape[1] == len(expected)
    with (
        pytest.raises(ValueError, match=r"layers \[0, 2\] of Qwen3_5TextModel have no attention.*these have: 1, 3"),
        capture_attention(model, print, layers=(0, 1, -2)),
    ):
        pass
    with pytest.raises(ValueError, match=r"layers must lie in \[-4, 4\)"), capture_attention(model, print, layers=(4,)):
        pass


def test_a_cache_that_is_not_recognised_is_no_empty_one() -> None:
    model, ids = sliding_model(window=8), torch.arange(20, 26)[None]
    segments = torch.zeros(1, 6, dtype=torch.int64)

    class Hidden:
        """A cache by another surface: it says nowhere how many tokens it holds."""

        def __init__(self) -> None:
            self.keys: dict[int, tuple[Tensor, Tensor]] = {}

        def update(self, key: Tensor, value: Tensor, layer: int, **_: Any) -> tuple[Tensor, Tensor]:
            if layer in self.keys:
                key, value = (torch.cat(pair, dim=2) for pair in zip(self.keys[layer], (key, value), strict=True))
            self.keys[layer] = (key, value)
            return key, value

    cache = Hidden()
    attentions = [layer.self_attn for layer in model.model.layers]
    name = "cache" if "cache" in inspect.signature(type(attentions[0]).forward).parameters else "past_key_values"
    for attention in attentions:
        attention.register_forward_pre_hook(lambda _, inputs, named: (inputs, {**named, name: cache}), with_kwargs=True)
    with torch.no_grad(), capture_attention_mass(model, segments) as captured:
        model(ids[:, :5], use_cache=False)
        with pytest.raises(
            UnknownSurfaceError, match=r"6 keys in a pass of 1 tokens.*this adapter knows transformers 5\.\d+"
        ):
            model(ids[:, 5:], use_cache=False)
    assert captured.masses.shape[2] == 5


def test_a_transformers_without_the_look_up_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        transformers.AttentionInterface, "get_interface", lambda self, name, fallback: None, raising=True
    )
    with (
        pytest.raises(UnknownSurfaceError, match=r"takes \(self, name, fallback\)"),
        capture_attention(sliding_model(window=8), print),
    ):
        pass


def test_an_output_that_is_no_softmax_under_its_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that sees a chunk and tells nobody, as flash attention would where its mask cannot say so."""
    model, ids = sliding_model(window=64), torch.arange(20, 44)[None]
    segments = torch.zeros(1, 24, dtype=torch.int64)

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **options: Any) -> Any:
        place = torch.arange(24)
        visible = (place[:, None] >= place) & (place[:, None] // 8 == place // 8)
        result = nn.functional.scaled_dot_product_attention(q, k, v, visible, scale=options["scaling"], enable_gqa=True)
        return result.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "silent", attend)
    flash_mask = transformers.masking_utils.flash_attention_mask
    monkeypatch.setitem(transformers.AttentionMaskInterface._global_mapping, "silent", flash_mask)
    model.set_attn_implementation("silent")
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"attention of layer 0 \(Qwen2Attention, silent\) is no softmax of q k\^T"),
        capture_attention_mass(model, segments),
    ):
        model(ids)


def test_a_layer_whose_attention_is_not_called_by_name_is_refused() -> None:
    model, ids = sliding_model(window=8), torch.arange(20, 26)[None]
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **_: (hidden_states, None)
    segments = torch.zeros(1, 6, dtype=torch.int64)
    with torch.no_grad(), capture_attention_mass(model, segments, layers=(0,)) as captured:
        model(ids)
    assert captured.layers == (0,)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"layers \[1\] of Qwen2Model did not call their attention by name"),
        capture_attention_mass(model, segments),
    ):
        model(ids)


def test_a_cache_that_drops_other_keys_than_the_first_is_refused() -> None:
    """Unlimited OCR keeps the prompt and forgets what was generated: nothing tells which tokens its keys are."""
    if not hasattr(transformers, "UnlimitedOcrConfig"):
        pytest.skip("this release of transformers has no Unlimited OCR")
    model, inputs = example("unlimited_ocr")
    segments = segments_of(model, inputs)
    with capture_attention_mass(model, segments) as captured:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert len(captured.passes) == 3
    with (
        pytest.raises(ValueError, match=r"cache of layer 0 of UnlimitedOcrTextModel .* keeps 16 of 17 keys"),
        capture_attention_mass(model, segments),
    ):
        model.generate(**inputs, max_new_tokens=6, do_sample=False)


def test_cross_attention_is_not_the_layers_own() -> None:
    torch.manual_seed(0)
    sizes = {**TEXT, "head_dim": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = transformers.T5GemmaConfig(
        encoder=sizes, decoder={**sizes, "cross_attention_hidden_size": 32}, is_encoder_decoder=True
    )
    model = transformers.T5GemmaForConditionalGeneration(config).eval()
    decoder = model.get_decoder()
    source, ids = torch.arange(30, 36)[None], torch.arange(20, 29)[None]
    segments = (torch.arange(9) // 3)[None]
    model.set_attn_implementation("eager")
    with torch.no_grad(), capture_attention_mass(model, segments, norm=decoder.norm) as captured:
        weights = model(input_ids=source, decoder_input_ids=ids, output_attentions=True).decoder_attentions
    assert_same(captured.masses, sums_by_segment(weights, segments).mean(2), torch.ones(1, 9))


def test_layers_that_compute_their_last_query_only() -> None:
    """Gemma 4's last layers share keys of others, and in a prompt only its last token goes through them."""
    layer_types = ["sliding_attention", "full_attention"] * 2
    config = transformers.Gemma4TextConfig(
        **{**TEXT, "num_hidden_layers": 4},
        head_dim=8,
        global_head_dim=8,
        layer_types=layer_types,
        sliding_window=8,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=96,
    )
    model = randomized(transformers.Gemma4ForCausalLM(config)).eval()
    inputs = {"input_ids": torch.arange(20, 32).repeat(2, 1), "attention_mask": torch.ones(2, 12, dtype=torch.int64)}
    segments = (torch.arange(12) // 4).expand(2, -1)
    options = {"max_new_tokens": 3, "do_sample": False}
    shared = 3
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        with capture_attention_mass(model, segments, layers=(shared,)) as captured:
            ids = model.generate(**inputs, **options)
        number = captured.masses.shape[2]
        whole = {"input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1])}
        later = nn.functional.pad(segments, (0, 2), value=GENERATED)
        expected = sums_by_segment(eager_weights(model, whole), later).mean(2)[:, [shared], -number:]
        assert_same(captured.masses, expected, torch.ones(2, number))
    if number < 14:
        with capture_attention_mass(model, segments) as captured:
            model.generate(**inputs, **options)
        with pytest.raises(RuntimeError, match="have different numbers of queries"):
            _ = captured.masses


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_virtual_tokens_are_refused(kind: str) -> None:
    peft = pytest.importorskip("peft")
    model = sliding_model(window=64)
    tuned = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="prompt and prefix tuning"), capture_attention(tuned, print):
        pass


def test_rows_that_beam_search_exchanges_are_not_joined() -> None:
    model, ids = sliding_model(window=64), torch.arange(20, 29).repeat(2, 1)
    segments = torch.zeros_like(ids)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    plain = model.generate(ids, **options)
    with capture_attention_mass(model, segments) as captured:
        model.generate(ids, num_beams=3, **options)
    assert [masses.shape[2] for masses in captured.passes] == [9, 1, 1, 1]
    with pytest.raises(RuntimeError, match="beam search exchanged rows"):
        _ = captured.masses
    with capture_attention_mass(model, segments) as captured:
        assert torch.equal(model.generate(ids, **options), plain)
    assert captured.masses.shape[2] == 12


def test_copies_of_one_cache_are_sequences_of_their_own() -> None:
    model, ids = sliding_model(window=64), torch.arange(20, 30)[None]
    segments = (torch.arange(10) // 5)[None]
    cache = transformers.DynamicCache()
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with torch.no_grad(), capture_attention_mass(model, segments) as captured:
        model(ids[:, :6], **{name: cache})
        first, second = deepcopy(cache), deepcopy(cache)
        for copy in (first, second):
            model(ids[:, 6:8], **{name: copy})
            model(ids[:, 8:], **{name: copy})
        model(ids[:, 6:], **{name: cache})
    assert [masses.shape[2] for masses in captured.sequences] == [10, 4, 4]
    torch.testing.assert_close(captured.sequences[1], captured.sequences[0][:, :, 6:])
    torch.testing.assert_close(captured.sequences[2], captured.sequences[1])


def test_a_cache_of_the_same_length_is_no_continuation() -> None:
    """Nor is one that lives where a cache lived that is gone; one that the decoder made itself is."""
    model, ids = sliding_model(window=64), torch.arange(20, 30)[None]
    segments = torch.zeros_like(ids)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    other = transformers.DynamicCache()
    with torch.no_grad():
        model(ids[:, :6], **{name: other})
        with capture_attention_mass(model, segments) as captured:
            model(ids[:, :6], use_cache=False)
            model(ids[:, 6:], **{name: other})
        assert [masses.shape[2] for masses in captured.sequences] == [6, 4]
        with capture_attention_mass(model, segments) as captured:
            made = model(ids[:, :6], use_cache=True)[name]
            model(ids[:, 6:], **{name: made})
        assert captured.masses.shape[2] == 10
        with capture_attention_mass(model, segments[:2]) as captured:
            made = model(ids[:, :6].repeat(2, 1), use_cache=True)[name]
            made.reorder_cache(torch.tensor([1, 0]))
            model(ids[:, 6:].repeat(2, 1), **{name: made})
        with pytest.raises(RuntimeError, match="exchanged rows"):
            _ = captured.masses


def test_caches_are_left_as_they_were() -> None:
    model, ids = sliding_model(window=64), torch.arange(20, 30)[None]
    methods = dict(vars(transformers.Cache))
    kept: list[Any] = []
    with torch.no_grad(), capture_attention_mass(model, torch.zeros_like(ids)):
        for _ in range(3):
            out = model.generate(ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
            cache = next(value for value in out.values() if hasattr(value, "get_seq_length"))
            kept.append(weakref.ref(cache))
            copy = pickle.loads(pickle.dumps(cache))
            assert copy.get_seq_length() == cache.get_seq_length()
            del out, cache, copy
        assert not any(reference() for reference in kept), "no collection is needed"
    assert dict(vars(transformers.Cache)) == methods


def test_a_row_of_nan_is_nobody_elses() -> None:
    model, ids = sliding_model(window=64), torch.arange(20, 30).repeat(2, 1)
    embeds = model.get_input_embeddings()(ids).detach()
    embeds[1, 0] = torch.nan
    segments = torch.zeros_like(ids)
    with torch.no_grad(), capture_attention_mass(model, segments) as captured:
        model(inputs_embeds=embeds)
    assert captured.masses[0].isfinite().all()


def test_the_window_of_an_encoder_decoder_drops_its_first_keys() -> None:
    torch.manual_seed(0)
    sizes = {**TEXT, "head_dim": 8, "attn_logit_softcapping": None, "sliding_window": 4}
    sizes |= {"layer_types": ["sliding_attention", "full_attention"]}
    config = transformers.T5GemmaConfig(
        encoder=sizes, decoder={**sizes, "cross_attention_hidden_size": 32}, is_encoder_decoder=True
    )
    model = transformers.T5GemmaForConditionalGeneration(config).eval()
    decoder, source = model.get_decoder(), torch.arange(30, 36)[None]
    model.set_attn_implementation("eager")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "decoder_start_token_id": 1}
    segments = torch.zeros(1, 1, dtype=torch.int64)
    with capture_attention_mass(model, segments, norm=decoder.norm) as captured:
        ids = model.generate(source, **options)
    with torch.no_grad():
        ids = ids[:, : captured.masses.shape[2]]
        weights = model(input_ids=source, decoder_input_ids=ids, output_attentions=True).decoder_attentions
    later = nn.functional.pad(segments, (0, ids.shape[1] - 1), value=GENERATED)
    assert_same(captured.masses, sums_by_segment(weights, later).mean(2), torch.ones_like(ids))


def test_a_pass_that_broke_off_is_no_pass() -> None:
    model, ids = sliding_model(window=64), torch.arange(20, 30)[None]
    segments = torch.zeros_like(ids)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    calls = 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    with capture_attention_mass(model, segments) as captured:
        handle = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids[:, :8], **options)
        handle.remove()
        model.generate(ids, **options)
    assert [masses.shape[2] for masses in captured.sequences] == [8, 12]
    assert [masses.shape[2] for masses in captured.passes] == [8, 10, 1, 1]


def test_assisted_generation_takes_tokens_back() -> None:
    model, assistant = sliding_model(window=64), sliding_model(window=64)
    with torch.no_grad():
        for weight in assistant.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    ids = torch.arange(20, 29)[None]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    segments = torch.zeros_like(ids)
    with capture_attention_mass(model, segments) as captured:
        result = model.generate(ids, assistant_model=assistant, **options)
    number = captured.masses.shape[2]
    assert 9 + 7 <= number <= 9 + 8 and sum(masses.shape[2] for masses in captured.passes) > number
    whole = {"input_ids": result[:, :number], "attention_mask": torch.ones_like(result[:, :number])}
    later = nn.functional.pad(segments, (0, number - 9), value=GENERATED)
    assert_same(captured.masses, sums_by_segment(eager_weights(model, whole), later).mean(2), torch.ones(1, number))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_graph_that_checkpointing_would_drop_is_refused(reentrant: bool) -> None:
    model, ids = sliding_model(window=64).train(), torch.arange(20, 29)[None]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    capture = capture_attention_mass(model, torch.zeros_like(ids), differentiable=True)
    with pytest.raises(ValueError, match="under gradient checkpointing"), capture:
        model(ids)


def test_blocks_may_end_in_any_order() -> None:
    one, other, ids = sliding_model(window=64), sliding_model(window=64), torch.arange(20, 29)[None]
    find = transformers.AttentionInterface.get_interface
    first, second = (capture_attention_mass(model, torch.zeros_like(ids)) for model in (one, other))
    with torch.no_grad():
        a, b = first.__enter__(), second.__enter__()
        one(ids)
        first.__exit__(None, None, None)
        other(ids)
        second.__exit__(None, None, None)
    assert a.masses.shape == b.masses.shape
    assert transformers.AttentionInterface.get_interface is find


def test_attention_with_dropout_is_verified_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**TEXT, attention_dropout=0.5)
    model, ids = transformers.Qwen2ForCausalLM(config).train(), torch.arange(20, 44)[None]
    segments = torch.zeros_like(ids)
    with capture_attention_mass(model, segments) as captured:
        model(ids)
    assert captured.masses.shape == (1, 2, 24, 3)

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **options: Any) -> Any:
        half = options["scaling"] / 8
        result = nn.functional.scaled_dot_product_attention(
            q, k, v, None, options["dropout"], True, scale=half, enable_gqa=True
        )
        return result.transpose(1, 2).contiguous(), None

    for name, mapping in (
        ("sdpa", transformers.AttentionInterface._global_mapping),
        ("softer", transformers.AttentionInterface._global_mapping),
    ):
        monkeypatch.setitem(mapping, name, attend)
        monkeypatch.setitem(transformers.AttentionMaskInterface._global_mapping, name, lambda **_: None)
        model.set_attn_implementation(name)
        # The name that was verified before leads to another function now.
        with pytest.raises(ValueError, match="no softmax of q k"), capture_attention_mass(model, segments):
            for weight in model.parameters():
                weight.data.mul_(3)
            model(ids)


def test_a_kernel_that_forgets_its_window_is_noticed_once_there_is_more_to_see(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sliding_model(window=10)

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **options: Any) -> Any:
        result = nn.functional.scaled_dot_product_attention(
            q, k, v, None, is_causal=True, scale=options["scaling"], enable_gqa=True
        )
        return result.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "endless", attend)
    monkeypatch.setitem(transformers.AttentionMaskInterface._global_mapping, "endless", lambda **_: None)
    model.set_attn_implementation("endless")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
        for length, refused in ((9, False), (14, True)):
            ids = torch.arange(20, 20 + length)[None]
            with (
                pytest.raises(ValueError, match=r"layer 0 .* no softmax") if refused else nullcontext(),
                capture_attention_mass(model, torch.zeros_like(ids)),
            ):
                model(ids)


def test_a_bias_in_a_mask_is_refused() -> None:
    model, ids = sliding_model(window=64), torch.arange(20, 26)[None]
    bias = torch.zeros(1, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf) - 0.1 * torch.arange(6)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="mask of layer 0 adds a bias"),
        capture_attention_mass(model, torch.zeros(1, 6, dtype=torch.int64)),
    ):
        model(ids, attention_mask={"full_attention": bias, "sliding_attention": bias})

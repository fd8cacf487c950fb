"""The hook on the final norm and the visual mask, on models as transformers builds them, with random weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from vgpo_kernels import VGPOConfig, linear_logprob, vgpo_loss, visual_focus  # noqa: E402
from vgpo_kernels.integrations.transformers import (  # noqa: E402
    capture_hidden_states,
    final_norm,
    unwrap,
    visual_mask,
    visual_token_ids,
)
from vgpo_kernels.ops import linear_vgpo_loss as linear_ops  # noqa: E402

IMAGE, VIDEO, VISION_START, VISION_END, VOCABULARY = 90, 91, 92, 93, 96
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
VISUAL_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
FAMILIES = ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "llava":
        config = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=32,
                projection_dim=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=8,
                patch_size=4,
            ),
            text_config=transformers.Qwen2Config(**TEXT),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
        )
        return transformers.LlavaForConditionalGeneration(config).eval()
    if family == "qwen2_vl":
        config = transformers.Qwen2VLConfig(
            text_config={**TEXT, "rope_parameters": MROPE},
            vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
            **VISUAL_TOKENS,
        )
        return transformers.Qwen2VLForConditionalGeneration(config).eval()
    if family == "qwen2_5_vl":
        config = transformers.Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_parameters": MROPE},
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 32,
                "out_hidden_size": 32,
                "num_heads": 2,
                "patch_size": 4,
                "window_size": 16,
                "fullatt_block_indexes": [0],
            },
            **VISUAL_TOKENS,
        )
        return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **VISUAL_TOKENS,
    )
    return transformers.Qwen3VLForConditionalGeneration(config).eval()


def batch_with_images(family: str) -> dict[str, torch.Tensor]:
    """Two sequences of four image tokens each, left-padded: text, image, text."""
    generator = torch.Generator().manual_seed(1)
    if family == "llava":
        image = [IMAGE] * 4
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    else:
        image = [VISION_START, *[IMAGE] * 4, VISION_END]
        inputs = {
            "pixel_values": torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=generator),
            "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        }
    rows = [[5, *image, 6, 7, 8, 9], [0, *image, 10, 11, 12, 2]]
    ids = torch.tensor(rows)
    inputs["input_ids"] = ids
    inputs["attention_mask"] = (ids != 0).long()
    if family != "llava":
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_captures_what_the_lm_head_reads(family):
    model, inputs = build(family), batch_with_images(family)
    with torch.no_grad(), capture_hidden_states(model) as captured:
        logits = model(**inputs).logits
    assert captured.hidden.shape == (*inputs["input_ids"].shape, TEXT["hidden_size"])
    torch.testing.assert_close(model.get_output_embeddings()(captured.hidden), logits)
    shown = visual_mask(inputs["input_ids"], model)
    assert shown.sum(dim=1).tolist() == [4, 4]
    cos = visual_focus(captured.hidden, shown, torch.ones(2, 3, dtype=torch.bool))
    expected = torch.cosine_similarity(captured.hidden[:, -3:], captured.hidden[:, -9:-5].mean(1, keepdim=True), dim=-1)
    if family == "llava":  # no token marks the end of its image, which therefore stands one position later
        expected = torch.cosine_similarity(
            captured.hidden[:, -3:], captured.hidden[:, -8:-4].mean(1, keepdim=True), dim=-1
        )
    torch.testing.assert_close(cos, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_last_of_output_hidden_states(family):
    model, inputs = build(family), batch_with_images(family)
    with torch.no_grad(), capture_hidden_states(model) as captured:
        everything = model(**inputs, output_hidden_states=True).hidden_states
    assert torch.equal(captured.hidden, everything[-1])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_video_tokens_are_visual(family):
    model = build(family)
    if family == "qwen3_vl":  # it writes a video as one image a frame pair, timestamps between them
        frames = [VISION_START, *[VIDEO] * 4, VISION_END] * 2
    else:
        frames = [VISION_START, *[VIDEO] * 8, VISION_END]
    ids = torch.tensor([[5, *frames, 6, 7]])
    with torch.no_grad(), capture_hidden_states(model) as captured:
        model(
            input_ids=ids,
            mm_token_type_ids=(ids == VIDEO).int() * 2,
            pixel_values_videos=torch.randn(2 * 16, 3 * 2 * 4 * 4),
            video_grid_thw=torch.tensor([[2, 4, 4]]),
        )
    shown = visual_mask(ids, model)
    assert shown.sum() == 8
    cos = visual_focus(captured.hidden, shown, torch.ones(1, 2, dtype=torch.bool))
    prototype = captured.hidden[shown].mean(dim=0)
    torch.testing.assert_close(cos[0], torch.cosine_similarity(captured.hidden[0, -2:], prototype[None], dim=-1))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_captures_once_and_leaves_gradients_alone(reentrant):
    inputs = batch_with_images("qwen2_5_vl")

    def gradients(checkpointing: bool, capture: bool) -> tuple[list[torch.Tensor], int]:
        model = build("qwen2_5_vl").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        number = 0
        if capture:
            with capture_hidden_states(model) as captured:
                loss = model(**inputs, labels=inputs["input_ids"]).loss
            assert not captured.hidden.requires_grad
            loss.backward()
            number = len(captured.passes)
        else:
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return [weight.grad for weight in model.parameters() if weight.grad is not None], number

    plain, _ = gradients(checkpointing=False, capture=False)
    checkpointed, number = gradients(checkpointing=True, capture=True)
    assert number == 1
    assert len(plain) == len(checkpointed)
    torch.testing.assert_close(plain, checkpointed)


# ---- tokens that the policy sampled ------------------------------------------------------------------------------


def test_sampled_visual_tokens_are_no_image():
    ids = torch.tensor([[IMAGE, 5, IMAGE, 6, VIDEO, IMAGE], [5, 6, 7, IMAGE, 6, 5]])
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])  # the first response's second token and the other's first are a tool's
    expected = [[True, False, True, False, True, False], [False, False, False, True, False, False]]
    assert visual_mask(ids, (IMAGE, VIDEO), mask).tolist() == expected
    whole = nn.functional.pad(mask, (3, 0)).bool()
    assert visual_mask(ids, (IMAGE, VIDEO), whole).tolist() == expected
    assert visual_mask(ids.flatten(), (IMAGE, VIDEO), whole.flatten()).tolist() == expected[0] + expected[1]
    assert visual_mask(ids, (IMAGE, VIDEO)).sum() == 5


def test_the_pages_loop_leaves_out_what_was_sampled():
    """The block as it stands in docs/integrate.md, on an answer that has a placeholder."""
    config = transformers.Qwen2Config(**{**TEXT, "num_hidden_layers": 2})
    config.image_token_id = IMAGE
    model = transformers.Qwen2ForCausalLM(config).eval()
    ids = torch.randint(3, IMAGE, (2, 9), generator=torch.Generator().manual_seed(1))
    ids[:, 1:3] = ids[0, 6] = IMAGE
    rollout = sampled({}, 4)
    scope = {"model": model, "inputs": {"input_ids": ids}, **rollout, "logp": rollout["old_logp"].clone()}
    exec(page_block("## Your own loop"), scope)
    shown = ids == IMAGE
    shown[0, 6] = False
    assert torch.equal(scope["cos"], visual_focus(scope["captured"].hidden, shown, rollout["response_mask"]))
    assert scope["loss"].isfinite()


# ---- a loss from hidden states -----------------------------------------------------------------------------------

INTEGRATE = Path(__file__).resolve().parents[2] / "docs" / "integrate.md"


def page_block(title: str) -> str:
    """The first Python block of docs/integrate.md after a title or the like."""
    return INTEGRATE.read_text().partition(title)[2].partition("```python\n")[2].partition("```")[0]


def sampled(inputs: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """What a loop knows of the last tokens of a batch of two."""
    generator = torch.Generator().manual_seed(2)
    return {
        "old_logp": -torch.rand(2, length, generator=generator) - 3,
        "advantages": torch.tensor([1.0, -1.0]),
        "response_mask": torch.ones(2, length, dtype=torch.bool),
        "group_ids": torch.zeros(2, dtype=torch.int64),
    }


def build_demo() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    tiny_vlm = pytest.importorskip("vgpo_trainer.demo.tiny_vlm")
    processor = tiny_vlm.build_processor()
    images = torch.randint(0, 256, (2, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    texts = [f"{tiny_vlm.IMAGE}{tiny_vlm.RESPOND}{answer}" for answer in ("1+2=3", "4+4=8")]
    inputs = processor(text=texts, images=[image.numpy() for image in images], return_tensors="pt")
    return tiny_vlm.build_model(processor), dict(inputs)


@pytest.mark.parametrize("family", [*FAMILIES, "demo"])
def test_the_pages_loss_without_logits_trains_the_decoder(family):
    """The block as it stands in docs/integrate.md: the gradients of the logits' loss, in every parameter."""
    model, inputs = build_demo() if family == "demo" else (build(family), batch_with_images(family))
    model.float()
    rollout = sampled(inputs, 3)
    scope = {"model": model, "inputs": inputs, **rollout}
    exec(page_block("### Without logits"), scope)
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    decoder = [name for name in found if "layers" in name and "language_model" in name]
    assert decoder and all(found[name].abs().max() > 0 for name in decoder)

    model.zero_grad()
    with capture_hidden_states(model) as captured:
        logits = model(**inputs).logits
    # What the page says to ask of a model: its head is all that it does.
    torch.testing.assert_close(scope["head"](scope["hidden"]), logits)
    table = logits[:, -4:-1].log_softmax(-1)
    logp = table.gather(-1, inputs["input_ids"][:, -3:, None])[..., 0]
    arguments = (rollout["old_logp"], rollout["advantages"], visual_mask(inputs["input_ids"], model))
    loss = vgpo_loss(
        captured.hidden, logp, *arguments, rollout["response_mask"], rollout["group_ids"], VGPOConfig.paper()
    ).loss
    loss.backward()
    torch.testing.assert_close(scope["loss"], loss)
    expected = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6 + 1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize(
    ("family", "setting", "given"),
    [
        ("Granite", {"logits_scaling": 4.0}, {"logit_scale": 0.25}),
        ("Cohere", {"logit_scale": 0.25}, {"logit_scale": 0.25}),
        ("Gemma2", {"final_logit_softcapping": 0.05, "head_dim": 8}, {"softcap": 0.05}),
    ],
)
def test_what_the_page_says_of_heads_that_scale_or_cap(family, setting, given):
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**TEXT | setting))
    model.eval()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        hidden, logits = model.model(input_ids=ids).last_hidden_state, model(input_ids=ids).logits
        head = model.get_output_embeddings()
        with pytest.raises(AssertionError):
            torch.testing.assert_close(head(hidden), logits)
        found = linear_logprob(hidden, head.weight, ids, bias=head.bias, **given)
        expected = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        torch.testing.assert_close(found, expected)


def test_detached_states_train_the_head_alone_and_it_is_said():
    model, inputs = build("qwen2_5_vl"), batch_with_images("qwen2_5_vl")
    rollout = sampled(inputs, 3)
    code = page_block("### Without logits").replace("model.model(**inputs).last_hidden_state", "captured.hidden")
    with capture_hidden_states(model) as captured:
        model(**inputs)
    linear_ops._warn_of_detached.cache_clear()
    with pytest.warns(UserWarning, match="trains the head alone"):
        exec(code, {"model": model, "inputs": inputs, "captured": captured, **rollout})
    changed = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert changed == {"lm_head.weight"}


class _Engine(nn.Module):
    """Wraps a model the way DistributedDataParallel, FSDP and DeepSpeed do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, **inputs):
        return self.module(**inputs)


@pytest.mark.parametrize("wrapping", ["ddp", "lora", "lora in ddp"])
def test_finds_the_norm_in_wrapped_models(wrapping):
    model, inputs = build("qwen2_vl"), batch_with_images("qwen2_vl")
    with torch.no_grad(), capture_hidden_states(model) as captured:
        model(**inputs)
    plain = captured.hidden
    wrapped = model
    if "lora" in wrapping:
        peft = pytest.importorskip("peft")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)).eval()
    if "ddp" in wrapping:
        wrapped = _Engine(wrapped)
    assert unwrap(wrapped) is model
    with torch.no_grad(), capture_hidden_states(wrapped) as captured:
        wrapped(**inputs)
    torch.testing.assert_close(captured.hidden, plain)  # a fresh LoRA adapter adds nothing


def test_finds_the_norm_in_a_compiled_model():
    model = build("llava")
    assert final_norm(_Engine(torch.compile(model))) is model.model.language_model.norm


def test_a_consumer_gets_each_pass_and_nothing_is_kept():
    model, inputs = build("llava"), batch_with_images("llava")
    seen = []
    with torch.no_grad(), capture_hidden_states(model, seen.append) as captured:
        for row in range(2):
            model(**{name: value[row : row + 1] for name, value in inputs.items()})
    assert [hidden.shape[0] for hidden in seen] == [1, 1]
    assert captured.passes == []
    with torch.no_grad(), capture_hidden_states(model) as captured:
        model(**inputs)
    torch.testing.assert_close(torch.cat(seen), captured.hidden, atol=1e-5, rtol=1e-5)


def test_the_hook_is_gone_after_the_block():
    model, inputs = build("llava"), batch_with_images("llava")
    with pytest.raises(KeyError), capture_hidden_states(model) as captured:
        raise KeyError
    with torch.no_grad():
        model(**inputs)
    assert captured.passes == []
    assert not final_norm(model)._forward_hooks


def test_hidden_is_refused_where_it_would_be_ambiguous():
    model, inputs = build("llava"), batch_with_images("llava")
    with capture_hidden_states(model) as captured, pytest.raises(RuntimeError, match="no forward pass"):
        captured.hidden  # noqa: B018
    with torch.no_grad(), capture_hidden_states(model) as captured:
        model(**inputs)
        model(**inputs)
    assert len(captured.passes) == 2
    with pytest.raises(RuntimeError, match="2 forward passes"):
        captured.hidden  # noqa: B018


def test_token_ids_come_from_any_config():
    assert visual_token_ids(build("qwen3_vl")) == (IMAGE, VIDEO)
    assert visual_token_ids(build("llava").config) == (IMAGE,)
    with pytest.raises(ValueError, match="image_token_id"):
        visual_token_ids(transformers.Qwen2Config(**TEXT))
    with pytest.raises(ValueError, match="cross-attention"):
        visual_token_ids(transformers.MllamaConfig())


def test_visual_mask_counts_several_images_in_any_layout():
    packed = torch.tensor([5, IMAGE, IMAGE, 6, VIDEO, 7, IMAGE])
    assert visual_mask(packed, (IMAGE, VIDEO)).tolist() == [False, True, True, False, True, False, True]
    assert visual_mask(packed.reshape(1, 7), [IMAGE]).sum() == 3


def test_a_module_without_a_norm_is_named():
    with pytest.raises(TypeError, match="no final norm in Linear"):
        final_norm(nn.Linear(2, 2))


def test_importing_the_library_imports_no_framework():
    script = (
        "import sys, vgpo_kernels, vgpo_kernels.integrations, vgpo_kernels.integrations.transformers;"
        "loaded = {'transformers', 'trl', 'peft', 'accelerate'} & set(sys.modules);"
        "sys.exit(f'imported {loaded}' if loaded else 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)

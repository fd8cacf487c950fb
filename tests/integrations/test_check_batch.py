"""check_batch in a loop on a real model: the model says what its head, its norm and its image tokens are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from integrations.rollout_case import IMAGE, tiny_model

from vgpo_kernels import check_batch
from vgpo_kernels.integrations.transformers import capture_hidden_states, final_norm, visual_mask

PROMPTS, GENERATIONS, PROMPT, RESPONSE = 2, 4, 9, 7
TEMPERATURE = 0.8


@pytest.fixture
def model() -> Any:
    built = tiny_model()
    with torch.no_grad():  # so that layers and temperatures show
        built.lm_head.weight.mul_(8)
    return built


def loop(model: Any) -> dict[str, Any]:
    """What a loop of one's own has before its loss."""
    torch.manual_seed(0)
    prompts = torch.randint(8, 32, (PROMPTS, PROMPT))
    prompts[:, 2:6] = IMAGE
    responses = torch.randint(8, 32, (PROMPTS * GENERATIONS, RESPONSE))
    ids = torch.cat([prompts.repeat_interleave(GENERATIONS, 0), responses], 1)
    mask = torch.ones(responses.shape, dtype=torch.bool)
    with capture_hidden_states(model) as captured:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    logits = logits / TEMPERATURE
    logp = logits[:, -RESPONSE - 1 : -1].log_softmax(-1).gather(-1, responses[..., None])[..., 0]
    rewards = torch.randn(PROMPTS, GENERATIONS)
    return {
        "model_or_head": model,
        "hidden": captured.hidden,
        "ids": ids,
        "logp": logp,
        "old_logp": logp.detach(),
        "advantages": (rewards - rewards.mean(1, keepdim=True)).flatten(),
        "visual_mask": visual_mask(ids, model, mask),
        "response_mask": mask,
        "group_ids": torch.arange(PROMPTS).repeat_interleave(GENERATIONS),
        "temperature": TEMPERATURE,
    }


@pytest.mark.parametrize("wrapped", [False, True])
def test_nothing_is_found_in_a_right_loop(model: Any, wrapped: bool) -> None:
    batch = loop(model)
    if wrapped:
        batch["model_or_head"] = torch.nn.parallel.DataParallel(model)
    found = check_batch(**batch)
    assert found == () and found.unchecked == ()


def test_states_before_the_final_norm(model: Any) -> None:
    before: list[torch.Tensor] = []
    handle = final_norm(model).register_forward_pre_hook(lambda _, arguments: before.append(arguments[0].detach()))
    batch = loop(model)
    handle.remove()
    (finding,) = check_batch(**batch | {"hidden": before[0]})
    assert finding.name == "hidden-states" and "after the model's final norm" in finding.message


def test_states_of_another_layer(model: Any) -> None:
    batch = loop(model)
    ids = batch["ids"]
    states = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states
    (finding,) = check_batch(**batch | {"hidden": states[-2].detach()})
    assert finding.name == "hidden-states" and "of the same tokens, weights and pass" in finding.message


def test_a_mask_of_images_that_is_shifted(model: Any) -> None:
    batch = loop(model)
    (finding,) = check_batch(**batch | {"visual_mask": batch["visual_mask"].roll(1, -1)})
    assert finding.name == "visual-mask" and "at 8 of its 32 positions" in finding.message


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({"logit_scale": 0.25}, lambda logits: 0.25 * logits),
        ({"logits_scaling": 4.0}, lambda logits: logits / 4),
        ({"final_logit_softcapping": 0.5}, lambda logits: 0.5 * torch.tanh(2 * logits)),
    ],
)
def test_what_a_configuration_says_of_logits(
    model: Any, monkeypatch: pytest.MonkeyPatch, settings: dict[str, float], change: Any
) -> None:
    """Cohere's, Granite's and Gemma's names."""
    plain = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: SimpleNamespace(logits=change(plain(**inputs).logits)))
    batch = loop(model)
    assert set(check_batch(**batch).names) <= {"temperature", "hidden-states"} and check_batch(**batch)
    for name, value in settings.items():
        monkeypatch.setattr(model.config.get_text_config(), name, value, raising=False)
    assert check_batch(**batch) == ()


@pytest.mark.parametrize("padding", [3, 2])
def test_what_follows_the_end_of_a_response(model: Any, padding: int) -> None:
    """Padding of an id of its own, and by the id of the end. The policy's own end is scored."""
    batch = loop(model)
    batch["ids"][0, -3] = 2
    batch["ids"][0, -2:] = padding
    batch |= {"logp": None, "old_logp": None, "hidden": None}
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [2, 4], padding
    (finding,) = check_batch(**batch)
    assert finding.name == "after-end" and "follow the end of a sequence (id 2, 4)" in finding.message
    batch["response_mask"][0, -2:] = False
    assert check_batch(**batch) == ()


def test_a_model_without_its_head(model: Any) -> None:
    found = check_batch(**loop(model) | {"model_or_head": model.model})
    assert found == () and "has no LM head; hand over the whole model" in found.unchecked[0]

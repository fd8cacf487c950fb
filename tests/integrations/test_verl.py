"""Visual focus in the pass of verl's own FSDP engine, on verl's nested batches."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from integrations.rollout_case import IMAGE, last_hidden_states, rollouts, tiny_model
from tolerance import assert_close

pytest.importorskip("verl", reason="verl is not installed (make verl installs it)")

from integrations.verl_case import as_verl_keeps, engine_of, nested
from tensordict import TensorDict
from verl.utils import tensordict_utils
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.utils.padding import response_from_nested

from vgpo_kernels import visual_focus
from vgpo_kernels.integrations.verl import scoring


@pytest.fixture
def model() -> Any:
    return tiny_model()


LENGTHS = ((6, 4), (5, 7), (8, 3))  # prompt and response


def micro_batch(**non_tensor: Any) -> TensorDict:
    generator = torch.Generator().manual_seed(1)
    sequences, masks = [], []
    for prompt, response in LENGTHS:
        ids = torch.randint(8, 32, (prompt + response,), generator=generator)
        ids[1:4] = IMAGE
        sequences.append(ids)
        masks.append(torch.ones(response, dtype=torch.int64))
    data = TensorDict(
        {
            "input_ids": nested(sequences),
            "position_ids": nested([torch.arange(len(ids)) for ids in sequences]),
            "response_mask": nested(masks),
        },
        batch_size=len(LENGTHS),
    )
    tensordict_utils.assign_non_tensor(
        data, use_remove_padding=False, temperature=1.0, calculate_entropy=False, compute_loss=False, **non_tensor
    )
    return data


def test_the_engine_scores_focus_beside_log_probs(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(model, monkeypatch)
    with torch.no_grad():
        _, plain = engine.forward_step(micro_batch(), None, forward_only=True)
        _, scored = engine.forward_step(micro_batch(**{scoring.FLAG: True}), None, forward_only=True)
    assert scoring.FIELD not in plain["model_output"]
    assert torch.equal(plain["model_output"]["log_probs"].values(), scored["model_output"]["log_probs"].values())

    data = micro_batch()
    cos = response_from_nested(scored["model_output"][scoring.FIELD], data["response_mask"])
    for index, ids in enumerate(data["input_ids"].unbind()):
        with torch.no_grad():
            states = model.model(ids[None]).last_hidden_state
        scored_tokens = torch.arange(len(ids))[None] >= LENGTHS[index][0]
        expected = visual_focus(states, (ids == IMAGE)[None], scored_tokens)[scored_tokens]
        assert_close(cos.unbind()[index], expected.double(), name=f"focus of sequence {index}", floor=1e-5)

    with torch.no_grad():
        flags = {scoring.FLAG: True, scoring.ALONE: True}
        _, alone = engine.forward_step(micro_batch(**flags), None, forward_only=True)
    assert set(alone["model_output"]) == {scoring.FIELD, scoring.SECONDS}, (
        "a pass for the focus alone computes the head"
    )
    found = (output["model_output"][scoring.FIELD].values() for output in (alone, scored))
    torch.testing.assert_close(*found, equal_nan=True)
    assert alone["model_output"][scoring.SECONDS].values().shape == (3,)


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_a_worker_looks_at_its_first_micro_batch(
    model: Any, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """Right log-probs pass; those of another temperature than verl says do not."""
    engine = engine_of(model, monkeypatch)
    with torch.no_grad():  # so that temperatures show
        model.lm_head.weight.mul_(8)
    data = micro_batch(**{scoring.FLAG: True})
    if temperature != 1:
        forward_step = engine.prepare_model_outputs

        def colder(*arguments: Any, **named: Any) -> Any:
            output = forward_step(*arguments, **named)
            tensordict_utils.assign_non_tensor(data, temperature=temperature)
            return output

        monkeypatch.setattr(engine, "prepare_model_outputs", colder)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        engine.forward_step(data, None, forward_only=True)
        engine.forward_step(data, None, forward_only=True)
    said = [str(one.message) for one in caught if "first micro-batch" in str(one.message)]
    # Of 14 tokens no more is told.
    wrong = "VGPO's first micro-batch: hidden-states: the LM head gives other log-probabilities on hidden"
    assert [message[: len(wrong)] for message in said] == ([] if temperature == 1 else [wrong])


@pytest.mark.parametrize("theirs", [False, True])
def test_a_pass_for_the_focus_alone_leaves_out_the_head(
    model: Any, monkeypatch: pytest.MonkeyPatch, theirs: bool
) -> None:
    """Also of a forward pass without ``logits_to_keep``, as verl puts one in the place of Qwen2.5-VL's and others."""
    if theirs:

        def forward(input_ids: Any, attention_mask: Any, position_ids: Any, use_cache: bool) -> Any:
            states = model.model(input_ids, attention_mask, position_ids, use_cache=use_cache).last_hidden_state
            return SimpleNamespace(logits=model.lm_head(states))

        monkeypatch.setattr(model, "forward", forward)
    rows = []
    model.lm_head.register_forward_hook(lambda head, arguments, logits: rows.append(logits.shape[1]))
    engine = engine_of(model, monkeypatch)
    found = []
    for flags in ({scoring.FLAG: True}, {scoring.FLAG: True, scoring.ALONE: True}, {scoring.FLAG: True}):
        with torch.no_grad():
            _, output = engine.forward_step(micro_batch(**flags), None, forward_only=True)
        found.append(output["model_output"][scoring.FIELD].values())
    longest = max(map(sum, LENGTHS))
    assert rows == [longest, 1, longest]
    assert torch.equal(found[0].nan_to_num(), found[1].nan_to_num())


def test_packed_sequences(model: Any) -> None:
    """What the engine hands over without padding: all sequences in one row, with what fills it up."""
    batch = rollouts()
    hidden = last_hidden_states(model, batch)
    data = as_verl_keeps(batch)
    ids, mask = data["input_ids"], data["response_mask"]
    packed = torch.cat([*hidden, torch.full((3, 24), torch.nan)])[None]
    padded = torch.nested.to_padded_tensor(nested(hidden), torch.nan)
    found, expected = (scoring.focus_of_packed(states, ids, model, mask) for states in (packed, padded))
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_the_mask_of_responses_has_to_be_nested(model: Any) -> None:
    ids = as_verl_keeps(rollouts())["input_ids"]
    with pytest.raises(TypeError, match=r"response_mask must be nested as input_ids is, got .*\[9, 4\]"):
        scoring.focus_of_packed(torch.zeros(1, 200, 24), ids, model, torch.ones(9, 4))


def test_engines_inherit_the_scoring_pass() -> None:
    """Each language model's engine that verl could import here, by the strategy that it is registered as."""
    registered = transformer_impl.EngineRegistry._engines["language_model"]
    assert {"fsdp", "fsdp2", "fsdp_turbo"} <= set(registered)
    for strategy in ("fsdp", "fsdp2", "fsdp_turbo"):
        for engine in registered[strategy].values():
            assert engine.forward_step.scores_visual_focus, strategy

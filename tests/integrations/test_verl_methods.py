"""Methods beside VGPO in verl: its own engine around a tiny Qwen3-VL, its trainer, and each method by transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("verl", reason="verl is not installed (make verl installs it)")

from architectures.zoo import example
from integrations.rollout_case import rollouts, tiny_model
from integrations.verl_case import as_verl_keeps, engine_of, group_relative, settings, trainer_of
from integrations.verl_methods_case import (
    STEP,
    STEPS,
    TEMPERATURE,
    Row,
    expected_factors,
    expected_signals,
    positions,
    qwen3_vl,
    rows_of_agents,
)
from tolerance import assert_close
from verl import DataProto
from verl.experimental.separation.ray_trainer import SeparateRayPPOTrainer
from verl.utils import tensordict_utils
from verl.workers.utils.padding import response_from_nested

from vgpo_kernels import ShapingConfig
from vgpo_kernels.integrations.methods import k3
from vgpo_kernels.integrations.verl import methods, run, scoring, second_views

NAMES = ("pepo", "vppo", "pgpo", "tor", "vepo")


@pytest.fixture(scope="module")
def model() -> Any:
    return qwen3_vl()


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return rows_of_agents()


def padded(model: Any, rows: list[Row]) -> DataProto:
    """The batch as verl's padded trainers hold it."""
    prompt, response = (max(len(part) for part in parts) for parts in zip(*[row[1:3] for row in rows], strict=True))
    length = prompt + response
    names = ("prompts", "responses", "input_ids", "attention_mask", "response_mask")
    columns: dict[str, list[Tensor]] = {name: [] for name in names}
    places = torch.zeros(len(rows), 4, length, dtype=torch.int64)
    scores = torch.zeros(len(rows), response)
    for index, row in enumerate(rows):
        left, right = prompt - len(row.prompt), response - len(row.response)
        whole = torch.nn.functional.pad(row.tokens, (left, right))
        columns["input_ids"].append(whole)
        columns["prompts"].append(whole[:prompt])
        columns["responses"].append(whole[prompt:])
        columns["attention_mask"].append(torch.nn.functional.pad(torch.ones_like(row.tokens), (left, right)))
        columns["response_mask"].append(torch.nn.functional.pad(torch.tensor(row.sampled), (0, right)))
        places[index, :, left : length - right] = positions(model, row)
        scores[index, len(row.response) - 1] = index**2
    tensors = {name: torch.stack(values) for name, values in columns.items()}
    tensors |= {"position_ids": places, "rm_scores": scores}
    others = {"uid": [row.uid for row in rows], "multi_modal_inputs": [row.multi_modal_inputs for row in rows]}
    return DataProto.from_dict(
        tensors=tensors,
        non_tensors={name: np.array(values, dtype=object) for name, values in others.items()},
        meta_info={"temperature": TEMPERATURE},
    )


def trainer(model: Any, monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> Any:
    config = settings(
        algorithm__vgpo={"method": name},
        algorithm__adv_estimator="grpo",
        actor_rollout_ref__actor__strategy="fsdp2",
        **changes,
    )
    made = trainer_of(SeparateRayPPOTrainer, config, engine_of(model, monkeypatch))
    made.actor_rollout_wg.temperature = TEMPERATURE
    made.global_steps, made.total_training_steps = STEP, STEPS
    made.reward_extra_infos_dict = {}
    return made


@pytest.mark.parametrize(("packed", "bypass"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("name", NAMES)
def test_advantages(
    model: Any, rows: list[Row], monkeypatch: pytest.MonkeyPatch, name: str, packed: bool, bypass: bool
) -> None:
    """From verl's engine to the driver's advantages: the factors of signals that transformers computes alone."""
    made = trainer(model, monkeypatch, name, algorithm__rollout_correction={"bypass_mode": bypass})
    made.actor_rollout_wg.packed = packed
    data = padded(model, rows)
    data.batch["rollout_log_probs"] = torch.full(data.batch["rm_scores"].shape, -1.0)
    made.reward_tensor = data.batch["rm_scores"]
    data = made._fit_compute_advantage(made._fit_compute_log_prob(data))
    expected, share = expected_factors(model, rows, name)
    plain = group_relative([index**2 for index in range(len(rows))], [row.uid for row in rows])
    for index, (found, factors, reward) in enumerate(zip(data.batch["advantages"], expected, plain, strict=True)):
        values = reward * factors.double() * torch.tensor(rows[index].sampled)
        assert_close(found[: len(values)], values, name=f"advantages {index}", floor=1e-4)
        assert not found[len(values) :].any()
    whole = torch.cat(expected)[torch.cat([torch.tensor(row.sampled) for row in rows]).bool()]
    assert whole.std() > 1e-3, "nothing was weighed"
    torch.testing.assert_close(expected[3], torch.full((4,), 1 / share if name == "vepo" else 1.0))  # has no image
    assert made.metrics["vgpo/shaped_responses"] == 3
    assert made.metrics["vgpo/nonfinite_responses"] == 0
    assert made.metrics["vgpo/factor_mean"] == pytest.approx(whole.mean().item(), abs=1e-4)
    assert made.metrics["vgpo/factor_max"] == pytest.approx(whole.max().item(), abs=1e-4)
    assert ("vgpo/scoring_seconds_total" in made.metrics) == (name != "pepo")
    assert {"vgpo/signal_mean", "vgpo/selected_rate", "vgpo/factor_min"} <= made.metrics.keys()


def micro_batch(model: Any, rows: list[Row]) -> Any:
    data = as_verl_keeps(
        rows,
        position_ids=[positions(model, row) for row in rows],
        multi_modal_inputs=[row.multi_modal_inputs for row in rows],
    )
    tensordict_utils.assign_non_tensor(data, use_remove_padding=False, compute_loss=False)
    return data


def images_of(micro_batch: Any) -> list[dict[str, Tensor]]:
    return [dict(getattr(row, "data", row)) for row in micro_batch["multi_modal_inputs"]]


def test_k3_is_bounded() -> None:
    """As the released code of VPPO bounds it: the log-ratio by 20, the value by 10."""
    logp = torch.tensor([-1.0, -60.0, -1.0, -1.0, -1.0])
    other = torch.tensor([-1.0, -1.0, -60.0, -1.1, -torch.inf])
    expected = torch.tensor([0.0, 10.0, 10.0, 0.0048374, 10.0])
    torch.testing.assert_close(k3(logp, other), expected, rtol=1e-4, atol=1e-6)
    assert k3(torch.tensor([torch.nan]), logp[:1]).isnan()


@pytest.mark.parametrize("name", ["vppo", "vepo"])
def test_what_views_share(model: Any, rows: list[Row], name: str) -> None:
    """VPPO's patches are each response's own, VEPO's noise its prompt's; neither depends on how a batch is cut."""
    method = methods.METHODS[name]

    def spoilt(of: list[Row], step: int = STEP) -> list[dict[str, Tensor]]:
        given = micro_batch(model, of)
        found = images_of(second_views.spoilt_images(given, method, model, step))
        for before, row in zip(images_of(given), of, strict=True):
            assert before.keys() == row.multi_modal_inputs.keys()
            assert all(torch.equal(before[key], value) for key, value in row.images.items()), (
                "the policy's images have changed"
            )
        return found

    found, again = spoilt(rows), spoilt([rows[2], rows[3], rows[0]])
    pixels = [one.get("pixel_values") for one in found]
    assert pixels[3] is None
    assert again[1] == {}
    assert torch.equal(again[0]["pixel_values"], pixels[2])
    assert torch.equal(again[2]["pixel_values"], pixels[0])
    assert torch.equal(pixels[0], pixels[2]) == (name == "vepo")
    assert not torch.equal(spoilt(rows, STEP + 1)[0]["pixel_values"], pixels[0])


def test_temperatures_of_responses(model: Any, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    """VEPO's entropies in the head are those that verl computes, also where each response has its temperature."""
    data = micro_batch(model, rows)
    data["temperature"] = torch.tensor([0.5, 1.0, 2.0, 1.5])
    flags = run.Switch(ShapingConfig.vepo(), bypass=False, method="vepo").flags(STEP)
    tensordict_utils.assign_non_tensor(data, calculate_entropy=True, **flags)
    with torch.no_grad():
        _, output = engine_of(model, monkeypatch).forward_step(data, None, forward_only=True)
    found = output["model_output"]
    sampled = scoring.sampled_of_packed(data["input_ids"], data["response_mask"]).roll(-1)
    entropies = (found[name].values()[sampled] for name in (scoring.field_of("entropy"), "entropy"))
    torch.testing.assert_close(*entropies)


@pytest.mark.parametrize("packed", [False, True])
def test_images_that_are_words(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    """ToR takes image tokens out, whatever shows them, and leaves placeholders that the policy sampled."""
    words, batch = tiny_model(), rollouts()
    words.set_attn_implementation("sdpa")
    data = as_verl_keeps(batch)
    flags = run.Switch(ShapingConfig.tor(), bypass=True, method="tor").flags(STEP)
    tensordict_utils.assign_non_tensor(
        data, use_remove_padding=packed, temperature=1.0, calculate_entropy=True, compute_loss=False, **flags
    )
    with torch.no_grad():
        _, output = engine_of(words, monkeypatch).forward_step(data, None, forward_only=True)
    assert set(output["model_output"]) == {*map(scoring.field_of, ("visual", "entropy")), scoring.SECONDS}
    found = response_from_nested(output["model_output"][scoring.field_of("visual")], data["response_mask"])
    for row, rollout in zip(found.unbind(), batch, strict=True):
        ids = torch.tensor(rollout.ids)
        sampled = torch.tensor([0] * len(rollout.prompt) + rollout.response_mask).bool()
        kept = (ids != 7) | sampled
        expected = torch.zeros(len(ids))
        with torch.no_grad():
            for tokens, sign in ((torch.ones_like(kept), 1), (kept, -1)):
                logp = words(ids[tokens][None]).logits[0].log_softmax(-1)
                expected[tokens.nonzero()[1:, 0]] += sign * logp[:-1].gather(1, ids[tokens][1:, None])[:, 0]
        seen = (~kept).cumsum(0) > 0
        expected = expected.abs().masked_fill(~seen, torch.nan).masked_fill(~sampled, 0.0)
        torch.testing.assert_close(row, expected[len(rollout.prompt) :], rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_forward_pass_that_shows_zeros_where_there_is_no_image(
    rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That which verl gives Qwen2-VL, Qwen2.5-VL and GLM-4V (not importable with every transformers): of ToR."""
    model = example("qwen2_5_vl").model
    expected = [expected_signals(model, row, "tor")["visual"] for row in rows]
    zeros = {"hidden_states": torch.zeros(16, 96), "grid_thw": torch.tensor([[1, 4, 4]])}

    def as_verl(module: Any, arguments: Any, given: dict[str, Any]) -> None:
        if given.get("pixel_values") is None:
            assert model.model.visual(**zeros).mean().isfinite()

    model.register_forward_pre_hook(as_verl, with_kwargs=True)
    data = micro_batch(model, rows[:3])  # all of which have images in verl's own pass
    flags = run.Switch(ShapingConfig(), bypass=False, method="tor").flags(STEP)
    tensordict_utils.assign_non_tensor(data, temperature=TEMPERATURE, calculate_entropy=True, **flags)
    with torch.no_grad():
        _, output = engine_of(model, monkeypatch).forward_step(data, None, forward_only=True)
    found = response_from_nested(output["model_output"][scoring.field_of("visual")], data["response_mask"])
    for index, (signal, row) in enumerate(zip(found.unbind(), rows[:3], strict=True)):
        read = torch.tensor(row.sampled).bool() & ~expected[index].isnan()
        assert int(read.sum()) >= 3
        assert_close(signal[read], expected[index][read], name=f"signal {index}", floor=1e-4)
    with pytest.raises(AttributeError, match="mean"):  # what verl says without help
        model(input_ids=rows[3].tokens[None])

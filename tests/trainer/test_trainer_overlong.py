"""``mask_truncated_completions=True``: a response that was cut short is in nobody's loss, nor in any statistic."""

from __future__ import annotations

import math
from statistics import fmean, pstdev
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from trainer.definition import assert_factors, by_definition
from trainer.test_trainer_signal import capture_unshuffled, hidden_and_masks
from trainer.tiny_runs import generation_batch, make_trainer, rows

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")

CUT = (1, 2, 3, 6)  # of the first group one response is left, of the second three


def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """Responses of 4 to 9 tokens of the tiny tokenizer, of which some do not end."""
    completions = []
    for place in range(len(prompts)):
        generator = torch.Generator().manual_seed(place)
        said = torch.randint(7, 20, (4 + place % 6,), generator=generator).tolist()
        completions.append(said if place in CUT else [*said, 1])
    return {
        "prompt_ids": trainer._tokenize_prompts(prompts)[0],
        "completion_ids": completions,
        "logprobs": [[0.0] * len(completion) for completion in completions],
    }


def token_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(completion) % 5) for completion in completion_ids]


@pytest.mark.parametrize("signal", ["focus", "attention"])
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_a_response_that_was_cut_short_is_not_weighted(tmp_path, monkeypatch, preset, signal):
    trainer = make_trainer(
        tmp_path,
        family="qwen2_5_vl",
        dataset=rows([1, 1], size=16),
        reward=token_reward,
        arguments={"rollout_func": rollout},
        per_device_train_batch_size=8,
        mask_truncated_completions=True,
        vgpo_signal="scoring",
        vgpo=preset,
        signal=signal,
    )
    trainer.model.train()
    kept = capture_unshuffled(trainer, monkeypatch)
    found, plain = [], trainer._signal_factors

    def keeping(batch, signal, mode):
        found.append(plain(batch, signal, mode))
        return found[-1]

    monkeypatch.setattr(trainer, "_signal_factors", keeping)
    trainer._prepare_inputs(generation_batch(trainer))
    (made,), (batch,) = found, kept
    cut = torch.tensor([place in CUT for place in range(8)])
    assert torch.equal(batch["completion_mask"].sum(dim=1) == 0, cut)
    assert torch.equal(made.weighted, ~cut) and not made.counted[cut].any()
    assert (made.factors[cut] == 1).all() and (made.psi[cut] == 0).all() and (made.phi[cut] == 0).all()
    assert made.late_early[cut].isnan().all() and made.late_early[~cut].isfinite().all()
    # The one that is left of its group has nobody to be compared with.
    assert made.phi[0] == 0 and made.phi[4:].abs().max() > 0.1 and abs(made.phi[[4, 5, 7]].sum()) < 1e-5
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items() if name.startswith("vgpo/")}
    assert metrics["vgpo/weighted_share"] == 0.5
    assert metrics["vgpo/phi_std"] == pytest.approx(pstdev(made.phi[~cut].tolist()), abs=1e-5)
    if signal == "focus":
        assert_records_as_defined(trainer, batch, metrics)
    for place, sample in enumerate(trainer.rollout_samples):
        assert (sample.tokens == []) == (place in CUT)
        if place in CUT:
            assert sample.phi == 0 and math.isnan(sample.late_early_ratio) and sample.cos == sample.factors == []


def assert_records_as_defined(trainer: Any, batch: dict[str, Any], metrics: dict[str, float]) -> None:
    hidden, shown, mask = hidden_and_masks(trainer, batch)
    config = trainer.args.vgpo_config()
    expected, cosines = by_definition(hidden, shown, mask, [0] * 4 + [1] * 4, config)
    assert_factors(batch["visual_factors"], expected, mask)
    psi = [value for weights in expected for value in weights.psi]
    assert metrics["vgpo/psi_std"] == pytest.approx(pstdev(psi), abs=1e-4)
    assert metrics["vgpo/visual_focus"] == pytest.approx(fmean(cos for row in cosines for cos in row), abs=1e-5)
    offset = min(0.0, *(cos for row in cosines for cos in row))
    ratios = []
    for row in filter(None, cosines):
        rho = [(1 + cos) / 2 if config.score == "affine" else cos - offset for cos in row]
        half = (len(rho) + 1) // 2
        ratios.append(fmean(rho[half:]) / fmean(rho[:half]))
    assert len(ratios) == 4 and metrics["vgpo/late_early_ratio"] == pytest.approx(fmean(ratios), rel=1e-4)

"""Numbers under ``vgpo/`` are of all tokens and responses since the record before, however these were cut."""

from __future__ import annotations

import math
import statistics
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from scipy.stats import spearmanr
from trainer.test_trainer_mixed import mixed
from trainer.tiny_runs import make_trainer
from vgpo_trainer.records import PhiLengthWatch, Running, Statistic, add_records, loss_records, signal_records
from vgpo_trainer.rollouts import RolloutSample
from vgpo_trainer.signals.factors import compute_factors, phi_length

from vgpo_kernels import VGPOConfig


def expected(samples: list[RolloutSample]) -> dict[str, float]:
    """The records of these responses, in plain loops over their tokens."""
    factors = [factor for s in samples for factor, scored in zip(s.factors, s.scored, strict=True) if scored]
    seen = [
        [place for place, scored in enumerate(sample.scored) if scored and math.isfinite(sample.cos[place])]
        for sample in samples
    ]
    weighted = [sample for sample, places in zip(samples, seen, strict=True) if places]
    tokens = [(s.cos[place], s.psi[place]) for s, places in zip(samples, seen, strict=True) for place in places]
    groups = Counter((sample.step, sample.answer) for sample in weighted)
    return {
        "visual_focus": statistics.fmean(cos for cos, _ in tokens),
        "late_early_ratio": statistics.fmean(s.late_early_ratio for s in samples if math.isfinite(s.late_early_ratio)),
        "psi_std": statistics.pstdev(psi for _, psi in tokens),
        "phi_std": statistics.pstdev(sample.phi for sample in weighted),
        "weighted_share": len(weighted) / len(samples),
        "nonfinite_responses": 0,
        "groups": len(groups),
        "singleton_groups": sum(size == 1 for size in groups.values()),
        "factor_mean": statistics.fmean(factors),
        "factor_min": min(factors),
        "factor_max": max(factors),
        "nonfinite_advantages": 0,
    }


def assert_records(record: dict[str, Any], samples: list[RolloutSample], prefix: str = "") -> None:
    for name, value in expected(samples).items():
        assert record[f"{prefix}vgpo/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(
    "settings",
    [
        {"steps_per_generation": 1},
        {"steps_per_generation": 2},
        {"vgpo_signal": "loss", "steps_per_generation": 1},
    ],
    ids=["a batch each", "one batch", "from the loss"],
)
def test_records_are_of_all_that_happened_since_the_last(tmp_path, settings):
    """Two steps of two micro-batches to a record; some rows are text, and responses cut short have no token."""
    trainer = make_trainer(
        tmp_path,
        family="qwen2_5_vl",
        dataset=mixed("images", [1, 0, 1, 1, 1, 0, 1, 1]),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        logging_steps=2,
        max_steps=4,
        max_completion_length=8,
        mask_truncated_completions=True,
        rollout_samples=1000,
        **settings,
    )
    trainer.train()
    records = [record for record in trainer.state.log_history if "loss" in record]
    assert len(records) == 2
    for place, record in enumerate(records):
        samples = [sample for sample in trainer.rollout_samples if sample.step // 2 == place]
        assert len(samples) == 32
        assert_records(record, samples)
    assert all(record["vgpo/groups"] > 3 for record in records)
    assert any(record["vgpo/singleton_groups"] > 0 for record in records)
    assert records[0]["vgpo/factor_min"] < records[0]["vgpo/factor_mean"] < records[0]["vgpo/factor_max"]


def test_records_of_an_evaluation_are_of_all_its_batches(tmp_path):
    """Five rows of two responses in batches of four: the last one is half full."""
    trainer = make_trainer(
        tmp_path,
        family="qwen2_5_vl",
        per_device_eval_batch_size=4,
        num_generations_eval=2,
        rollout_samples=100,
        arguments={"eval_dataset": mixed("images", [1, 1, 0, 1, 1])},
    )
    for _ in range(2):  # the second begins anew
        metrics = trainer.evaluate()
        samples = trainer.rollout_samples[-10:]
        assert_records(metrics, samples, "eval_")
        assert metrics["eval_vgpo/groups"] == 4


def test_groups_that_nothing_compares_are_not_counted(tmp_path):
    """Without phi the signal may be read from micro-batches that cut groups."""
    trainer = make_trainer(
        tmp_path, vgpo_inter=False, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1
    )
    trainer.train()
    record = trainer.state.log_history[0]
    assert record["vgpo/psi_std"] > 0 and record["vgpo/phi_std"] == 0
    assert "vgpo/groups" not in record and "vgpo/singleton_groups" not in record


def statistics_of_loss(number: int, smallest: float, largest: float, nonfinite: int) -> dict[str, Statistic]:
    """As of two processes, of which the second has no token."""
    metrics = {
        "num_tokens": torch.tensor(number),
        "approx_kl": torch.tensor(0.5 if number else 0.0),
        "factor_mean": torch.tensor((smallest + largest) / 2),
        "factor_min": torch.tensor(smallest),
        "factor_max": torch.tensor(largest),
        "nonfinite_advantages": torch.tensor(nonfinite),
    }
    other = torch.tensor([0, 0, 0, 0, torch.inf, -torch.inf])[None]
    return loss_records(metrics, SimpleNamespace(gather=lambda values: torch.cat([values, other])), factors=True)


def test_batches_of_a_loss_add_up():
    kept: dict[str, list[float]] = {}
    add_records(kept, statistics_of_loss(0, 0.0, 0.0, 0))
    nothing = ("old_policy_kl", "factor_mean", "factor_min", "factor_max")
    assert all(math.isnan(*kept[f"vgpo/{name}"]) for name in nothing) and kept["vgpo/nonfinite_advantages"] == [0]
    add_records(kept, statistics_of_loss(6, 0.75, 1.25, 2))
    add_records(kept, statistics_of_loss(2, 0.5, 3.5, 1))
    assert kept == {
        "vgpo/old_policy_kl": [0.5],
        "vgpo/nonfinite_advantages": [3],
        "vgpo/factor_mean": [(6 * 1 + 2 * 2) / 8],
        "vgpo/factor_min": [0.5],
        "vgpo/factor_max": [3.5],
    }


def test_a_number_is_one_however_often_it_is_added_to():
    running = Running()
    for value in range(4):
        running.add(Statistic(float, (value,)))
    assert running == [6]


def test_a_batch_of_unweighted_responses_changes_no_mean() -> None:
    accelerator: Any = SimpleNamespace(reduce=lambda values, reduction: values)
    kept: dict[str, list[float]] = {}

    def add(cos: torch.Tensor) -> dict[str, float]:
        mask, groups = torch.arange(9) < torch.tensor([[9], [7]]), torch.zeros(len(cos), dtype=torch.int64)
        found = compute_factors(cos, mask, groups, VGPOConfig.paper(), gather=lambda values: values, process_index=0)
        add_records(kept, signal_records(cos, found, accelerator))
        return {name: numbers[0] for name, numbers in kept.items()}

    before = add(torch.rand(2, 9, generator=torch.Generator().manual_seed(0)))
    after = add(torch.full((2, 9), math.nan))
    assert before.pop("vgpo/weighted_share") == 1 and after.pop("vgpo/weighted_share") == 0.5
    assert before == after and all(map(math.isfinite, after.values()))


def test_phi_is_compared_with_length_within_its_group() -> None:
    """The lengths of two groups differ by more than those within; an unweighted one and a group of one are left out."""
    phi = torch.tensor([-0.5, 0.5, 0.0, 0.6, -0.4, -0.2, 0.0, 9.0])
    lengths = torch.tensor([3, 5, 4, 20, 18, 19, 7, 100])
    groups = torch.tensor([4, 4, 4, -2, -2, -2, 9, 4])
    weighted = torch.tensor([True] * 7 + [False])
    found = phi_length(phi, lengths, groups, weighted)
    assert found.item() == pytest.approx(spearmanr(phi[:7], [-1, 1, 0, 1, -1, 0, 0]).statistic)
    assert found > 0.9 > 0.5 > spearmanr(phi[:7], lengths[:7]).statistic
    assert phi_length(phi, torch.full((8,), 5), groups, weighted).isnan()
    assert phi_length(phi, lengths, groups, torch.zeros(8, dtype=torch.bool)).isnan()
    assert phi_length(phi[:0], lengths[:0], groups[:0], weighted[:0]).isnan()


def test_phi_that_keeps_following_length_is_warned_of_once() -> None:
    def records(correlation: float, batches: float = 1.0) -> dict[str, Statistic]:
        return {"phi_length_corr": Statistic(float, (correlation, batches))}

    watch = PhiLengthWatch(high=0.7, patience=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # One that does not follow begins the count anew, one where nothing varies and one without phi do not count.
        for value in (0.9, 0.9, 0.1, 0.9, 0.9):
            watch.see(records(value))
        watch.see(records(0.0, 0.0))
        watch.see({})
        assert not caught
        watch.see(records(0.75))
        assert len(caught) == 1
        for _ in range(9):
            watch.see(records(0.9))
    (warning,) = caught
    assert "0.85" in str(warning.message) and "vgpo_accumulation='mean'" in str(warning.message)
    assert "vgpo_inter=False" in str(warning.message)


def test_the_trainer_logs_what_phi_follows(tmp_path: Path) -> None:
    """Sums of scores grow with the responses: a trainer of random weights already sees it, and warns."""
    trainer = make_trainer(tmp_path, per_device_train_batch_size=16, max_steps=3, max_completion_length=12)
    trainer._phi_length = PhiLengthWatch(high=-1.0, patience=2)
    with pytest.warns(UserWarning, match="phi follows the length of responses"):
        trainer.train()
    samples: dict[int, list[RolloutSample]] = {}
    for sample in trainer.rollout_samples:
        samples.setdefault(sample.step, []).append(sample)
    for record in trainer.state.log_history[:3]:
        batch = samples[record["step"] - 1]
        means = {
            name: statistics.fmean(len(sample.tokens) for sample in batch if sample.answer == name)
            for name in {sample.answer for sample in batch}
        }
        beside = [len(sample.tokens) - means[sample.answer] for sample in batch]
        expected_value = spearmanr([sample.phi for sample in batch], beside).statistic
        assert record["vgpo/phi_length_corr"] == pytest.approx(expected_value, abs=1e-3)

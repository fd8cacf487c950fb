"""The statistics of a probe against numbers computed by hand, and against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

pytest.importorskip("trl")

from vgpo_trainer.probe.findings import GAIN_AT, Tokens
from vgpo_trainer.probe.gradient import all_weightings, cosine_to_others, group_advantages
from vgpo_trainer.probe.measuring import DEPENDENCY, KEYS, VIEWS, Key, Measured
from vgpo_trainer.probe.responses import phi_findings, share_of_mates, spread_in_groups
from vgpo_trainer.probe.statistics import (
    Ranking,
    Resampling,
    auc,
    detection,
    gain_curve,
    lift,
    overlap,
    rank_correlation,
    shuffled_within,
    within,
)
from vgpo_trainer.probe.weights import weights_of

from vgpo_kernels import VGPOConfig

ONCE = np.ones((1, 5))
PARTS = ("pass", "focus", "pass with attention", "view", "divergence")


def measured(groups: int = 6, responses: int = 4, length: int = 12, **signals: torch.Tensor) -> Measured:
    """Random signals of responses of different lengths; the first has a dependency with a heavy tail."""
    generator = torch.Generator().manual_seed(0)
    rows = groups * responses
    lengths = torch.randint(length // 2, length + 1, (rows,), generator=generator)
    lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    found = {key: torch.rand(rows, length, generator=generator) for key in KEYS}
    found[DEPENDENCY] = 5 * found[DEPENDENCY] ** 8
    found |= {Key(*name.split("_")): value for name, value in signals.items()}
    return Measured(
        mask=mask,
        ids=torch.randint(0, 5, mask.shape, generator=generator),
        groups=torch.arange(groups).repeat_interleave(responses),
        signals={key: value * mask for key, value in found.items()},
        views=dict.fromkeys(VIEWS, found[DEPENDENCY] * mask),
        again=None,
        energy=torch.rand(rows, length, generator=generator) * mask,
        seconds=dict.fromkeys(PARTS, 1.0),
        rewards=torch.arange(rows).double() % 2,
        correct=None,
    )


def tokens(found: Measured, **changes: float) -> Tokens:
    return Tokens(found, VGPOConfig.paper(**changes), top=0.2, replicates=50, seed=0)


UNCOMPENSATED = {"beta": 0.0}  # what compensation adds is a matter of positions, whatever the signal says


def test_auc_counts_a_tie_half() -> None:
    positive = np.array([[1.0, 1, 0, 0, 0]])
    # Pairs: 3 beats 1, 2, 2; 2 beats 1 and ties twice.
    assert auc(Ranking(np.array([3.0, 2, 2, 1, 2])), positive, 1 - positive) == pytest.approx((3 + 1 + 0.5 + 0.5) / 6)
    assert auc(Ranking(np.zeros(5)), positive, 1 - positive) == pytest.approx(0.5)
    assert auc(Ranking(np.array([5.0, 4, 1, 2, 3])), positive, 1 - positive) == 1


def test_the_top_shares_its_threshold_among_equal_values() -> None:
    ranking = Ranking(np.array([1.0, 7.0, 1.0, 1.0, 0.0]))
    assert ranking.top(ONCE, 0.2)[0].tolist() == pytest.approx([0, 1, 0, 0, 0])
    assert ranking.top(ONCE, 0.4)[0].tolist() == pytest.approx([1 / 3, 1, 1 / 3, 1 / 3, 0])
    assert ranking.top(ONCE, 0.9)[0].tolist() == pytest.approx([1, 1, 1, 1, 0.5])


def test_overlap_is_the_share_by_chance_for_a_constant_and_all_for_itself() -> None:
    dependency = Ranking(np.arange(5.0))
    top = dependency.top(ONCE, 0.2)
    assert overlap(Ranking(np.zeros(5)), top, ONCE, 0.2) == pytest.approx(0.2)
    assert overlap(dependency, top, ONCE, 0.2) == pytest.approx(1)
    assert overlap(Ranking(-np.arange(5.0)), top, ONCE, 0.2) == 0


def test_lift_by_hand() -> None:
    dependency = np.array([0.0, 0.0, 3.0, 1.0, 0.0])
    factors = np.array([1.0, 0.5, 1.5, 1.0, 1.0])
    assert lift(factors, dependency, ONCE) == pytest.approx(((3 * 1.5 + 1) / 4) / 1.0)
    assert lift(np.full(5, 1.7), dependency, ONCE) == pytest.approx(1)


def test_gain_by_hand() -> None:
    amount = np.array([6.0, 0, 3, 1, 0])
    shares = np.array([0.0, 0.2, 0.4, 0.6, 1.0])
    assert gain_curve(amount, amount, shares) == pytest.approx([0, 0.6, 0.9, 1, 1])
    assert gain_curve(np.zeros(5), amount, shares) == pytest.approx(shares.tolist())


@pytest.mark.parametrize("seed", range(3))
def test_weights_are_how_often_an_item_is_there(seed: int) -> None:
    """Every statistic of a replicate is that of its items written out, ties and all."""
    rng = np.random.default_rng(seed)
    signal, other = rng.integers(0, 6, (2, 40)).astype(float)
    weights = rng.integers(0, 4, (1, 40)).astype(float)
    repeated = np.repeat(np.arange(40), weights[0].astype(int))
    once = np.ones((1, len(repeated)))
    top = Ranking(other).top(weights, 0.2)
    written_top = Ranking(other[repeated]).top(once, 0.2)
    assert top[0][repeated] == pytest.approx(written_top[0])
    for statistic in (
        lambda values, top, weights: detection(Ranking(values), top, weights),
        lambda values, top, weights: overlap(Ranking(values), top, weights, 0.2),
        lambda values, top, weights: lift(values, top[0], weights),
    ):
        assert statistic(signal, top, weights) == pytest.approx(statistic(signal[repeated], written_top, once))
    found = rank_correlation(Ranking(signal), Ranking(other), weights)
    assert found == pytest.approx(spearmanr(signal[repeated], other[repeated]).statistic)
    positive = (other > 2).astype(float)
    expected = roc_auc_score(positive[repeated], signal[repeated])
    assert auc(Ranking(signal), weights * positive, weights * (1 - positive)) == pytest.approx(expected)


def test_a_correlation_of_what_does_not_vary_is_undefined() -> None:
    assert np.isnan(rank_correlation(Ranking(np.zeros(5)), Ranking(np.arange(5.0)), ONCE)).all()


def test_replicates_draw_whole_prompts() -> None:
    groups = np.array([7, 7, 3, 3, 3, 9])
    values = Resampling(groups, 20, seed=0).values(lambda weights: weights)
    assert (values[0] == 1).all() and values.shape == (21, 6)
    for row in values[1:]:
        by_group = {group: set(row[groups == group]) for group in (3, 7, 9)}
        assert all(len(counts) == 1 for counts in by_group.values())
        assert sum(counts.pop() for counts in by_group.values()) == 3
    again = Resampling(groups, 20, seed=0).values(lambda weights: weights)
    assert (values == again).all() and (values != Resampling(groups, 20, seed=1).values(lambda weights: weights)).any()


def test_an_interval_of_a_mean_is_about_the_one_of_theory() -> None:
    rng = np.random.default_rng(0)
    items, groups = rng.normal(size=400), np.arange(400)
    found = Resampling(groups, 2000, seed=0).estimate(lambda weights: (weights * items).sum(1) / weights.sum(1))
    assert found.value == pytest.approx(items.mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * items.std() / 20, rel=0.1)
    alone = Resampling(np.zeros(400, dtype=np.int64), 10, seed=0).estimate(lambda weights: weights.sum(1))
    assert alone.value == 400 and math.isnan(alone.low) and math.isnan(alone.high)


def test_shuffles_stay_within_rows() -> None:
    rows = np.array([2, 0, 2, 1, 0, 2, 0, 1] * 10)
    moved = shuffled_within(rows, np.random.default_rng(0))
    assert (rows[moved] == rows).all() and sorted(moved) == list(range(80)) and (moved != np.arange(80)).any()


def test_what_is_equal_within_a_group_is_nothing_within_it() -> None:
    values = np.array([0.1, 0.1, 0.1, 5.0, 7.0])
    assert within(values, np.array([4, 4, 4, 1, 1])).tolist() == [0, 0, 0, -1, 1]


# ---- signals whose quality is known --------------------------------------------------------------------------------


def test_a_signal_that_is_the_dependency_finds_everything() -> None:
    found = measured()
    found.signals[Key("entropy", "state")] = found.signals[DEPENDENCY]
    signals = {(one.signal, one.place): one for one in tokens(found).signals()}
    perfect, random = signals["entropy", "state"], signals["attention", "token"]
    # The token at the threshold is half in, and ties with itself.
    assert perfect.auc.low > 0.999 and perfect.auc.high <= 1 and perfect.overlap.value > 0.99
    assert perfect.lift.low > 1.3 and perfect.lift_shuffled == pytest.approx(1, abs=0.1)
    assert perfect.auc_shuffled == pytest.approx(0.5, abs=0.1)
    assert random.auc.low < 0.5 < random.auc.high and random.lift.value == pytest.approx(1, abs=0.1)
    assert perfect.gain == pytest.approx(gain_curve(*[tokens(found).dependency] * 2, GAIN_AT))


def test_a_constant_signal_is_no_better_than_none() -> None:
    found = measured(focus_token=torch.full((24, 12), 0.3), attention_token=torch.full((24, 12), 0.2))
    for one in tokens(found, **UNCOMPENSATED).signals()[0:3:2]:
        assert one.auc.value == one.auc.low == one.auc.high == one.auc_shuffled == 0.5
        assert one.overlap.value == pytest.approx(0.2)
        assert one.lift.value == one.lift_shuffled == pytest.approx(1, abs=1e-6)
        assert one.spread == pytest.approx(0, abs=1e-6)


def test_a_signal_that_is_high_in_dependent_responses_only_keeps_its_auc_when_shuffled() -> None:
    """What a shuffle within responses leaves is what whole responses tell."""
    found = measured()
    dependent = (torch.arange(24) % 3 == 0)[:, None]
    found.signals[DEPENDENCY] = found.signals[DEPENDENCY] * torch.where(dependent, 1.0, 1e-6)
    found.signals[Key("attention", "token")] = found.mask * torch.where(dependent, 1.0, 0.5)
    one = next(
        one for one in tokens(found, **UNCOMPENSATED).signals() if one.signal == "attention" and one.place == "token"
    )
    assert one.auc_shuffled == pytest.approx(one.auc.value, abs=0.02) and one.auc_shuffled > 0.8
    assert one.lift.value == pytest.approx(1, abs=1e-6), "psi compares the tokens of a response"


def test_energy_half_and_texts_by_hand() -> None:
    found = measured(groups=2, responses=2, length=5)
    found.mask = torch.ones(4, 5, dtype=torch.bool)
    dependency = torch.zeros(4, 5)
    dependency[0, 0], dependency[1, 1], dependency[2, 2], dependency[3, 3] = 8.0, 4.0, 3.0, 1.0
    found.signals[DEPENDENCY] = dependency
    found.energy = torch.ones(4, 5)
    found.energy[0, 0] = 5.0
    found.ids = torch.ones(4, 5, dtype=torch.int64)
    found.ids[0, 0] = found.ids[1, 1] = 2
    probe = tokens(found)
    assert probe.half() == 1 / 20
    assert probe.energy().value == pytest.approx((5 + 3) / 24)
    first, second = probe.texts(str)
    assert (first.text, first.share, first.dependency, first.mean) == ("2", 0.1, 0.75, 6.0)
    assert (second.text, second.mean) == ("1", pytest.approx(4 / 18))
    assert first.ranks["kl at the state"] == pytest.approx(18.5 / 20 + 0.5 / 20 - 0.5 / 20, abs=0.03)


def test_lengths_that_only_differ_between_prompts_say_nothing_of_phi() -> None:
    """Phi of a constant signal is the order of lengths, where it adds up scores, and nothing where it takes means."""
    found = measured(focus_token=torch.full((24, 12), 0.3))
    config = VGPOConfig.paper(beta=0.0)
    responses = Resampling(found.groups.numpy(), 50, seed=0)
    by_sum, by_mean = phi_findings(found, config, responses, np.random.default_rng(0))[:2]
    assert (by_sum.accumulation, by_mean.accumulation) == ("compensated", "mean")
    assert by_sum.length.value > 0.9 and by_sum.lift_shuffled[0] < 1 < by_sum.lift_shuffled[1]
    assert math.isnan(by_mean.length.value) or abs(by_mean.length.value) < 0.4
    assert by_sum.reward.low <= by_sum.reward.value <= by_sum.reward.high


def test_phi_of_a_group_is_the_choice_of_the_others_where_all_are_alike() -> None:
    config, rng = VGPOConfig.paper(), np.random.default_rng(0)
    groups = torch.arange(40).repeat_interleave(4)
    random = share_of_mates(torch.rand(160, generator=torch.Generator().manual_seed(0)), groups, config, rng)
    # One response far above three equal ones keeps its phi whoever is drawn; the equal ones do not.
    odd = torch.tensor([9.0, 1.0, 1.0, 1.0]).repeat(40)
    apart = share_of_mates(odd, groups, config, rng)
    assert 0.1 < random < 0.6 and 0 < apart < random
    assert math.isnan(share_of_mates(torch.rand(8), torch.arange(4).repeat_interleave(2), config, rng))
    assert math.isnan(share_of_mates(torch.ones(8), torch.arange(2).repeat_interleave(4), config, rng))


def test_the_spread_that_phi_stretches() -> None:
    score = torch.tensor([1.0, 3.0, 10.0, 10.0, math.nan, 4.0])
    assert spread_in_groups(score, torch.tensor([0, 0, 1, 1, 1, 2])) == pytest.approx(0.5)


def test_divergences_are_scored_as_the_trainer_scores_them() -> None:
    found = measured()
    config = VGPOConfig.paper(gate=False, beta=0.0)
    w = weights_of(found, DEPENDENCY, config).w[found.mask]
    torch.testing.assert_close(w, 1 - torch.exp(-found.signals[DEPENDENCY][found.mask]))
    w = weights_of(found, Key("focus", "token"), config).w[found.mask]
    torch.testing.assert_close(w, (1 + found.signals[Key("focus", "token")][found.mask]) / 2)
    offset = VGPOConfig.released(gate=False, beta=0.0)
    w = weights_of(found, Key("attention", "token"), offset).w[found.mask]
    torch.testing.assert_close(w, found.signals[Key("attention", "token")][found.mask])


# ---- gradients -----------------------------------------------------------------------------------------------------


def test_advantages_are_those_of_trl() -> None:
    rewards = torch.tensor([1.0, 0, 0, 1, 2, 2, math.nan, 5], dtype=torch.float64)
    found = group_advantages(rewards, torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]))
    deviation = rewards[:4].std() + 1e-4
    expected = torch.cat([(rewards[:4] - 0.5) / deviation, torch.zeros(4, dtype=torch.float64)])
    torch.testing.assert_close(found, expected)


def test_cosines_to_other_batches_against_loops() -> None:
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(4, 9)) + 1
    weighted = plain * rng.uniform(0.5, 1.5, size=plain.shape)
    counts = np.array([[1.0, 1, 1, 1], [2, 0, 1, 1]])
    found = cosine_to_others(weighted @ plain.T, np.linalg.norm(weighted, axis=1), plain @ plain.T, counts)
    for row, drawn in zip(found, counts, strict=True):
        cosines, repeats = [], []
        for batch in np.flatnonzero(drawn):
            others = sum(drawn[other] * plain[other] for other in range(4) if other != batch)
            lengths = np.linalg.norm(weighted[batch]) * np.linalg.norm(others)
            cosines.append(weighted[batch] @ others / lengths)
            repeats.append(drawn[batch])
        assert row == pytest.approx(np.average(cosines, weights=repeats))


def test_shuffled_weights_are_the_same_weights_elsewhere() -> None:
    found = measured()
    weightings = all_weightings(found, VGPOConfig.paper(), np.random.default_rng(0))
    psi, moved = (weightings[f"psi of focus at the token{end}"] for end in ("", ", shuffled"))
    for row, other, mask in zip(psi, moved, found.mask, strict=True):
        assert row[mask].sort().values.tolist() == other[mask].sort().values.tolist()
    assert (psi != moved).any()
    phi, exchanged = (weightings[f"phi of focus at the token, {end}"][:, 0] for end in ("compensated", "shuffled"))
    for group in range(6):
        of_group = found.groups == group
        assert phi[of_group].sort().values.tolist() == exchanged[of_group].sort().values.tolist()
    assert (phi != exchanged).any() and (weightings["none"] == 1).all()

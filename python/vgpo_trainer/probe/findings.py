"""From numbers per token to findings: statistics of every signal, with intervals over prompts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vgpo_kernels import VGPOConfig
from vgpo_trainer.probe.measuring import DEPENDENCY, KEYS, Key, Measured
from vgpo_trainer.probe.record import Example, SignalFinding, TokenFinding, ViewFinding
from vgpo_trainer.probe.statistics import (
    NOTHING,
    Array,
    Estimate,
    Ranking,
    Resampling,
    detection,
    gain_curve,
    lift,
    overlap,
    share_of,
    shuffled_within,
)
from vgpo_trainer.probe.weights import weights_of

GAIN_AT = np.array([0.0, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
POSITIONS = 21
TEXTS = 12  # kinds of tokens that are told
SHUFFLES = 10


def cost(signal: str, seconds: Mapping[str, float]) -> tuple[int, float]:
    """Return what a signal takes beside the pass that training makes anyway: passes, and seconds."""
    if signal == "focus":
        return 0, seconds["focus"]
    if signal == "attention":
        return 0, max(seconds["pass with attention"] - seconds["pass"], 0.0)
    if signal == "entropy":
        return 0, 0.0  # comes with the log-probabilities
    return 1, seconds["view"] + seconds["divergence"]


class Tokens:
    """The tokens of a measurement in one row, with their statistics.

    Args:
        measured: The measurement.
        config: The settings of psi.
        top: Share of the tokens that count as those with the highest dependency.
        replicates: Of the bootstrap.
        seed: Likewise, and of shuffles.
    """

    def __init__(self, measured: Measured, config: VGPOConfig, *, top: float, replicates: int, seed: int) -> None:
        self.measured = measured
        self.rows = measured.mask.nonzero()[:, 0].numpy()
        self.dependency = self.flat(measured.signals[DEPENDENCY])
        self._resampling = Resampling(measured.groups.numpy()[self.rows], replicates, seed)
        self._ranking = Ranking(self.dependency)
        self._top = top
        self._config = replace(config, inter=False)
        self._rng = np.random.default_rng([seed, 1])

    def flat(self, values: Tensor) -> Array:
        """Return the numbers on the mask, ``[N]``."""
        numbers: Array = values[self.measured.mask].double().numpy()
        return numbers

    def signals(self) -> list[SignalFinding]:
        """Return the finding of every signal at every place."""
        values = [self.flat(self.measured.signals[key]) for key in KEYS]
        rankings = [Ranking(numbers) for numbers in values]
        factors = [self.flat(weights_of(self.measured, key, self._config).factors) for key in KEYS]

        def statistics(weights: Array) -> Array:
            top = self._ranking.top(weights, self._top)
            columns = [detection(ranking, top, weights) for ranking in rankings]
            columns += [overlap(ranking, top, weights, self._top) for ranking in rankings]
            columns += [lift(factor, self.dependency, weights) for factor in factors]
            return np.stack(columns, axis=1)

        drawn = self._resampling.values(statistics).T.reshape(3, len(KEYS), -1)
        found = []
        for place, key in enumerate(KEYS):
            shuffled_auc, shuffled_lift = self._shuffled(key, values[place])
            passes, seconds = cost(key.signal, self.measured.seconds)
            found.append(
                SignalFinding(
                    *key,
                    auc=self._resampling.interval(drawn[0, place]),
                    auc_shuffled=shuffled_auc,
                    overlap=self._resampling.interval(drawn[1, place]),
                    lift=self._resampling.interval(drawn[2, place]),
                    lift_shuffled=shuffled_lift,
                    spread=self._spread(key),
                    gain=gain_curve(values[place], self.dependency, GAIN_AT),
                    passes=passes,
                    seconds=seconds,
                )
            )
        return found

    def _shuffled(self, key: Key, values: Array) -> tuple[float, float]:
        """Return AUC and lift where the signal is shuffled within each response, means over some shuffles."""
        once = np.ones((1, len(values)))
        top = self._ranking.top(once, self._top)
        found = []
        for _ in range(SHUFFLES):
            moved = values[shuffled_within(self.rows, self._rng)]
            there = torch.zeros(self.measured.mask.shape)
            there[self.measured.mask] = torch.from_numpy(moved).float()
            other = replace(self.measured, signals={key: there})
            factors = self.flat(weights_of(other, key, self._config).factors)
            found.append([detection(Ranking(moved), top, once)[0], lift(factors, self.dependency, once)[0]])
        auc, lifted = np.mean(found, axis=0)
        return float(auc), float(lifted)

    def _spread(self, key: Key) -> float:
        """Return the range of a response's scores over their mean, on average; of focus the score is (1 + cos) / 2."""
        values = self.measured.signals[key].double()
        scores = (1 + values) / 2 if key.signal == "focus" else values
        ranges = []
        for row, mask in zip(scores, self.measured.mask, strict=True):
            of_row = row[mask]
            if len(of_row) and float(of_row.mean()) > 0:
                ranges.append(float((of_row.max() - of_row.min()) / of_row.mean()))
        return float(np.mean(ranges)) if ranges else math.nan

    def views(self, view: str) -> list[ViewFinding]:
        """Return how far each view moves the predictions, that of the dependency first."""
        kinds = dict(self.measured.views)
        again = self.measured.again
        # Where a batch has few images, the second swap may draw those of the first.
        if (
            again is not None
            and float((again != self.measured.views["swap"])[self.measured.mask].double().mean()) > 0.5
        ):
            kinds["swap again"] = again
        return [self._view(kind, self.flat(values), kind == view) for kind, values in kinds.items()]

    def _view(self, kind: str, nats: Array, itself: bool) -> ViewFinding:
        ranking = Ranking(nats)

        def statistics(weights: Array) -> Array:
            top = self._ranking.top(weights, self._top)
            columns = [share_of(weights * nats, weights)]
            columns.append(share_of(weights * nats * ranking.top(weights, self._top), weights * nats))
            columns.append(detection(ranking, top, weights))
            columns.append(overlap(ranking, top, weights, self._top))
            return np.stack(columns, axis=1)

        mean, held, found, common = map(self._resampling.interval, self._resampling.values(statistics).T)
        return ViewFinding(kind, mean, held, *((NOTHING, NOTHING) if itself else (found, common)))

    def energy(self) -> Estimate:
        """Return the share of the gradient's energy on the tokens with the highest dependency."""
        energy = self.flat(self.measured.energy)

        def statistic(weights: Array) -> Array:
            return share_of(weights * energy * self._ranking.top(weights, self._top), weights * energy)

        return self._resampling.estimate(statistic)

    def half(self) -> float:
        """Return the share of the tokens that hold half of the dependency."""
        held = np.cumsum(np.sort(self.dependency)[::-1])
        if not held[-1] > 0:
            return math.nan
        return float(np.searchsorted(held, held[-1] / 2) + 1) / len(held)

    def texts(self, decode: Callable[[int], str]) -> list[TokenFinding]:
        """Return the kinds of tokens that hold most of the dependency."""
        ids = self.measured.ids[self.measured.mask].numpy()
        once = np.ones((1, len(ids)))
        ranks = {key: Ranking(self.flat(self.measured.signals[key])).mid_ranks(once)[0] / len(ids) for key in KEYS}
        total = self.dependency.sum()
        held = {token: float(self.dependency[ids == token].sum()) for token in np.unique(ids).tolist()}
        highest = sorted(held, key=lambda token: -held[token])[:TEXTS]
        return [
            TokenFinding(
                text=decode(token),
                share=float((ids == token).mean()),
                dependency=held[token] / total if total > 0 else math.nan,
                mean=float(self.dependency[ids == token].mean()),
                ranks={str(key): float(rank[ids == token].mean()) for key, rank in ranks.items()},
            )
            for token in highest
        ]

    def positions(self) -> dict[str, list[float]]:
        """Return the mean KL of each view along responses, each read at the same relative positions."""
        at = [index / (POSITIONS - 1) for index in range(POSITIONS)]
        rows = [mask.nonzero()[:, 0] for mask in self.measured.mask if mask.any()]
        kept = self.measured.mask.any(dim=1)
        means = {}
        for kind, values in self.measured.views.items():
            means[kind] = [
                float(
                    np.mean(
                        [
                            float(row[columns[round(place * (len(columns) - 1))]])
                            for row, columns in zip(values[kept], rows, strict=True)
                        ]
                    )
                )
                for place in at
            ]
        return {"at": at, **means}


def choose_examples(measured: Measured, config: VGPOConfig, decode: Callable[[int], str], number: int) -> list[Example]:
    """Return some responses to look at: right and wrong ones by turns, each of a prompt of its own while they last."""
    psi = {key: weights_of(measured, key, config).psi for key in KEYS}
    phi = weights_of(measured, Key("focus", "token"), config).phi
    chosen = [row for row in _turns(measured) if measured.mask[row].any()][:number]

    def numbers(values: Tensor, row: int) -> list[float]:
        return values[row][measured.mask[row]].tolist()

    return [
        Example(
            prompt=int(measured.groups[row]),
            reward=math.nan if measured.rewards is None else float(measured.rewards[row]),
            tokens=[decode(token) for token in measured.ids[row][measured.mask[row]].tolist()],
            dependency=numbers(measured.signals[DEPENDENCY], row),
            signals={str(key): numbers(measured.signals[key], row) for key in KEYS},
            psi={str(key): numbers(psi[key], row) for key in KEYS},
            phi=float(phi[row]),
        )
        for row in chosen
    ]


def _turns(measured: Measured) -> Sequence[int]:
    """Order the responses: the first of every prompt before the second of any, with the rewards taking turns."""
    place: dict[int, int] = defaultdict(int)
    turn: dict[tuple[int, float], int] = defaultdict(int)
    keyed = []
    for row, group in enumerate(measured.groups.tolist()):
        place[group] += 1
        reward = 0.0 if measured.rewards is None else float(measured.rewards[row])
        turn[place[group], reward] += 1
        keyed.append((place[group], turn[place[group], reward], -reward, row))
    return [row for *_, row in sorted(keyed)]

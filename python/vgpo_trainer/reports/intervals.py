"""Intervals of the numbers in a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval (Student's t); NaN where there are too few values."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """The mean of some values and its interval. Of one value the interval is unknown, of none the mean as well."""
        if not values:
            return cls(math.nan, math.nan, math.nan)
        mean = fmean(values)
        if len(values) == 1:
            return cls(mean, math.nan, math.nan)
        from scipy.stats import sem, t

        half = float(t.ppf((1 + LEVEL) / 2, len(values) - 1) * sem(values))
        return cls(mean, mean - half, mean + half)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def paired_change(problems: int, newly_right: int, newly_wrong: int) -> tuple[float, float]:
    """Change of accuracy on the same problems, and the half width of its 95% interval (Wald, paired)."""
    change = (newly_right - newly_wrong) / problems
    variance = (newly_right + newly_wrong) / problems - change * change
    return change, 1.96 * math.sqrt(variance / problems)

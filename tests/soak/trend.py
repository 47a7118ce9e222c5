"""Whether something grows: the median of all slopes between means of blocks, with its confidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

BLOCKS = 20
CONFIDENCE = 0.99


@dataclass(frozen=True)
class Trend:
    """How much something grew from the beginning of a run to its end.

    Args:
        mean: Its mean.
        growth: Of the line, over the whole run.
        low: Lower end of the interval of confidence of `growth`.
        high: Upper end.
    """

    mean: float
    growth: float
    low: float
    high: float

    def grows(self, tolerated: float) -> bool:
        """Whether it grew by more than that, beyond doubt."""
        return self.low > tolerated


def trend_of(values: Sequence[float]) -> Trend:
    """Trend of values taken at equal distances.

    Neighbouring values are much alike, which a fit would take for confidence: means of blocks are not. And where
    another process takes the machine for a while, some blocks are far from all others, which the slope of Theil and
    Sen, the median of those between any two blocks, does not follow.

    Args:
        values: At least two a block.
    """
    if len(values) < 2 * BLOCKS:
        raise ValueError(f"{len(values)} values, wanted {2 * BLOCKS} or more")
    means = np.array([block.mean() for block in np.array_split(np.asarray(values, dtype=float), BLOCKS)])
    slope, _, low, high = stats.theilslopes(means, np.arange(BLOCKS) / BLOCKS, alpha=CONFIDENCE)
    return Trend(float(means.mean()), float(slope), float(low), float(high))

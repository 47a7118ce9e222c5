"""Whether something grows: a straight line through means of blocks, with the confidence that so few allow."""

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

    Neighbouring values are much alike, which ordinary least squares would take for confidence: means of blocks are not.

    Args:
        values: At least two a block.
    """
    if len(values) < 2 * BLOCKS:
        raise ValueError(f"{len(values)} values, wanted {2 * BLOCKS} or more")
    means = np.array([block.mean() for block in np.array_split(np.asarray(values, dtype=float), BLOCKS)])
    fit = stats.linregress(np.arange(BLOCKS) / (BLOCKS - 1), means)
    if np.ptp(means) == 0.0:  # of which scipy cannot say how sure it is
        return Trend(float(means.mean()), 0.0, 0.0, 0.0)
    margin = float(stats.t.ppf(0.5 + CONFIDENCE / 2, BLOCKS - 2)) * float(fit.stderr)
    return Trend(float(means.mean()), float(fit.slope), float(fit.slope) - margin, float(fit.slope) + margin)

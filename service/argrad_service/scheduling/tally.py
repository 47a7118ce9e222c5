"""How large batches were, and why each went when it did."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field, replace

from argrad_service.scheduling.queue import REASONS, Batch, Reason

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Upper bounds of the classes in which batches are counted by their calls; one more class has the larger ones."""


@dataclass
class Tally:
    """Counts batches; whoever uses it holds a lock.

    Args:
        released: Batches by reason.
        sizes: Batches by class of `SIZES`.
        calls: Calls in all batches.
    """

    released: dict[Reason, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    sizes: list[int] = field(default_factory=lambda: [0] * (len(SIZES) + 1))
    calls: int = 0

    def count(self, batch: Batch) -> None:
        """Count one more batch."""
        self.released[batch.reason] += 1
        self.sizes[bisect_left(SIZES, len(batch.jobs))] += 1
        self.calls += len(batch.jobs)

    @property
    def batches(self) -> int:
        """Batches of every reason."""
        return sum(self.sizes)

    def copy(self) -> Tally:
        """What was counted so far."""
        return replace(self, released=dict(self.released), sizes=list(self.sizes))

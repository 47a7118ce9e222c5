"""What waits for the solver: a queue a key, and which work goes next, with what beside it."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

from argrad_service.scheduling.job import DeadlinePassed, Job

HEAD_START_S = 1.0
"""A backward pass overtakes the forwards that came up to this long before it: it ends a training step that is under
way, and frees memory. Older forwards keep their place, so that none waits for ever."""

Reason = Literal["idle", "freed", "budget", "alone"]
"""Why a batch went when it did, with what it had: a solver thread stood `idle`; one was `freed`, and took all that had
come meanwhile; there was more, but not in the `budget`; or it is work that goes `alone`."""

REASONS: tuple[Reason, ...] = ("idle", "freed", "budget", "alone")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much work is done together at most; work that alone is over it is done alone.

    Args:
        flops: Sum of `Share.flops`.
        nbytes: Sum of `Share.nbytes`.
    """

    flops: float
    nbytes: int


@dataclass(frozen=True)
class Batch:
    """Jobs that are done together, and why now."""

    jobs: list[Job[Any]]
    reason: Reason


@dataclass(eq=False)
class _Entry:
    job: Job[Any] | None  # None once it has left, while the entry still stands in the heap
    key: Hashable


@dataclass(eq=False)
class Queue:
    """Jobs that wait, backward before forward, first come first served within each; whoever uses it holds a lock.

    Args:
        budget: Of a batch; None where nothing is done together.
        dropped: Jobs left out of a batch so far, because nobody waited for them any more.
    """

    budget: Budget | None = None
    dropped: int = 0
    _heap: list[tuple[float, int, _Entry]] = field(default_factory=list)
    _of_key: dict[Hashable, deque[_Entry]] = field(default_factory=dict)
    _order: itertools.count[int] = field(default_factory=itertools.count)
    _waiting: int = 0

    def __len__(self) -> int:
        return self._waiting

    def push(self, job: Job[Any], now: float) -> None:
        """Let a job wait from `now` on."""
        rank = now - (HEAD_START_S if job.is_backward else 0.0)
        share = job.share
        is_shared = share is not None and self.budget is not None
        entry = _Entry(job, share.key if share is not None and is_shared else None)
        heapq.heappush(self._heap, (rank, next(self._order), entry))
        if is_shared:
            self._of_key.setdefault(entry.key, deque()).append(entry)
        self._waiting += 1

    def take(self, *, was_idle: bool) -> Batch | None:
        """The next batch: the job whose turn it is, and what has its key; None where nobody waits for anything.

        Args:
            was_idle: Whether a solver thread waited for it.
        """
        while self._heap:
            entry = heapq.heappop(self._heap)[2]
            job = self._leave(entry)
            if job is None:
                continue
            share = job.share
            if job.should_stop():
                self._drop(job)
            elif entry.key is None or share is None or self.budget is None:
                return Batch([job], "alone")
            else:
                return self._with_company(job, entry.key, share.flops, share.nbytes, self.budget, was_idle)
        return None

    def drop_abandoned(self) -> None:
        """Forget jobs that nobody waits for: callers that left or ran out of time still stand in the queue."""
        for _, _, entry in self._heap:
            if entry.job is not None and entry.job.should_stop():
                self._drop(self._leave(entry))
        self._heap = [item for item in self._heap if item[2].job is not None]
        heapq.heapify(self._heap)

    def clear(self) -> list[Job[Any]]:
        """Empty the queue; returns what waited."""
        jobs = [entry.job for _, _, entry in self._heap if entry.job is not None]
        self._heap, self._of_key, self._waiting = [], {}, 0
        return jobs

    def _with_company(
        self, job: Job[Any], key: Hashable, flops: float, nbytes: int, budget: Budget, was_idle: bool
    ) -> Batch:
        jobs, others = [job], self._of_key.get(key, deque())
        while others:
            entry = others[0]
            if entry.job is None:
                others.popleft()
                continue
            other = entry.job
            if other.share is None or other.should_stop():
                self._drop(self._leave(entry))
                continue
            flops, nbytes = flops + other.share.flops, nbytes + other.share.nbytes
            if flops > budget.flops or nbytes > budget.nbytes:
                return Batch(jobs, "budget")
            self._leave(entry)
            jobs.append(other)
        return Batch(jobs, "idle" if was_idle else "freed")

    def _leave(self, entry: _Entry) -> Job[Any] | None:
        """Take an entry's job out: from its key's queue now, from the heap when its turn comes."""
        job, entry.job = entry.job, None
        if job is None:
            return None
        self._waiting -= 1
        others = self._of_key.get(entry.key) if entry.key is not None else None
        if others is not None:
            while others and others[0].job is None:
                others.popleft()
            if not others:
                del self._of_key[entry.key]
        job.leave_queue()
        return job

    def _drop(self, job: Job[Any] | None) -> None:
        if job is not None:
            self.dropped += 1
            job.refuse(DeadlinePassed())

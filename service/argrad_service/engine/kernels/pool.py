"""A thread pool over the batch, for kernels that hold no lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from threadpoolctl import ThreadpoolController

PIECES_PER_THREAD = 4
"""Pieces of a batch for each thread: problems differ in their work."""

SMALLEST_BATCH = 8
"""A smaller batch is not worth waking a thread for."""

_blas = threading.Lock()


def over_batch(kernel: Callable[[int, int], None], batch: int, *, work: float) -> None:
    """Run a kernel over ranges of a batch on all cores while the caller waits; a small batch runs in its own thread.

    Args:
        kernel: Called with the first problem and one behind the last of each range.
        batch: Number of problems.
        work: Rough number of floating-point operations of one problem.
    """
    threads = _threads()
    if threads == 1 or batch < SMALLEST_BATCH or batch * work < 2e5:
        kernel(0, batch)
        return
    pieces = min(batch, threads * PIECES_PER_THREAD)
    edges = [batch * i // pieces for i in range(pieces + 1)]
    # One BLAS thread in each of ours: more would only wait for each other. The limit is the process's, hence the lock.
    with _blas, _controller().limit(limits=1, user_api="blas"):
        for done in _pool(os.getpid()).map(kernel, edges[:-1], edges[1:]):
            del done


@lru_cache(maxsize=1)
def _threads() -> int:
    return os.cpu_count() or 1


@lru_cache(maxsize=1)
def _pool(pid: int) -> ThreadPoolExecutor:  # noqa: ARG001 - a forked child needs threads of its own
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="argrad-kernel")


@lru_cache(maxsize=1)
def _controller() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")

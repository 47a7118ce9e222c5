"""A thread pool over the batch, for kernels that hold no lock."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import Any

from threadpoolctl import ThreadpoolController

from argrad_service.engine.options import ShouldStop, Stopped, never_stop
from argrad_service.engine.threads import is_in_one_thread, threads

PIECES_PER_THREAD = 4
"""Pieces of a batch for each thread: problems differ in their work."""

SMALLEST_BATCH = 8
"""A smaller batch is not worth waking a thread for."""

SMALLEST_WORK = 6e5
"""Less work is done, in a third of a millisecond, before another thread is awake and has come back."""

PIECE_WORK = 1e9
"""Floating-point operations of a piece at most, unless one problem has more: so often is `should_stop` asked."""

LAPACK_WORK = 1e4
"""A smaller problem calls no LAPACK, by and large."""

THREADED_WORK = 1e8
"""A smaller problem is factored no faster by several threads, which it would have to wait for."""


class _OneBlasThread:
    """While anybody is inside, BLAS has one thread in the whole process: the first sets it, the last lifts it."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before: list[tuple[Any, int]] = []

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = [(library, library.get_num_threads()) for library in _libraries()]
                for library, _ in self._before:
                    library.set_num_threads(1)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for library, threads in self._before:
                    library.set_num_threads(threads)


_ONE_BLAS_THREAD = _OneBlasThread()


def blas_for(work: float) -> contextlib.AbstractContextManager[None]:
    """BLAS with as many threads as help one problem: another one must be woken, which on busy cores takes milliseconds.

    Args:
        work: Rough number of floating-point operations.
    """
    return contextlib.nullcontext() if work < LAPACK_WORK or work > THREADED_WORK else _ONE_BLAS_THREAD


def over_batch(
    kernel: Callable[[int, int], None],
    batch: int,
    *,
    work: float,
    should_stop: ShouldStop = never_stop,
    uses_blas: bool = True,
) -> None:
    """Run a kernel over ranges of a batch in all threads of the engine, the caller's thread among them.

    A small batch, and every one inside `in_one_thread`, is done in that thread alone.

    Args:
        kernel: Called with the first problem and one behind the last of each range.
        batch: Number of problems.
        work: Rough number of floating-point operations of one problem.
        should_stop: Asked before each range.
        uses_blas: Whether the kernel calls BLAS, whose threads are then limited.

    Raises:
        Stopped: should_stop() was true; ranges that had begun are done, the others are not.
    """

    def run(start: int, stop: int) -> None:
        if should_stop():
            raise Stopped
        kernel(start, stop)

    count = 1 if is_in_one_thread() else threads()
    is_small = count == 1 or batch < SMALLEST_BATCH or batch * work < SMALLEST_WORK
    pieces = min(batch, max(1 if is_small else count * PIECES_PER_THREAD, math.ceil(batch * work / PIECE_WORK)))
    edges = [batch * i // pieces for i in range(pieces + 1)]
    if is_small:
        with blas_for(work if uses_blas else 0.0):
            for start, stop in itertools.pairwise(edges):
                run(start, stop)
        return
    left = iter(list(itertools.pairwise(edges)))  # `next` on it is atomic

    def work_off() -> None:
        for start, stop in left:
            run(start, stop)

    # One BLAS thread in each of ours: more would only wait for each other.
    with _ONE_BLAS_THREAD if uses_blas else contextlib.nullcontext():
        helpers = [_pool(os.getpid(), count).submit(work_off) for _ in range(count - 1)]
        try:
            work_off()
        finally:
            # What found no free core has nothing left to do; the arrays belong to the others until they have ended.
            helpers = [helper for helper in helpers if not helper.cancel()]
            wait(helpers)
        for helper in helpers:
            helper.result()


@lru_cache(maxsize=4)
def _pool(pid: int, count: int) -> ThreadPoolExecutor:  # noqa: ARG001 - a forked child needs threads of its own
    return ThreadPoolExecutor(count, thread_name_prefix="argrad-kernel")


@lru_cache(maxsize=1)
def _libraries() -> list[Any]:
    """Every BLAS in the process, whose threads are read and set: threadpoolctl's own limit looks all up anew."""
    return list(ThreadpoolController().select(user_api="blas").lib_controllers)

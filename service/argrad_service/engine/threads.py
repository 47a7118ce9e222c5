"""How many threads the engine has in this process, and whether a piece of work is divided among them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import lru_cache

import torch
from threadpoolctl import ThreadpoolController

_IS_UNDIVIDED: ContextVar[bool] = ContextVar("is_undivided", default=False)


def use_threads(count: int) -> None:
    """Give the engine so many threads: torch's operations, the kernels, the libraries and BLAS.

    Args:
        count: At least 1; more than there are cores makes all of them slower.
    """
    torch.set_num_threads(count)
    for library in ThreadpoolController().select(user_api="blas").lib_controllers:
        library.set_num_threads(count)


def threads() -> int:
    """Threads that the engine has.

    It is torch's own count, which knows `OMP_NUM_THREADS` and the cores that this process may run on. It is 1 inside
    `in_one_thread`, and in what a `DataLoader` starts.
    """
    return torch.get_num_threads()


@contextlib.contextmanager
def in_one_thread() -> Iterator[None]:
    """Let torch's element-wise loops and the kernels run in the calling thread; other threads are not touched.

    A few dozen small problems take one thread a few milliseconds. Woken for them, a second thread on a core that serves
    requests comes late, and the first waits for it: 10 ms and more were measured.
    """
    token = _IS_UNDIVIDED.set(True)
    try:
        with _controller().limit(limits=1, user_api="openmp"):
            yield
    finally:
        _IS_UNDIVIDED.reset(token)


def is_in_one_thread() -> bool:
    """Whether the calling thread is inside `in_one_thread`."""
    return _IS_UNDIVIDED.get()


@lru_cache(maxsize=1)
def _controller() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="openmp")

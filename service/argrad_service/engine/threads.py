"""Whether work is divided among threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import lru_cache

from threadpoolctl import ThreadpoolController

_IS_UNDIVIDED: ContextVar[bool] = ContextVar("is_undivided", default=False)


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

"""Calls in flight beside the caller: a thread each, in the caller's mode of torch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

MAX_IN_FLIGHT = 32
"""Calls of one client's threads at a time; more wait for their turn."""


class Threads:
    """Threads of one client, started when they are first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._inside = threading.local()

    def submit(self, function: Callable[P, T], /, *arguments: P.args, **keywords: P.kwargs) -> Future[T]:
        """Call a function in a thread; within one of these threads, at once and in place."""
        if getattr(self._inside, "is_ours", False):
            return _done(function, *arguments, **keywords)
        mode = _caller_mode()

        def call() -> T:
            self._inside.is_ours = True
            with mode():
                return function(*arguments, **keywords)

        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(MAX_IN_FLIGHT, thread_name_prefix="argrad")
            return self._executor.submit(call)

    def map(self, function: Callable[..., T], *iterables: Iterable[Any]) -> Iterator[T]:
        """Call a function on each, all submitted now; results in order, the first exception raised."""
        futures = [self.submit(function, *arguments) for arguments in zip(*iterables, strict=True)]

        def results() -> Iterator[T]:
            try:
                for future in futures:
                    yield future.result()
            finally:
                for future in futures:
                    future.cancel()

        return results()

    def close(self) -> None:
        """Let what runs end, and drop what has not begun."""
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=not getattr(self._inside, "is_ours", False), cancel_futures=True)


def _done(function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> Future[T]:
    """A thread that waited for another of the same threads could wait for ever."""
    future: Future[T] = Future()
    try:
        future.set_result(function(*arguments, **keywords))
    except Exception as error:  # `result` raises it
        future.set_exception(error)
    return future


def _caller_mode() -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """What torch keeps for each thread, and a caller expects to hold: grad mode, inference mode, the CUDA stream."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def mode() -> Iterator[None]:
        on_stream = contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
        with torch.inference_mode(inference), torch.set_grad_enabled(grad), on_stream:
            yield

    return mode

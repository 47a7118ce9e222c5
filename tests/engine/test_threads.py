"""Work that is kept in the calling thread."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from threadpoolctl import threadpool_info

from argrad_service.engine.kernels import pool
from argrad_service.engine.threads import in_one_thread, is_in_one_thread, threads, use_threads


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    blas = [(library, library.get_num_threads()) for library in pool._libraries()]
    yield
    torch.set_num_threads(before)
    for library, count in blas:
        library.set_num_threads(count)


def ran_in(parties: int) -> int:
    """Threads that a kernel ran in, of which so many were in it at the same time."""
    ran: set[int] = set()
    together = threading.Barrier(parties)

    def kernel(start: int, stop: int) -> None:
        if threading.get_ident() not in ran:
            ran.add(threading.get_ident())
            with contextlib.suppress(threading.BrokenBarrierError):
                together.wait(10)

    pool.over_batch(kernel, 64, work=1e6)
    assert not together.broken
    return len(ran)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_torch_the_kernels_and_blas_have_the_threads_that_the_engine_was_given(count: int) -> None:
    use_threads(count)
    assert threads() == torch.get_num_threads() == count
    assert {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"} <= {
        *range(count + 1)
    }
    assert ran_in(count) == count
    others: list[int] = []
    solver_thread = threading.Thread(target=lambda: others.append(ran_in(count)))
    solver_thread.start()
    solver_thread.join()
    assert others == [count]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["affinity", "OMP_NUM_THREADS"])
def test_the_kernels_keep_to_the_cores_that_the_process_may_run_on(how: str) -> None:
    program = "from tests.engine.test_threads import ran_in, threads; print(threads(), ran_in(1))"
    environment, core = dict(os.environ), {min(os.sched_getaffinity(0))}
    if how == "OMP_NUM_THREADS":
        environment["OMP_NUM_THREADS"] = "1"
    found = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        preexec_fn=(lambda: os.sched_setaffinity(0, core)) if how == "affinity" else None,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == ["1", "1"]


def test_inside_torch_and_the_kernels_stay_in_the_calling_thread_and_others_do_as_before() -> None:
    ran: set[int] = set()

    def kernel(start: int, stop: int) -> None:
        assert start < stop
        ran.add(threading.get_ident())

    others: list[tuple[int, bool]] = []
    before = torch.get_num_threads()
    with in_one_thread():
        assert is_in_one_thread()
        assert torch.get_num_threads() == 1
        pool.over_batch(kernel, 64, work=1e6)
        other = threading.Thread(target=lambda: others.append((torch.get_num_threads(), is_in_one_thread())))
        other.start()
        other.join()
    assert ran == {threading.get_ident()}
    assert others == [(before, False)]
    assert not is_in_one_thread()
    assert torch.get_num_threads() == before

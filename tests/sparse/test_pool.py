"""Worker processes: reuse, death, cancellation, failures."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest
import torch

import argrad
from argrad_service.engine import SolverOptions, Stopped
from argrad_service.engine import sparse as sparse_engine
from argrad_service.sparse.pool import WORKERS, TaskStopped, WorkerFailed, WorkerPool
from argrad_service.sparse.tasks import Confirm
from tests.sparse.problems import draw, parts, tensors
from tests.sparse.tasks import Die, LoadedModules, Raise, Sleep

pytestmark = pytest.mark.slow

NOBODY = lambda: False  # noqa: E731


@pytest.fixture
def pool():
    pool = WorkerPool(2)
    yield pool
    pool.close()


def test_a_worker_is_reused_and_is_another_process(pool):
    first, second = pool.run(Sleep(0), NOBODY), pool.run(Sleep(0), NOBODY)
    assert first == second != os.getpid()
    assert pool.idle_pids == [first]


def test_closing_ends_the_workers(pool):
    pid = pool.run(Sleep(0), NOBODY)
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert pool.run(Sleep(0), NOBODY) != pid


def test_a_worker_killed_while_it_waits_is_replaced(pool):
    pid = pool.run(Sleep(0), NOBODY)
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.1)
    assert pool.run(Sleep(0), NOBODY) != pid


def test_a_task_whose_worker_dies_is_tried_once_more(pool, tmp_path):
    assert pool.run(Die(str(tmp_path / "once"), 1), NOBODY) == "done"
    with pytest.raises(MemoryError, match="killed twice"):
        pool.run(Die(str(tmp_path / "always"), 9), NOBODY)
    assert pool.run(Sleep(0), NOBODY)


def test_what_a_task_raises_arrives_and_the_worker_lives_on(pool):
    pid = pool.run(Sleep(0), NOBODY)
    with pytest.raises(WorkerFailed, match="no such thing"):
        pool.run(Raise(ValueError("no such thing")), NOBODY)
    with pytest.raises(MemoryError):
        pool.run(Raise(MemoryError()), NOBODY)
    assert pool.run(Sleep(0), NOBODY) == pid


def test_a_task_that_nobody_wants_ends_at_once(pool):
    began = time.monotonic()
    with pytest.raises(TaskStopped):
        pool.run(Sleep(30), lambda: time.monotonic() > began + 0.3)
    assert time.monotonic() < began + 5
    assert pool.idle_pids == []


def test_tasks_beyond_the_number_of_processes_wait(pool):
    pids = []
    threads = [threading.Thread(target=lambda: pids.append(pool.run(Sleep(0.2), NOBODY))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pids) == 4
    assert len(set(pids)) <= 2


def test_the_engine_says_stopped():
    problem = argrad.problems.parse("sparse_qp", parts(draw())).problem
    with pytest.raises(Stopped):
        sparse_engine.solve(problem, solver="auto", options=SolverOptions(should_stop=lambda: True))


def test_a_solve_survives_the_death_of_its_worker():
    with argrad.Client("local") as client:
        first = argrad.solve_qp(client, **tensors(draw())).z
        for pid in WORKERS.idle_pids:
            os.kill(pid, signal.SIGKILL)
        torch.testing.assert_close(argrad.solve_qp(client, **tensors(draw())).z, first)


def test_workers_load_neither_torch_nor_the_client(pool):
    problem = sparse_engine.stack(argrad.problems.parse("sparse_qp", parts(draw())).problem)
    pool.run(Confirm(problem=problem, z=np.zeros(40), y=np.zeros(35)), NOBODY)
    loaded = pool.run(LoadedModules(), NOBODY)
    assert "argrad_service.sparse.worker" in loaded
    assert not {"torch", "argrad", "argrad_service.engine", "osqp"} & loaded

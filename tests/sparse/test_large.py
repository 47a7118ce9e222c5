"""Ten thousand variables: memory, gradients, and a service that keeps answering meanwhile."""

import json
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest

import argrad
from tests.docs.markdown import ROOT
from tests.sparse.problems import draw, tensors, tracked

MOST_MB = 600


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["clarabel", "osqp"])
def test_memory_and_gradients_of_ten_thousand_variables(solver):
    """A dense Q alone would take 800 MB."""
    command = [sys.executable, "-m", "tests.sparse.large", solver]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["peak_mb"] + found["worker_mb"] < MOST_MB
    assert max(found["errors"].values()) < 1e-5, found


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("solver", ["clarabel", "osqp"])
def test_liveness_answers_while_ten_thousand_variables_are_solved(service_url, solver):
    leaves = tracked(tensors(draw(n=10_000, m=5_000, p=1_000)))
    waits, is_done = [], threading.Event()

    def ask():
        with httpx.Client(trust_env=False) as http:
            while not is_done.is_set():
                began = time.perf_counter()
                assert http.get(f"{service_url}/health/live").status_code == 200
                waits.append(time.perf_counter() - began)
                time.sleep(0.005)

    with argrad.Client(service_url) as client:
        asking = threading.Thread(target=ask)
        asking.start()
        try:
            for _ in range(4):
                solution = argrad.solve_qp(client, **leaves, options=argrad.Options(solver=solver))
                solution.z.square().sum().backward()
        finally:
            is_done.set()
            asking.join()
    assert len(waits) > 20
    assert np.percentile(waits, 95) < 0.1

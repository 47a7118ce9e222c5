from __future__ import annotations

import threading
import time
from importlib.metadata import entry_points

import pytest
import torch

from argrad.backend import ENTRY_POINT_GROUP, Call
from argrad.errors import DeadlineExceededError, ProblemError, StateGoneError
from argrad.wire.messages import JvpRequest, SolveRequest, VjpRequest
from argrad_service.engine.options import SolverOptions, Stopped
from argrad_service.local import LocalBackend, create_backend
from tests.service.support import HookedEngine, projection, tensor

CALL = Call()


@pytest.fixture
def backend() -> LocalBackend:
    return create_backend()


def test_the_entry_point_makes_the_backend():
    (entry,) = [e for e in entry_points(group=ENTRY_POINT_GROUP) if e.name == "local"]
    assert isinstance(entry.load()(), LocalBackend)


def test_solve_vjp_and_jvp_by_state(backend: LocalBackend):
    reply, out = backend.solve(SolveRequest(), projection((-1, 2)), CALL)
    torch.testing.assert_close(out["solution.z"], tensor([1, 0]))
    _, gradients = backend.vjp(VjpRequest(state=reply.state), {"upstream.z": tensor([1, 1])}, CALL)
    torch.testing.assert_close(gradients["gradients.q"], tensor([-1, 0]))
    _, tangents = backend.jvp(JvpRequest(state=reply.state), {"tangents.q": tensor([1, 1])}, CALL)
    torch.testing.assert_close(tangents["tangents.z"], tensor([-1, 0]))


def test_a_released_state_is_gone_as_over_http(backend: LocalBackend):
    reply, _ = backend.solve(SolveRequest(), projection((-1, 2)), CALL)
    backend.release([reply.state, "never given out"])
    with pytest.raises(StateGoneError, match="send problem and solution instead") as caught:
        backend.vjp(VjpRequest(state=reply.state), {"upstream.z": tensor([1, 1])}, CALL)
    assert (caught.value.status_code, caught.value.type) == (409, "state-gone")


def test_close_frees_every_state(backend: LocalBackend):
    reply, _ = backend.solve(SolveRequest(), projection((-1, 2)), CALL)
    backend.close()
    with pytest.raises(StateGoneError):
        backend.jvp(JvpRequest(state=reply.state), {"tangents.q": tensor([1, 1])}, CALL)


def test_wrong_input_is_a_problem_error(backend: LocalBackend):
    tensors = projection((-1, 2)) | {"problem.h": tensor(0, 0, 0)}
    with pytest.raises(ProblemError, match=r"problem\.G: found shape \(2, 2\)"):
        backend.solve(SolveRequest(), tensors, CALL)


def test_a_deadline_stops_the_solve():
    def wait(options: SolverOptions) -> None:
        began = time.monotonic()
        while not options.should_stop():
            assert time.monotonic() < began + 5
            time.sleep(0.001)
        raise Stopped

    backend = create_backend(HookedEngine(wait))
    with pytest.raises(DeadlineExceededError, match=r"stopped after its 0\.05 s"):
        backend.solve(SolveRequest(), projection((-1, 2)), Call(timeout_s=0.05))


def test_the_table_of_solvers_is_the_engine_s(backend: LocalBackend):
    table = backend.solvers()
    assert table["protocol"] == 1
    assert "pdipm" in str(table["solvers"])


def test_threads_may_share_a_backend(backend: LocalBackend):
    found: dict[int, float] = {}

    def work(i: int) -> None:
        reply, out = backend.solve(SolveRequest(), projection((-float(i), 2)), CALL)
        backend.vjp(VjpRequest(state=reply.state), {"upstream.z": tensor([1, 1])}, CALL)
        found[i] = out["solution.z"][0, 0].item()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == pytest.approx({i: float(i) for i in range(1, 9)}, abs=1e-9)

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from argrad.errors import ProblemError
from argrad.wire.messages import (
    DifferentiationDocument,
    JvpRequest,
    ProblemDocument,
    SolverDocument,
    SolveReply,
    SolveRequest,
    TensorMap,
    VjpRequest,
)
from argrad_service import engine
from argrad_service.admission import Limits, Size, TooLarge
from argrad_service.engine.options import Stopped, never_stop
from argrad_service.operations import Operations
from argrad_service.state import MemoryStateStore, StateGone, TokenSigner
from tests.service.support import D, projection, tensor

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def make(*, budget_bytes: int = 1 << 20, **limits: int) -> Operations:
    store = MemoryStateStore(budget_bytes=budget_bytes, ttl_s=60, signer=TokenSigner("secret"))
    return Operations(engine=engine, store=store, limits=Limits(**limits), device=torch.device("cpu"))


def solve(operations: Operations, tensors: TensorMap, **fields: Any) -> tuple[SolveReply, TensorMap]:
    return operations.prepare_solve(SolveRequest(**fields), tensors, owner="me")(never_stop, {})


def vjp(operations: Operations, tensors: TensorMap, **fields: Any) -> Any:
    return operations.prepare_vjp(VjpRequest(**fields), tensors, owner="me")(never_stop, {})


def jvp(operations: Operations, tensors: TensorMap, **fields: Any) -> Any:
    return operations.prepare_jvp(JvpRequest(**fields), tensors, owner="me")(never_stop, {})


def points(out: TensorMap) -> TensorMap:
    return {name: t for name, t in out.items() if name.startswith("solution.")}


def mixed() -> TensorMap:
    """z ≥ 0 and z ≤ u in one variable: the first problem has a solution (z = 1), the second is infeasible (u = −1)."""
    return {
        "problem.Q": tensor([1.0]),
        "problem.q": tensor([-2.0], [-2.0]),
        "problem.G": tensor([1.0], [-1.0]),
        "problem.h": tensor([1.0, 0.0], [-1.0, 0.0]),
    }


def test_a_batch_is_solved_and_judged():
    reply, out = solve(make(), projection((-1, 2), (-3, -0.5)))
    torch.testing.assert_close(out["solution.z"], tensor([1, 0], [3, 0.5]), **CLOSE)
    torch.testing.assert_close(out["solution.lam"], tensor([0, 2], [0, 0]), **CLOSE)
    torch.testing.assert_close(out["report.objective"], tensor(-0.5, -4.625), **CLOSE)
    assert out["solution.nu"].shape == (2, 0)
    assert reply.status == ["optimal", "optimal"]
    assert reply.report.flags == [[], []]
    assert reply.report.method is None
    assert reply.gradient_status is None
    assert set(reply.timings_ms) == {"solve"}
    assert out["report.iterations"].dtype == torch.int64


@pytest.mark.parametrize(
    ("method", "given", "reported"),
    [
        ("smoothed", {"smoothing": "barrier", "t": 10.0, "tau": 3.0}, {"smoothing": "barrier", "t": 10.0}),
        ("smoothed", {}, {"smoothing": "barrier"}),
        ("smoothed", {"smoothing": "quadratic"}, {"smoothing": "quadratic", "gamma": 0.01}),
        (
            "smoothed",
            {"smoothing": "random", "seed": 7, "samples": 9},
            {"smoothing": "random", "sigma": 0.1, "samples": 9, "seed": 7},
        ),
        ("bpqp", {}, {"backend": "direct", "tolerance": 1e-8, "rho": 1e6, "max_iterations": 1000}),
        ("kkt", {}, None),
    ],
)
def test_the_reply_says_with_which_options_it_was_differentiated(method: str, given: dict[str, Any], reported: Any):
    """A smoothed gradient is another for each smoothing, and a random one for each seed."""
    operations, problem = make(), projection((-1, 2), (-3, -0.5))
    choice = {"differentiation": DifferentiationDocument(method=method, options=given)}
    upstream = {"upstream.z": tensor([1, 2], [3, 4])}
    at_once, _ = solve(operations, problem | upstream, solver=SolverDocument(name="pdipm"), **choice)
    kept, _ = solve(operations, problem, solver=SolverDocument(name="pdipm"))
    by_state, _ = vjp(operations, upstream, state=kept.state, **choice)
    assert at_once.report.method_options == by_state.report.method_options == reported
    assert kept.report.method_options is None


def test_without_a_batch_nothing_in_the_reply_has_one():
    tensors = projection((-1, 2))
    tensors["problem.q"] = tensors["problem.q"][0]
    reply, out = solve(make(), tensors | {"upstream.z": tensor(1, 1)})
    assert (reply.status, reply.gradient_status, reply.report.flags) == ("optimal", "ok", [])
    assert out["solution.z"].shape == (2,)
    assert out["report.gap"].shape == ()
    torch.testing.assert_close(out["gradients.q"], tensor(-1, 0), **CLOSE)
    assert set(reply.timings_ms) == {"solve", "differentiate"}


def test_the_reply_has_the_dtype_of_the_request():
    tensors = {name: t.float() for name, t in projection((-1, 2)).items()} | {"upstream.z": torch.ones(1, 2)}
    _, out = solve(make(), tensors)
    assert {t.dtype for name, t in out.items() if not name.startswith("report.")} == {torch.float32}
    assert out["report.gap"].dtype == D


@pytest.mark.parametrize("form", ["full", "adjoint"])
def test_vjp_by_state_at_a_point_and_with_the_solve_agree(form: str):
    operations, problem = make(), projection((-1, 2), (-3, -0.5))
    upstream = {"upstream.z": tensor([1, 2], [3, 4]), "upstream.lam": tensor([0.5, 0.25], [0, 0])}
    at_once, out = solve(operations, problem | upstream, gradients=form)
    kept, solved = solve(operations, problem)
    by_state, first = vjp(operations, upstream, state=kept.state, gradients=form)
    by_point, second = vjp(operations, problem | points(solved) | upstream, gradients=form)
    section = {"full": "gradients", "adjoint": "adjoint"}[form]
    names = [name for name in out if name.startswith(section)]
    assert len(names) == {"full": 4, "adjoint": 3}[form]
    for name in names:
        torch.testing.assert_close(first[name], out[name], **CLOSE)
        torch.testing.assert_close(second[name], out[name], **CLOSE)
    assert at_once.gradient_status == by_state.gradient_status == by_point.gradient_status == ["ok", "ok"]
    if form == "full":
        # z = max(−q, 0) and λ = max(q, 0); the gradient of the shared h is summed.
        torch.testing.assert_close(out["gradients.q"], tensor([-1, 0.25], [-3, -4]), **CLOSE)


def test_several_cotangents_stand_in_front_of_the_batch():
    upstream = {"upstream.z": torch.eye(2, dtype=D).unsqueeze(1)}
    _, out = solve(make(), projection((-1, -2)) | upstream, wrt=["q", "Q"])
    torch.testing.assert_close(out["gradients.q"], -torch.eye(2, dtype=D).unsqueeze(1), **CLOSE)
    assert out["gradients.Q"].shape == (2, 2, 2)
    assert "gradients.h" not in out


def test_jvp_by_state_and_at_a_point_agree():
    operations, problem = make(), projection((-1, 2), (-3, -0.5))
    kept, solved = solve(operations, problem)
    tangents = {"tangents.q": tensor([1, 1], [1, 2])}
    reply, out = jvp(operations, tangents, state=kept.state)
    _, again = jvp(operations, problem | points(solved) | tangents)
    torch.testing.assert_close(out["tangents.z"], tensor([-1, 0], [-1, -2]), **CLOSE)
    torch.testing.assert_close(out["tangents.lam"], tensor([0, 1], [0, 0]), **CLOSE)
    for name in ("z", "nu", "lam", "s"):
        torch.testing.assert_close(again[f"tangents.{name}"], out[f"tangents.{name}"], **CLOSE)
    assert reply.gradient_status == ["ok", "ok"]


def test_two_sided_problems_speak_their_own_names():
    problem = {
        "problem.P": torch.eye(2, dtype=D),
        "problem.q": tensor(-3, 1),
        "problem.A": torch.eye(2, dtype=D),
        "problem.l": tensor(-1, 0),
        "problem.u": tensor(1, float("inf")),
    }
    document = ProblemDocument(kind="qp_two_sided")
    operations = make()
    reply, out = solve(operations, problem | {"upstream.x": tensor(1, 1)}, problem=document)
    torch.testing.assert_close(out["solution.x"], tensor(1, 0), **CLOSE)
    torch.testing.assert_close(out["solution.y"], tensor(2, -1), **CLOSE)
    torch.testing.assert_close(out["gradients.u"], tensor(1, 0), **CLOSE)
    torch.testing.assert_close(out["gradients.l"], tensor(0, 1), **CLOSE)
    assert reply.gradient_status == "ok"


@pytest.mark.parametrize(
    ("keep_state", "with_upstream", "is_kept"),
    [(None, False, True), (None, True, False), (True, True, True), (False, False, False)],
)
def test_state_is_kept_unless_the_solve_was_differentiated_or_says_so(
    keep_state: bool | None, with_upstream: bool, is_kept: bool
):
    tensors = projection((-1, 2)) | ({"upstream.z": tensor([1, 1])} if with_upstream else {})
    reply, _ = solve(make(), tensors, keep_state=keep_state)
    assert (reply.state is not None) is is_kept


def test_callers_who_keep_no_state_evict_nobody():
    operations = make(budget_bytes=4096)
    kept, _ = solve(operations, projection((-1, 2)))
    for _ in range(12):
        solve(operations, projection((-1, 2)), keep_state=False)
    reply, _ = vjp(operations, {"upstream.z": tensor([1, 1])}, state=kept.state)
    assert reply.gradient_status == ["ok"]


def test_a_state_over_the_budget_is_not_kept():
    reply, _ = solve(make(budget_bytes=16), projection((-1, 2)))
    assert reply.state is None


def test_an_edited_problem_has_lost_its_state():
    operations, problem = make(), projection((-1, 2))
    kept, _ = solve(operations, problem)
    problem["problem.q"].add_(1.0)
    with pytest.raises(StateGone):
        vjp(operations, {"upstream.z": tensor([1, 1])}, state=kept.state)


def test_a_released_state_is_gone():
    operations = make()
    kept, _ = solve(operations, projection((-1, 2)))
    operations.release(kept.state, owner="me")
    with pytest.raises(StateGone):
        vjp(operations, {"upstream.z": tensor([1, 1])}, state=kept.state)


def test_one_failure_leaves_its_batchmate_alone():
    reply, out = solve(make(), mixed() | {"upstream.z": tensor([1.0], [1.0])})
    assert reply.status == ["optimal", "infeasible"]
    assert reply.gradient_status == ["ok", "infeasible"]
    torch.testing.assert_close(out["solution.z"][0], tensor(1.0), **CLOSE)
    assert out["gradients.q"][0].item() == pytest.approx(0.0, abs=1e-12)
    assert out["gradients.h"][0].tolist() == pytest.approx([1.0, 0.0])
    assert out["gradients.q"][1].isnan().all()
    assert out["gradients.Q"].isnan().all(), "the sum over a shared parameter is marked"


def test_failed_gradients_zero_leaves_the_problem_out_of_the_sum():
    tensors = mixed() | {"upstream.z": tensor([1.0], [1.0])}
    _, alone = solve(
        make(), {name: t[:1] if t.shape[0] == 2 and name[-1] in "qhz" else t for name, t in tensors.items()}
    )
    _, out = solve(make(), tensors, failed_gradients="zero")
    torch.testing.assert_close(out["gradients.Q"], alone["gradients.Q"], **CLOSE)
    torch.testing.assert_close(out["gradients.G"], alone["gradients.G"], **CLOSE)
    assert out["gradients.q"][1].tolist() == [0.0]
    _, adjoint = solve(make(), tensors, failed_gradients="zero", gradients="adjoint")
    assert adjoint["adjoint.z"][1].tolist() == [0.0]


def test_failed_tangents_are_nan_or_zero():
    operations = make()
    kept, _ = solve(operations, mixed())
    tangents = {"tangents.h": tensor([1.0, 0.0], [1.0, 0.0])}
    reply, out = jvp(operations, tangents, state=kept.state)
    assert reply.gradient_status == ["ok", "infeasible"]
    torch.testing.assert_close(out["tangents.z"][0], tensor(1.0), **CLOSE)
    assert out["tangents.z"][1].isnan().all()
    _, out = jvp(operations, tangents, state=kept.state, failed_gradients="zero")
    assert out["tangents.z"].tolist() == [[1.0], [0.0]]


def test_the_cotangent_of_a_failed_problem_may_be_nan():
    nan = float("nan")
    reply, out = solve(make(), mixed() | {"upstream.z": tensor([1.0], [nan])})
    assert reply.gradient_status == ["ok", "infeasible"]
    assert out["gradients.h"][0].tolist() == pytest.approx([1.0, 0.0])
    with pytest.raises(ProblemError, match=r"upstream\.z: found nan at \[0, 0\], wanted finite numbers"):
        solve(make(), mixed() | {"upstream.z": tensor([nan], [1.0])})


@pytest.mark.parametrize(
    ("tensors", "fields", "message"),
    [
        ({"upstream.x": tensor([1, 1])}, {}, r"upstream: found 'x', wanted one of z, nu, lam, s"),
        ({"upstream.z": tensor([1, 1, 1])}, {}, r"upstream\.z: found shape \(1, 3\), wanted \(1, 2\) or \(k, 1, 2\)"),
        ({"upstream.z": tensor([1, 1])}, {"wrt": ["q", "c"]}, r"wrt: found 'c', wanted one of Q, q, G, h"),
        ({"upstream.z": tensor([1, 1])}, {"wrt": ["q", "q"]}, r"wrt: found a name twice in \['q', 'q'\]"),
        (
            {},
            {"solver": SolverDocument(name="gurobi")},
            r"solver\.name: found 'gurobi', wanted one of auto, pivoting, ",
        ),
        ({"warm_start.z": tensor([1, 1, 1])}, {}, r"warm_start\.z: found shape"),
    ],
)
def test_wrong_fields_of_a_solve_are_named(tensors: TensorMap, fields: dict[str, Any], message: str):
    with pytest.raises(ProblemError, match=message):
        solve(make(), projection((-1, 2)) | tensors, **fields)


@pytest.mark.parametrize(
    ("tensors", "fields", "message"),
    [
        ({}, {}, r"state: found nothing, wanted a state token, or problem\.\* and solution\.\*"),
        ({**projection((-1, 2))}, {"state": "x"}, r"state: found a token beside problem\.\*"),
        ({**projection((-1, 2))}, {}, r"upstream: found nothing"),
        ({**projection((-1, 2)), "upstream.z": tensor([1, 1])}, {}, r"solution\.z: found nothing"),
    ],
)
def test_wrong_fields_of_a_vjp_are_named(tensors: TensorMap, fields: dict[str, Any], message: str):
    with pytest.raises(ProblemError, match=message):
        vjp(make(), tensors, **fields)


def test_a_jvp_needs_a_tangent_and_refuses_nan():
    operations = make()
    kept, _ = solve(operations, projection((-1, 2)))
    with pytest.raises(ProblemError, match=r"tangents: found nothing, wanted at least one tangent"):
        jvp(operations, {}, state=kept.state)
    with pytest.raises(ProblemError, match=r"tangents\.q: found nan"):
        jvp(operations, {"tangents.q": tensor([1.0, float("nan")])}, state=kept.state)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"variables": 1}, r"variables of the problem: found 2, wanted at most 1 \(ARGRAD_MAX_VARIABLES\)"),
        ({"constraints": 1}, r"constraints of the problem: found 2, wanted at most 1 \(ARGRAD_MAX_CONSTRAINTS\)"),
        ({"batch": 1}, r"problems in the batch: found 2, wanted at most 1 \(ARGRAD_MAX_BATCH\)"),
        ({"cotangents": 2}, r"cotangents: found 3, wanted at most 2 \(ARGRAD_MAX_COTANGENTS\)"),
        ({"work_bytes": 100}, r"memory to solve 2 problems with 2 variables and 2 constraints: found \d+ bytes"),
        ({"reply_bytes": 100}, r"reply .*: found \d+ bytes, wanted at most 100 bytes \(ARGRAD_MAX_REPLY_BYTES\)"),
    ],
)
def test_what_is_over_a_limit_is_refused_before_it_is_solved(limits: dict[str, int], message: str):
    tensors = projection((-1, 2), (-3, -0.5)) | {"upstream.z": torch.ones(3, 2, 2, dtype=D)}
    with pytest.raises(TooLarge, match=message):
        make(**limits).prepare_solve(SolveRequest(), tensors, owner="me")


def test_a_json_reply_has_a_limit_of_its_own():
    operations = make(json_reply_bytes=1000)
    tensors = projection(*[(-1.0, 2.0)] * 20)
    operations.prepare_solve(SolveRequest(), tensors, owner="me")
    with pytest.raises(TooLarge, match=r"reply in JSON \(the binary form is smaller\): found 5500 bytes"):
        operations.prepare_solve(SolveRequest(), tensors, owner="me", is_json=True)


def test_iterations_have_the_service_s_own_bound():
    with pytest.raises(ProblemError, match=r"solver\.max_iterations: found 100, wanted at most 50"):
        make(iterations=50).prepare_solve(SolveRequest(), projection((-1, 2)), owner="me")


def test_sizes_are_read_before_bounds_are_expanded():
    tensors = {"Q": torch.zeros(3, 3), "q": torch.zeros(7, 3), "lb": torch.zeros(3), "ub": torch.zeros(7, 3)}
    assert Size.of(tensors) == Size(batch=7, n=3, rows=6)
    assert Size.of({"P": torch.zeros(3, 3), "l": torch.zeros(5), "u": torch.zeros(5)}) == Size(1, 3, 10)
    assert Size.of({"q": torch.zeros(())}) == Size(1, 0, 0)


def test_a_shared_matrix_with_a_million_problems_is_refused_whatever_the_bytes_that_came():
    million = torch.zeros(1, dtype=D).expand(1_000_000, 1)
    tensors = {
        "problem.Q": torch.eye(100, dtype=D),
        "problem.q": torch.zeros(100, dtype=D),
        "problem.G": torch.ones(1, 100, dtype=D),
        "problem.h": million,
    }
    with pytest.raises(TooLarge, match=r"memory to solve 1000000 problems with 100 variables and 1 constraints"):
        make(work_bytes=8 << 30).prepare_solve(SolveRequest(), tensors, owner="me")


_PEAK = """
import resource, sys, torch
from argrad.problems import QP
from argrad_service import engine
B, n, m = map(int, sys.argv[1:])
D = torch.float64
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
engine.solve(QP(Q=torch.eye(2, dtype=D), q=torch.ones(2, dtype=D)))
q, G, h = torch.randn(B, n, dtype=D), torch.randn(B, m, n, dtype=D), torch.rand(B, m, dtype=D)
before = peak()
problem = QP(Q=torch.eye(n, dtype=D).repeat(B, 1, 1), q=q, G=G, h=h)
engine.vjp(engine.solve(problem), {"z": torch.ones(B, n, dtype=D)})
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "n", "m"), [(128, 100, 100), (32, 100, 300), (20_000, 5, 10)])
def test_a_solve_takes_less_memory_than_was_estimated(batch: int, n: int, m: int):
    command = [sys.executable, "-c", _PEAK, str(batch), str(n), str(m)]
    taken = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    estimate = Size(batch, n, m).work_bytes
    assert taken < estimate


def test_cotangents_on_bounds_of_a_fixed_variable_are_read_at_the_solution():
    # z₁ is fixed at 1 by lb = ub, and q₁ = −3 presses it up: λ_ub = 3 − 1 = 2 and λ_lb = 0, so ∂λ_ub/∂q₁ = −1.
    problem = {
        "problem.Q": torch.eye(2, dtype=D),
        "problem.q": tensor(-3, 1),
        "problem.lb": tensor(1, -5),
        "problem.ub": tensor(1, 5),
    }
    operations = make()
    upstream = {"upstream.lam_ub": tensor(1, 0)}
    _, at_once = solve(operations, problem | upstream, wrt=["q"])
    kept, point = solve(operations, problem)
    _, by_state = vjp(operations, upstream, state=kept.state, wrt=["q"])
    torch.testing.assert_close(point["solution.lam_ub"], tensor(2, 0), **CLOSE)
    torch.testing.assert_close(at_once["gradients.q"], tensor(-1, 0), **CLOSE)
    torch.testing.assert_close(by_state["gradients.q"], tensor(-1, 0), **CLOSE)


@pytest.mark.parametrize("method", ["folded", "smoothed"])
def test_a_derivative_by_state_asks_its_own_call_whether_to_go_on(method: str):
    operations = make()
    is_over = False
    solver = SolverDocument(name="pdipm")
    run = operations.prepare_solve(SolveRequest(solver=solver), projection((-1, 2)), owner="me")
    reply, _ = run(lambda: is_over, {})
    is_over = True
    request = VjpRequest(state=reply.state, differentiation=DifferentiationDocument(method=method))
    prepared = operations.prepare_vjp(request, {"upstream.z": tensor([1, 1])}, owner="me")
    assert prepared(never_stop, {})[0].gradient_status == ["ok"]
    with pytest.raises(Stopped):
        prepared(lambda: True, {})

"""Vector-Jacobian products at points that callers bring, whose states are gone: taken over as one batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from argrad.wire.messages import SolverDocument, SolveRequest, TensorMap, VjpRequest
from argrad_service.engine.options import never_stop
from argrad_service.operations import Operations
from argrad_service.together import Participant, pull_back_together
from argrad_service.vjps import Vjp
from tests.service.support import D
from tests.service.test_batching import assert_same, draw, make, prepared
from tests.service.test_merged_vjps import SHAPES, at_once, check, cotangents
from tests.service.test_registered_batches import House


def brought(operations: Operations, tensors: TensorMap, upstream: TensorMap, **fields: Any) -> Vjp:
    """A vjp whose caller brings problem and solution."""
    out = prepared(operations, tensors)(never_stop, {})[1]
    solution = {name: t for name, t in out.items() if name.startswith("solution.") and name != "solution.s"}
    run = operations.prepare_vjp(VjpRequest(**fields), tensors | solution | upstream, owner="me")
    assert isinstance(run, Vjp)
    return run


@pytest.mark.parametrize(("names", "k"), [("z", None), ("z lam s", None), ("z lam", 3)])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_derivatives_are_those_of_each_caller_alone(
    shapes: list[tuple[int, int, int, int | None]], names: str, k: int | None
) -> None:
    operations = make()
    tensors = [draw(n, m, p, batch=batch, seed=i) for i, (n, m, p, batch) in enumerate(shapes)]
    check([brought(operations, given, cotangents(given, names, k=k)) for given in tensors])


def test_linear_programs_and_callers_who_want_different_things() -> None:
    operations = make()
    linear = [draw(6, 9, seed=i, is_linear=True) for i in range(3)]
    check([brought(operations, given, cotangents(given, "z"), failed_gradients="zero") for given in linear])
    tensors = [draw(10, 8, seed=i) for i in range(4)]
    wishes: list[dict[str, Any]] = [{}, {"gradients": "adjoint"}, {"wrt": ["q", "h"]}, {"precision": "float32"}]
    check([brought(operations, t, cotangents(t, "z"), **wish) for t, wish in zip(tensors, wishes, strict=True)])


def test_a_point_that_is_no_solution_is_its_callers_alone() -> None:
    operations = make()
    tensors = [draw(10, 8, seed=i) for i in range(3)]
    calls = [brought(operations, given, cotangents(given, "z")) for given in tensors]
    assert calls[1].point is not None
    calls[1].point.z.add_(3.0)
    answers = at_once(calls)
    statuses = [reply.gradient_status for reply, _ in answers]
    assert statuses[::2] == ["ok", "ok"]
    assert statuses[1] == calls[1](never_stop, {})[0].gradient_status != "ok"
    assert torch.isnan(answers[1][1]["gradients.q"]).all()
    for i in (0, 2):
        assert_same(answers[i][1], calls[i](never_stop, {})[1])


def test_one_visit_to_the_engine_for_all() -> None:
    operations = make()
    calls = [brought(operations, t, cotangents(t, "z")) for t in (draw(10, 8, seed=i) for i in range(4))]
    visits: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def at_point(self, problem: Any, *rest: Any, **more: Any) -> Any:
            visits.append(problem.batch_size)
            return inner.at_point(problem, *rest, **more)

    inner = calls[0].engine
    object.__setattr__(calls[0], "engine", Counting())
    timings: list[dict[str, float]] = [{} for _ in calls]
    participants = [
        Participant(asked=c, timings=t, has_left=lambda: False) for c, t in zip(calls, timings, strict=True)
    ]
    assert all(answer is not None for answer in pull_back_together(participants, never_stop))
    assert visits == [4]
    assert all(t["differentiate"] > 0 for t in timings)


def test_what_goes_alone() -> None:
    operations, plain = make(), draw(6, 4)
    upstream = cotangents(plain, "z")

    def key(run: Vjp) -> Any:
        return None if run.lot is None else run.lot.key

    wanted = key(brought(operations, plain, upstream))
    assert wanted is not None
    assert key(brought(operations, plain, upstream, solver=SolverDocument(tolerance=1e-6))) != wanted
    assert key(brought(operations, plain, upstream, solver=SolverDocument(name="osqp"))) is None
    assert key(brought(operations, plain, upstream, differentiation={"method": "bpqp"})) is None
    assert key(brought(make(None), plain, upstream)) is None
    solve = operations.prepare_solve(SolveRequest(), plain | upstream, owner="me")
    assert solve.lot is not None  # type: ignore[attr-defined]
    assert solve.lot.key != wanted  # type: ignore[attr-defined]
    house, tensors = House(), draw(12, 9, 2)
    request = house.register(tensors)
    q = torch.randn(12, dtype=D)
    out = house.prepare(request, tensors | {"problem.q": q})(never_stop, {})[1]
    given = {name: t for name, t in out.items() if name.startswith("solution.")}
    named = house.operations.prepare_vjp(
        VjpRequest(problem=request.problem),
        {"problem.q": q, "upstream.z": torch.ones(12, dtype=D), **given},
        owner="me",
    )
    assert isinstance(named, Vjp)
    assert named.lot is None

"""Vector-Jacobian products of several callers as one batch: what each gets is what it gets alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from argrad.errors import ProblemError
from argrad.wire.messages import SolveReply, SolveRequest, TensorMap, VjpReply, VjpRequest
from argrad_service import engine
from argrad_service.engine.options import never_stop
from argrad_service.engine.outcome import Backward
from argrad_service.operations import Operations
from argrad_service.together import Participant, pull_back_together
from argrad_service.vjps import Vjp
from tests.service.support import D, HookedEngine, make_app, post, running_app
from tests.service.test_batching import assert_same, draw, make, prepared, queued, together
from tests.service.test_registered_batches import House

pytestmark = pytest.mark.anyio


def states(operations: Operations, tensors: Sequence[TensorMap]) -> list[str]:
    """Tokens of solves that were one batch."""
    return [reply.state for reply, _ in together([prepared(operations, given) for given in tensors])]


def pulled(operations: Operations, token: str, upstream: TensorMap, **fields: Any) -> Vjp:
    run = operations.prepare_vjp(VjpRequest(state=token, **fields), upstream, owner="me")
    assert isinstance(run, Vjp)
    return run


def at_once(calls: Sequence[Vjp]) -> list[Any]:
    participants = [Participant(asked=call, timings={}, has_left=lambda: False) for call in calls]
    return pull_back_together(participants, never_stop)


def check(calls: Sequence[Vjp]) -> None:
    """One key, and the same derivatives as alone."""
    assert len({call.lot.key for call in calls if call.lot}) == 1
    for call, (reply, out) in zip(calls, at_once(calls), strict=True):
        alone, wanted = call(never_stop, {})
        assert (reply.gradient_status, reply.report) == (alone.gradient_status, alone.report)
        assert_same(out, wanted)


async def test_callers_whose_batches_have_matrices_of_their_own_are_differentiated_together():
    operations = make()
    tensors = [draw(20, 20, batch=3, seed=i) for i in range(3)]
    for given in tensors:
        given |= {name: given[name][0] for name in ("problem.Q", "problem.G")}
    tokens = [prepared(operations, given)(never_stop, {})[0].state for given in tensors]
    check([pulled(operations, t, cotangents(g, "z lam")) for t, g in zip(tokens, tensors, strict=True)])


def cotangents(tensors: TensorMap, names: str, *, k: int | None = None) -> TensorMap:
    like = {"z": tensors["problem.q"], "lam": tensors["problem.h"], "s": tensors["problem.h"]}
    lead = () if k is None else (k,)
    return {f"upstream.{name}": torch.randn(*lead, *like[name].shape, dtype=D) for name in names.split()}


SHAPES: Mapping[str, list[tuple[int, int, int, int | None]]] = {
    "one shape": [(10, 8, 0, None)] * 3,
    "more rows than variables": [(9, 28, 0, None)] * 2,
    "a batch among them": [(12, 9, 3, None), (12, 9, 3, 3), (12, 9, 3, None)],
    "sizes padded by the solve": [(17, 19, 0, None), (18, 20, 0, 2), (17, 18, 0, None)],
}


@pytest.mark.parametrize(("names", "k"), [("z", None), ("z lam s", None), ("z lam", 3)])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_derivatives_are_those_of_each_caller_alone(
    shapes: list[tuple[int, int, int, int | None]], names: str, k: int | None
) -> None:
    operations = make()
    tensors = [draw(n, m, p, batch=batch, seed=i) for i, (n, m, p, batch) in enumerate(shapes)]
    tokens = states(operations, tensors)
    check([pulled(operations, t, cotangents(given, names, k=k)) for t, given in zip(tokens, tensors, strict=True)])


def test_states_of_solves_alone_and_of_several_batches() -> None:
    operations = make()
    tensors = [draw(10, 8, seed=i, batch=3 if i == 4 else None) for i in range(5)]
    tokens = states(operations, tensors[:2]) + states(operations, tensors[2:4])
    tokens.append(prepared(operations, tensors[4])(never_stop, {})[0].state or "")
    calls = [pulled(operations, t, cotangents(given, "z")) for t, given in zip(tokens, tensors, strict=True)]
    check([*calls, pulled(operations, tokens[0], cotangents(tensors[0], "z"))])


def test_one_state_asked_several_times() -> None:
    operations, tensors = make(), draw(10, 8)
    token = prepared(operations, tensors)(never_stop, {})[0].state
    assert token is not None
    check([pulled(operations, token, cotangents(tensors, "z")) for _ in range(3)])


def test_callers_who_want_different_things() -> None:
    operations = make()
    tensors = [draw(10, 8, seed=i) for i in range(4)]
    wishes: list[dict[str, Any]] = [{}, {"gradients": "adjoint"}, {"wrt": ["q", "h"]}, {"precision": "float32"}]
    calls = [
        pulled(operations, token, cotangents(given, "z"), **wish)
        for token, given, wish in zip(states(operations, tensors), tensors, wishes, strict=True)
    ]
    check(calls)


def test_shared_parameters_and_registered_ones() -> None:
    house, tensors = House(), draw(12, 9, 2)
    request = house.register(tensors)
    solves = [house.prepare(request, tensors | {"problem.q": torch.randn(3, 12, dtype=D)}) for _ in range(3)]
    upstream = {"upstream.z": torch.randn(3, 12, dtype=D)}
    for tokens in ([r.state for r, _ in together(solves)], [s(never_stop, {})[0].state for s in solves]):
        check([pulled(house.operations, token, upstream) for token in tokens])


def test_what_goes_alone() -> None:
    operations = make()

    def lot(tensors: TensorMap, **fields: Any) -> Any:
        token = operations.prepare_solve(SolveRequest(), tensors, owner="me")(never_stop, {})[0].state
        assert token is not None
        return pulled(operations, token, {"upstream.z": torch.ones_like(tensors["problem.q"])}, **fields).lot

    plain = draw(6, 4)
    assert lot(plain).key is not None
    assert lot(draw(6, 4, is_linear=True)) is None
    assert lot(plain | {"problem.G": torch.zeros(4, 6, dtype=D), "problem.h": -torch.ones(4, dtype=D)}) is None
    assert lot({name: t.float() for name, t in plain.items()}).key is None
    assert lot(plain, differentiation={"method": "bpqp"}).key is None
    assert lot(draw(200, 100)).key is None
    out = prepared(operations, plain)(never_stop, {})[1]
    given = plain | {name: t for name, t in out.items() if name.startswith("solution.")}
    run = operations.prepare_vjp(VjpRequest(), given | {"upstream.z": torch.ones(6, dtype=D)}, owner="me")
    assert isinstance(run, Vjp)
    assert run.lot is not None
    assert run.lot.key not in (None, lot(plain).key)
    unbatched = make(None)
    token = unbatched.prepare_solve(SolveRequest(), plain, owner="me")(never_stop, {})[0].state
    assert token is not None
    assert pulled(unbatched, token, cotangents(plain, "z")).lot is None


def test_a_wrong_cotangent_and_a_caller_that_left_are_their_own_alone() -> None:
    operations = make()
    tensors = [draw(10, 8, seed=i) for i in range(4)]
    upstream = [cotangents(given, "z") for given in tensors]
    upstream[1]["upstream.z"][0] = torch.nan
    calls = [pulled(operations, *pair) for pair in zip(states(operations, tensors), upstream, strict=True)]
    participants = [Participant(asked=c, timings={}, has_left=lambda i=i: i == 2) for i, c in enumerate(calls)]
    answers: list[Any] = pull_back_together(participants, never_stop)
    assert isinstance(answers[1], ProblemError)
    assert answers[1].field == "upstream.z"
    assert answers[2] is None
    for i in (0, 3):
        assert_same(answers[i][1], calls[i](never_stop, {})[1])
        assert "differentiate" in participants[i].timings


class Gated(HookedEngine):
    """Keeps the first solve after `hold` until it is released, and counts what is differentiated together."""

    def __init__(self) -> None:
        super().__init__()
        self.released, self.entered = threading.Event(), threading.Event()
        self.released.set()
        self.order: list[tuple[str, int]] = []

    def solve(self, problem: Any, **more: Any) -> Any:
        self.order.append(("solve", problem.batch_size or 1))
        if not self.released.is_set():
            self.entered.set()
            assert self.released.wait(10)
        return super().solve(problem, **more)

    def vjp(self, forward: Any, upstream: Any, **more: Any) -> Backward:
        self.order.append(("vjp", len(forward.status)))
        return engine.vjp(forward, upstream, **more)


@pytest.mark.parametrize("batching", [True, False], ids=["on", "off"])
async def test_vjps_that_wait_go_together_and_before_the_solves(batching: bool) -> None:
    gated = Gated()
    tensors = [draw(6, 4, seed=i) for i in range(5)]
    async with running_app(make_app(engine_=gated, batching=batching)) as client:
        tokens = [(await post(client, "/v1/solve", SolveRequest(), t, SolveReply))[0].state for t in tensors]
        gated.order.clear()
        gated.released.clear()
        first = asyncio.create_task(post(client, "/v1/solve", SolveRequest(), tensors[0], SolveReply))
        assert await asyncio.to_thread(gated.entered.wait, 5)
        solves = [asyncio.create_task(post(client, "/v1/solve", SolveRequest(), t, SolveReply)) for t in tensors[:2]]
        await queued(client, 2)
        upstream = [cotangents(given, "z") for given in tensors]
        tasks = [
            asyncio.create_task(post(client, "/v1/vjp", VjpRequest(state=token), given, VjpReply))
            for token, given in zip(tokens, upstream, strict=True)
        ]
        await queued(client, 7)
        tasks[1].cancel()
        await asyncio.gather(tasks[1], return_exceptions=True)
        await queued(client, 7)  # it stands in the queue until its turn comes
        gated.released.set()
        answers = [await task for i, task in enumerate(tasks) if i != 1]
        await asyncio.gather(first, *solves)
    together_ = [("vjp", 4), ("solve", 2)] if batching else [("vjp", 1)] * 4 + [("solve", 1)] * 2
    assert gated.order == [("solve", 1), *together_]
    operations = make()
    kept = [i for i in range(5) if i != 1]
    for i, (reply, out) in zip(kept, answers, strict=True):
        token = prepared(operations, tensors[i])(never_stop, {})[0].state
        assert token is not None
        assert reply.gradient_status == "ok"
        assert_same(out, pulled(operations, token, upstream[i])(never_stop, {})[1])

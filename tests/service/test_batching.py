"""Problems of several callers as one batch: what each gets is what it gets alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
import torch

from argrad.errors import ProblemError
from argrad.options import Options
from argrad.problems import QP
from argrad.wire import SAFETENSORS, encode
from argrad.wire.messages import JvpRequest, SolverDocument, SolveReply, SolveRequest, TensorMap, VjpRequest
from argrad_service import engine
from argrad_service.admission import Limits
from argrad_service.batching.frames import Frame, Sizes, ceiling, frame_of, padded
from argrad_service.engine.options import Stopped, never_stop
from argrad_service.operations import Operations
from argrad_service.scheduling import Budget, Unfinished
from argrad_service.solves import Solve, SplitSolve
from argrad_service.state import MemoryStateStore, TokenSigner
from argrad_service.together import Participant, solve_together
from tests.service.support import SECRET, D, HookedEngine, make_app, post, projection, running_app, simplex

pytestmark = pytest.mark.anyio

WIDE = Budget(flops=1e9, nbytes=1 << 30)


def make(budget: Budget | None = WIDE, engine_: Any = engine) -> Operations:
    store = MemoryStateStore(budget_bytes=1 << 30, ttl_s=60.0, signer=TokenSigner(SECRET))
    return Operations(engine=engine_, store=store, limits=Limits(), device=torch.device("cpu"), budget=budget)


def draw(n: int, m: int, p: int = 0, *, batch: int | None = None, is_linear: bool = False, seed: int = 0) -> TensorMap:
    """A problem with a solution: strictly convex, or an LP on a box."""
    torch.manual_seed(1000 * n + 10 * m + p + seed)
    lead = () if batch is None else (batch,)
    G, z = torch.randn(*lead, m, n, dtype=D), torch.randn(*lead, n, dtype=D)
    if is_linear:
        G = torch.cat([G, torch.eye(n, dtype=D).expand(*lead, n, n), -torch.eye(n, dtype=D).expand(*lead, n, n)], -2)
    h = (G @ z.unsqueeze(-1)).squeeze(-1) + torch.rand(*lead, G.shape[-2], dtype=D) + (1.0 if is_linear else 0.0)
    tensors = {"problem.q": torch.randn(*lead, n, dtype=D), "problem.G": G, "problem.h": h}
    if not is_linear:
        root = torch.randn(*lead, n, n, dtype=D)
        tensors["problem.Q"] = root @ root.mT / n + torch.eye(n, dtype=D)
    if p:
        A = torch.randn(*lead, p, n, dtype=D)
        tensors |= {"problem.A": A, "problem.b": (A @ z.unsqueeze(-1)).squeeze(-1)}
    return tensors


def prepared(operations: Operations, tensors: TensorMap, **fields: Any) -> Solve:
    run = operations.prepare_solve(SolveRequest(**fields), tensors, owner="me")
    assert isinstance(run, Solve)
    return run


def together(solves: Sequence[Solve]) -> list[Any]:
    participants = [Participant(asked=solve, timings={}, has_left=lambda: False) for solve in solves]
    return solve_together(participants, never_stop)


def with_cotangents(tensors: TensorMap) -> TensorMap:
    sizes = {"z": tensors["problem.q"], "lam": tensors["problem.h"], "s": tensors["problem.h"]}
    return tensors | {f"upstream.{name}": torch.randn_like(like) for name, like in sizes.items()}


def assert_same(found: TensorMap, wanted: TensorMap) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted.keys() - {"report.iterations", "report.gap", "report.primal_residual", "report.dual_residual"}:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


SHAPES = {
    "one shape": [(10, 10, 0)] * 3,
    "variables and rows": [(17, 19, 0), (18, 20, 0), (17, 18, 0)],
    "equalities too": [(25, 10, 9), (26, 9, 10), (25, 10, 10)],
    "more rows than variables": [(9, 28, 0), (10, 25, 0)],
}


@pytest.mark.parametrize("solver", ["auto", "pdipm", "pivoting"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
async def test_solutions_and_gradients_are_those_of_each_caller_alone(solver: str, shapes: list[tuple[int, ...]]):
    operations = make()
    tensors = [with_cotangents(draw(*shape, batch=3 if i == 1 else None)) for i, shape in enumerate(shapes)]
    solves = [prepared(operations, t, solver=SolverDocument(name=solver)) for t in tensors]
    assert len({solve.lot.key for solve in solves if solve.lot}) == 1
    for solve, (reply, out) in zip(solves, together(solves), strict=True):
        alone, wanted = solve(never_stop, {})
        assert (reply.status, reply.gradient_status) == (alone.status, alone.gradient_status)
        assert_same(out, wanted)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
async def test_derivatives_by_token_are_those_of_each_caller_alone(shapes: list[tuple[int, ...]]):
    operations = make()
    tensors = [draw(*shape, batch=2 if i == 1 else None) for i, shape in enumerate(shapes)]
    solves = [prepared(operations, t) for t in tensors]
    for solve, given, (reply, _) in zip(solves, tensors, together(solves), strict=True):
        alone = solve(never_stop, {})[0]
        up = {k: v for k, v in with_cotangents(given).items() if k.startswith("upstream")}
        moves = {k.replace("problem", "tangents"): torch.randn_like(v) for k, v in given.items()}
        for prepare, request, tensors_ in (
            (operations.prepare_vjp, VjpRequest, up),
            (operations.prepare_vjp, VjpRequest, {k: torch.stack([v, 2 * v]) for k, v in up.items()}),
            (operations.prepare_jvp, JvpRequest, moves),
        ):
            found, wanted = (
                prepare(request(state=token), tensors_, owner="me")(never_stop, {})[1]
                for token in (reply.state, alone.state)
            )
            assert_same(found, wanted)


async def test_linear_programs_are_padded_by_rows_alone():
    operations = make()
    tensors = [with_cotangents(draw(6, m, is_linear=True)) for m in (8, 6)]
    solves = [prepared(operations, t, solver=SolverDocument(name="pdipm")) for t in tensors]
    assert solves[0].lot is not None
    assert solves[1].lot is not None
    assert solves[0].lot.key == solves[1].lot.key
    for solve, (reply, out) in zip(solves, together(solves), strict=True):
        alone, wanted = solve(never_stop, {})
        assert (reply.status, reply.report.flags) == (alone.status, alone.report.flags)
        assert_same(out, wanted)
    other = prepared(operations, draw(7, 8, is_linear=True))
    assert other.lot is not None
    assert other.lot.key != solves[0].lot.key


async def test_a_shared_matrix_of_a_small_batch_is_repeated_and_its_gradient_summed():
    operations = make()
    shared = projection((-1, 2), (3, -4), (5, 6)) | {"upstream.z": torch.ones(3, 2, dtype=D)}
    solves = [
        prepared(operations, shared),
        prepared(operations, projection((1, 1)) | {"upstream.z": torch.ones(1, 2, dtype=D)}),
    ]
    assert solves[0].lot is not None
    assert solves[0].lot.key is not None
    answers = together(solves)
    assert_same(answers[0][1], solves[0](never_stop, {})[1])
    assert answers[0][1]["gradients.Q"].shape == (2, 2)


def one(**changed: torch.Tensor) -> TensorMap:
    return draw(4, 3) | {name.replace("_", "."): value for name, value in changed.items()}


@pytest.mark.parametrize(
    ("tensors", "fields"),
    [
        (one(), {"deterministic": True}),
        (one(problem_entropy=torch.tensor(0.1, dtype=D)), {}),
        (one(upstream_z=torch.ones(4, dtype=D)), {"differentiation": {"method": "bpqp"}}),
        (one(), {"solver": {"name": "osqp"}}),
        (one(warm_start_z=torch.zeros(4, dtype=D)), {}),
        (draw(40, 40) | {"problem.q": torch.ones(64, 40, dtype=D)}, {}),
    ],
    ids=["deterministic", "entropy", "another method", "a library", "warm start", "a large shared matrix"],
)
async def test_what_goes_alone(tensors: TensorMap, fields: dict[str, Any]):
    if "warm.start.z" in tensors:
        tensors = one() | {"warm_start.z": torch.zeros(4, dtype=D), "warm_start.lam": torch.zeros(3, dtype=D)}
    run = make().prepare_solve(SolveRequest.model_validate(fields), tensors, owner="me")
    assert isinstance(run, Solve)
    assert run.lot is not None
    assert run.lot.key is None
    alone = make(None).prepare_solve(SolveRequest(), one(), owner="me")
    assert isinstance(alone, Solve)
    assert alone.lot is None


async def test_one_wrong_cotangent_is_its_caller_s_alone():
    operations = make()
    good, bad = (draw(4, 3) | {"upstream.z": torch.full((4,), value, dtype=D)} for value in (1.0, torch.nan))
    solves = [prepared(operations, t) for t in (good, bad, good)]
    first, wrong, last = together(solves)
    assert isinstance(wrong, ProblemError)
    assert wrong.field == "upstream.z"
    for _, out in (first, last):
        assert_same(out, solves[0](never_stop, {})[1])


async def test_an_infeasible_problem_harms_no_batchmate():
    operations = make()
    infeasible = one(
        problem_G=torch.cat([torch.eye(4, dtype=D)[:1]] * 3) * torch.tensor([[1.0], [-1.0], [1.0]], dtype=D)
    )
    infeasible["problem.h"] = -torch.ones(3, dtype=D)
    solves = [prepared(operations, with_cotangents(t)) for t in (one(), infeasible, one())]
    answers = together(solves)
    assert [reply.status for reply, _ in answers] == ["optimal", "infeasible", "optimal"]
    for i in (0, 2):
        assert_same(answers[i][1], solves[i](never_stop, {})[1])


async def test_a_batch_keeps_no_state_for_who_left_and_none_of_its_neighbours_memory():
    operations = make()
    solves = [prepared(operations, draw(20, 20, seed=i)) for i in range(8)]
    participants = [Participant(asked=s, timings={}, has_left=lambda i=i: i == 3) for i, s in enumerate(solves)]
    answers = solve_together(participants, never_stop)
    assert answers[3] is None
    store = solves[0].store
    assert store.counts().entries == 7
    kept = store.counts().held_bytes / 7
    alone = MemoryStateStore(budget_bytes=1 << 30, ttl_s=60.0, signer=TokenSigner(SECRET))
    Operations(engine=engine, store=alone, limits=Limits(), device=torch.device("cpu")).prepare_solve(
        SolveRequest(), draw(20, 20), owner="me"
    )(never_stop, {})
    assert kept < 2 * alone.counts().held_bytes


async def test_what_is_too_large_for_one_turn_is_solved_in_slices():
    large = draw(6, 6, 2, batch=10)
    budget = Budget(flops=300.0, nbytes=1 << 30)
    operations = make(budget)
    given = with_cotangents(large)
    run = operations.prepare_solve(SolveRequest(keep_state=True), given, owner="me")
    assert isinstance(run, SplitSolve)
    timings: dict[str, float] = {}
    for _ in range(3):
        with pytest.raises(Unfinished):
            run(never_stop, timings)
    reply, out = run(never_stop, timings)
    assert timings.keys() == {"solve", "differentiate"}
    whole = make(None).prepare_solve(SolveRequest(keep_state=True), given, owner="me")
    assert_same(out, whole(never_stop, {})[1])
    up = {"upstream.z": torch.ones(10, 6, dtype=D)}
    gradients = operations.prepare_vjp(VjpRequest(state=reply.state), up, owner="me")(never_stop, {})[1]
    moves = {"tangents.q": torch.ones(10, 6, dtype=D)}
    pushed = operations.prepare_jvp(JvpRequest(state=reply.state), moves, owner="me")(never_stop, {})[1]
    plain = make(None)
    token = plain.prepare_solve(SolveRequest(), large, owner="me")(never_stop, {})[0].state
    assert_same(gradients, plain.prepare_vjp(VjpRequest(state=token), up, owner="me")(never_stop, {})[1])
    assert_same(pushed, plain.prepare_jvp(JvpRequest(state=token), moves, owner="me")(never_stop, {})[1])


async def test_deterministic_means_the_same_bits():
    tensors = with_cotangents(draw(20, 20))
    runs = [prepared(make(), tensors, deterministic=True)(never_stop, {})[1] for _ in range(3)]
    for out in runs[1:]:
        assert all(torch.equal(out[name], runs[0][name]) for name in out)
    assert Options(deterministic=True).deterministic
    with pytest.raises(ProblemError, match="deterministic"):
        Options(deterministic=1)  # type: ignore[arg-type]


def test_sizes_have_classes_of_a_quarter_of_an_octave():
    assert [ceiling(n) for n in (0, 1, 8, 9, 11, 16, 17, 33, 100)] == [0, 1, 8, 10, 12, 16, 20, 40, 112]
    assert frame_of([Sizes(5, 0, 3), Sizes(4, 2, 7)]) == Sizes(7, 2, 7)


def test_padding_is_inert_by_construction():
    small, large = (QP(**{k[8:]: v for k, v in draw(n, m, p).items()}) for n, m, p in ((3, 2, 1), (5, 4, 2)))
    frame = frame_of([Sizes.of(small), Sizes.of(large)])
    problem = padded([small, large], [1, 1], frame)
    assert (problem.n, problem.p, problem.m) == (5, 2, 4)
    assert problem.Q is not None
    assert problem.A is not None
    assert problem.h is not None
    assert problem.Q[0, 3:, 3:].diagonal().tolist() == [small.Q.diagonal().max()] * 2  # type: ignore[union-attr]
    assert problem.A[0, 1].tolist() == [0, 0, 0, 1, 0]
    assert problem.h[0, 2:].tolist() == [torch.inf] * 2
    assert Frame(Sizes.of(large), frame).is_tight


class Gated(HookedEngine):
    """Keeps the first solve until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.released, self.entered = threading.Event(), threading.Event()
        self.batches: list[int] = []
        self.stops = 0

    def solve(self, problem: QP, **more: Any) -> Any:
        self.batches.append(problem.batch_size or 1)
        if not self.released.is_set():
            self.entered.set()
            assert self.released.wait(10)
        try:
            return super().solve(problem, **more)
        except Stopped:
            self.stops += 1
            raise

    def hold(self) -> None:
        self.batches.clear()
        self.entered.clear()
        self.released.clear()


async def ask(client: httpx.AsyncClient, i: int) -> Any:
    body = {"problem": {"Q": [[1]], "q": [-i]}, "upstream": {"z": [i]}}
    return (await client.post("/v1/solve", json=body)).json()


async def queued(client: httpx.AsyncClient, calls: int) -> None:
    """Return once so many calls wait for the solver."""
    while f"argrad_queued_calls {calls}.0" not in (await client.get("/metrics")).text:
        await asyncio.sleep(0.002)


@pytest.mark.parametrize("batching", [True, False], ids=["on", "off"])
async def test_calls_that_wait_for_the_solver_are_solved_together_unless_that_is_turned_off(batching: bool):
    gated = Gated()
    gated.released.set()
    async with running_app(make_app(engine_=gated, batching=batching)) as client:
        gated.hold()
        first = asyncio.create_task(ask(client, 1))
        assert await asyncio.to_thread(gated.entered.wait, 5)
        others = [asyncio.create_task(ask(client, i)) for i in range(2, 18)]
        await queued(client, 16)
        gated.released.set()
        replies = await asyncio.gather(first, *others)
        metrics = (await client.get("/metrics")).text
    assert [r["solution"]["z"] + r["gradients"]["q"] for r in replies] == [pytest.approx([i, -i]) for i in range(1, 18)]
    assert gated.batches == ([1, 16] if batching else [1] * 17)
    assert ('argrad_batches_total{reason="freed"} 0.0' in metrics) is not batching
    assert ('argrad_batch_calls_bucket{le="8.0"}' in metrics) is True


async def test_a_deterministic_call_is_solved_alone_among_others():
    gated = Gated()
    gated.released.set()
    async with running_app(make_app(engine_=gated)) as client:
        gated.hold()
        first = asyncio.create_task(ask(client, 1))
        assert await asyncio.to_thread(gated.entered.wait, 5)
        others = [asyncio.create_task(ask(client, i)) for i in (2, 3)]
        body = {"problem": simplex(), "deterministic": True}
        alone = asyncio.create_task(client.post("/v1/solve", json=body))
        await queued(client, 3)
        gated.released.set()
        assert (await alone).json()["solution"]["z"] == pytest.approx([0.25, 0.75])
        await asyncio.gather(first, *others)
    assert sorted(gated.batches) == [1, 1, 2]


async def test_who_leaves_the_queue_is_not_in_the_batch():
    gated = Gated()
    gated.released.set()
    async with running_app(make_app(engine_=gated)) as client:
        gated.hold()
        first = asyncio.create_task(ask(client, 1))
        assert await asyncio.to_thread(gated.entered.wait, 5)
        others = [asyncio.create_task(ask(client, i)) for i in (2, 3, 4)]
        late = asyncio.create_task(
            client.post("/v1/solve", json={"problem": simplex()}, headers={"argrad-timeout-ms": "30"})
        )
        await queued(client, 4)
        others[1].cancel()
        assert (await late).status_code == 504
        gated.released.set()
        assert (await first)["status"] == "optimal"
        assert [(await task)["status"] for task in (others[0], others[2])] == ["optimal"] * 2
    assert gated.batches == [1, 2]


async def test_mixed_shapes_through_http_are_right():
    gated = Gated()
    gated.released.set()
    problems = [draw(n, n, seed=n) | {"upstream.z": torch.ones(n, dtype=D)} for n in (9, 10, 9, 10)]
    async with running_app(make_app(engine_=gated)) as client:
        gated.hold()
        first = asyncio.create_task(ask(client, 1))
        assert await asyncio.to_thread(gated.entered.wait, 5)
        tasks = [asyncio.create_task(post(client, "/v1/solve", SolveRequest(), t, SolveReply)) for t in problems]
        await queued(client, 4)
        gated.released.set()
        answers = await asyncio.gather(*tasks)
        await first
    assert gated.batches == [1, 4]
    for tensors, (reply, out) in zip(problems, answers, strict=True):
        assert reply.status == "optimal"
        assert_same(out, make(None).prepare_solve(SolveRequest(), tensors, owner="me")(never_stop, {})[1])
    assert encode(SolveRequest(), problems[0], SAFETENSORS)

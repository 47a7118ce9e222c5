"""Faults of the solver: an exception, a thread that ends, memory that runs out, a problem that poisons its batch."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch

from argrad.problems import QP
from argrad.wire import SAFETENSORS, decode, encode
from argrad.wire.messages import SolverDocument, SolveReply, SolveRequest, TensorMap
from tests.faults.engine import MARK, SOON_S, FaultyEngine, has_mark, poisoned
from tests.service.support import make_app, running_app

pytestmark = pytest.mark.anyio

CALLERS = 64
WIDE = {"batch_flops": 1e12, "batch_bytes": 1 << 34}
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


class ThreadEnds(BaseException):
    """What no `except Exception` stops: the thread ends with it."""


def problem(i: int, n: int = 6, batch: int | None = None) -> TensorMap:
    """A strictly convex problem with a cotangent, another for each i."""
    random = torch.Generator().manual_seed(i)
    lead = () if batch is None else (batch,)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*lead, *shape, generator=random, dtype=torch.float64)

    root = normal(n, n)
    return {
        "problem.Q": root @ root.mT + torch.eye(n, dtype=torch.float64),
        "problem.q": normal(n),
        "problem.G": normal(n, n),
        "problem.h": normal(n).abs() + 0.1,
        "upstream.z": normal(n),
    }


def poison(i: int) -> TensorMap:
    tensors = problem(i)
    tensors["problem.q"][0] = MARK
    return tensors


async def solve(client: httpx.AsyncClient, tensors: TensorMap, **fields: Any) -> httpx.Response:
    body = b"".join(encode(SolveRequest(**fields), tensors, SAFETENSORS))
    return await client.post("/v1/solve", content=body, headers={"content-type": SAFETENSORS})


def read(response: httpx.Response) -> tuple[SolveReply, TensorMap]:
    assert response.status_code == 200, response.text
    return decode(SolveReply, bytearray(response.content), response.headers["content-type"])


def assert_same(found: httpx.Response, wanted: httpx.Response) -> None:
    """Status, solution and gradients of two replies; not the measures of how they came about."""
    (reply, out), (reply_2, out_2) = read(found), read(wanted)
    assert (reply.status, reply.gradient_status) == (reply_2.status, reply_2.gradient_status)
    names = {name for name in out_2 if not name.startswith("report.")}
    assert names == {name for name in out if not name.startswith("report.")}
    for name in names:
        torch.testing.assert_close(out[name], out_2[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


async def together(
    client: httpx.AsyncClient,
    engine: FaultyEngine,
    given: list[TensorMap],
    fault: Callable[[QP], QP | None],
    **fields: Any,
) -> list[httpx.Response]:
    """Send calls so that they wait for the solver together; the fault is there from their batch on."""
    engine.hold()
    first = asyncio.create_task(solve(client, problem(999, n=3)))
    assert await asyncio.to_thread(engine.entered.wait, SOON_S)
    calls = [asyncio.create_task(solve(client, tensors, **fields)) for tensors in given]
    while (await client.get("/health/ready")).json()["checks"]["solver"]["queued"] < len(given):
        await asyncio.sleep(0.005)
    engine.batches.clear()
    engine.fault = fault
    engine.free()
    read(await first)
    return list(await asyncio.gather(*calls))


async def alone(given: list[TensorMap], **fields: Any) -> list[httpx.Response]:
    """What an undisturbed service answers to each."""
    async with running_app(make_app(batching=False)) as client:
        return [await solve(client, tensors, **fields) for tensors in given]


def defects(log: io.StringIO) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, log.getvalue().splitlines()) if line["event"] == "defect"]


async def test_an_exception_is_a_500_with_an_id_that_is_in_the_log_and_the_next_calls_work():
    def fail(problem: QP) -> None:
        if problem.n == 6:
            raise ZeroDivisionError("a defect of a solver")

    log, engine = io.StringIO(), FaultyEngine()
    async with running_app(make_app(log, engine, **WIDE)) as client:
        given = [problem(i) for i in range(4)]
        failed = await together(client, engine, given, fail)
        assert [response.status_code for response in failed] == [500] * 4
        assert engine.batches[-5:] == [4, 1, 1, 1, 1], "together, then each alone"
        ids = {response.json()["request_id"] for response in failed}
        assert ids == {line["request_id"] for line in defects(log)}
        assert "ZeroDivisionError" not in failed[0].text
        engine.fault = lambda _: None
        after = [await solve(client, tensors) for tensors in given]
    for found, wanted in zip(after, await alone(given), strict=True):
        assert_same(found, wanted)


async def test_a_thread_that_ends_answers_its_batch_is_replaced_and_shows_in_readiness():
    def end(problem: QP) -> None:
        if problem.n == 6:
            raise ThreadEnds("the thread")

    log, engine = io.StringIO(), FaultyEngine()
    async with running_app(make_app(log, engine, **WIDE)) as client:
        given = [problem(i) for i in range(4)]
        failed = await together(client, engine, given, end)
        assert [response.status_code for response in failed] == [500] * 4
        assert {response.json()["request_id"] for response in failed} == {line["request_id"] for line in defects(log)}
        engine.fault = lambda _: None
        after = [await solve(client, tensors) for tensors in given]
        solver = (await client.get("/health/ready")).json()["checks"]["solver"]
    assert engine.batches[:2] == [1, 4], "nothing of that batch was tried again"
    assert (solver["alive"], solver["threads"], solver["restarts"]) == (1, 1, 1)
    assert solver["last_crash"] == "ThreadEnds: the thread"
    for found, wanted in zip(after, await alone(given), strict=True):
        assert_same(found, wanted)


def memory_for(most: int) -> Callable[[QP], None]:
    """A device that has room for so many problems at once."""

    def check(problem: QP) -> None:
        if (problem.batch_size or 1) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return check


async def test_a_call_for_which_memory_runs_out_is_solved_in_two_halves():
    given = problem(0, batch=7)
    engine = FaultyEngine()
    async with running_app(make_app(engine_=engine)) as client:
        engine.fault = memory_for(4)
        engine.batches.clear()
        found = await solve(client, given, keep_state=True)
        assert engine.batches == [7, 4, 3]
        assert (await client.get("/health/ready")).json()["checks"]["solver"]["restarts"] == 0
    (wanted,) = await alone([given])
    assert_same(found, wanted)
    assert read(found)[0].state is not None


async def test_halves_that_do_not_fit_either_fail_alone_as_too_large():
    engine = FaultyEngine()
    async with running_app(make_app(engine_=engine)) as client:
        engine.fault = memory_for(3)
        engine.batches.clear()
        refused = await solve(client, problem(0, batch=8))
        assert (refused.status_code, refused.json()["field"]) == (413, "memory of the device")
        assert engine.batches == [8, 4], "once more, and no further"
        fits = await solve(client, problem(0, batch=3))
    assert_same(fits, (await alone([problem(0, batch=3)]))[0])


async def test_callers_for_whom_memory_runs_out_together_are_solved_one_by_one():
    engine, given = FaultyEngine(), [problem(i) for i in range(16)]
    async with running_app(make_app(engine_=engine, **WIDE)) as client:
        found = await together(client, engine, given, memory_for(1))
        assert engine.batches[1:] == [16] + [1] * 16
    for one, wanted in zip(found, await alone(given), strict=True):
        assert_same(one, wanted)


def raising(problem: QP) -> None:
    if has_mark(problem):
        raise FloatingPointError("poison")


def out_of_memory(problem: QP) -> None:
    if has_mark(problem):
        raise torch.OutOfMemoryError("poison")


POISONS: dict[str, tuple[Callable[[QP], QP | None], set[int]]] = {
    "that raises": (raising, {500}),
    "for which memory runs out": (out_of_memory, {413}),
    "of NaN": (lambda problem: poisoned(problem, float("nan")), {200}),
    "of infinity": (lambda problem: poisoned(problem, float("inf")), {200}),
    "of 1e300": (lambda problem: poisoned(problem, 1e300), {200}),
}


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["auto", "pdipm"])
@pytest.mark.parametrize("name", POISONS)
async def test_a_poison_in_a_batch_of_64_harms_no_batchmate(name: str, solver: str):
    fault, statuses = POISONS[name]
    given = [problem(i) for i in range(CALLERS)]
    given[17] = poison(17)
    fired = []

    def noted(problem: QP) -> QP | None:
        if has_mark(problem):
            fired.append(problem.batch_size or 1)
        return fault(problem)

    engine = FaultyEngine()
    async with running_app(make_app(engine_=engine, **WIDE)) as client:
        found = await together(client, engine, given, noted, solver=SolverDocument(name=solver))
    assert fired[0] == CALLERS, "it was in the batch"
    assert found[17].status_code in statuses
    if found[17].status_code == 200:
        reply, out = read(found[17])
        assert reply.status != "optimal"
        assert reply.gradient_status != "ok"
        assert out["gradients.q"].isnan().all()
    others = [tensors for i, tensors in enumerate(given) if i != 17]
    wanted = await alone(others, solver=SolverDocument(name=solver))
    for one, other in zip([one for i, one in enumerate(found) if i != 17], wanted, strict=True):
        assert_same(one, other)


async def test_an_infeasible_problem_harms_no_batchmate():
    given = [problem(i) for i in range(CALLERS)]
    given[5]["problem.G"][:2] = torch.eye(6, dtype=torch.float64)[:1] * torch.tensor([[1.0], [-1.0]]).double()
    given[5]["problem.h"][:2] = -1.0
    engine = FaultyEngine()
    async with running_app(make_app(engine_=engine, **WIDE)) as client:
        found = await together(client, engine, given, lambda _: None)
        assert engine.batches[1:] == [CALLERS]
    assert read(found[5])[0].status == "infeasible"
    for i, (one, other) in enumerate(zip(found, await alone(given), strict=True)):
        if i != 5:
            assert_same(one, other)

"""Solves that name one registration share its factors, in a batch of several callers and in slices of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from argrad.problems.content import digest
from argrad.wire.messages import ProblemDocument, RegisterRequest, SolveRequest, TensorMap, VjpRequest
from argrad_service import engine
from argrad_service.admission import Limits
from argrad_service.batching.lots import FACTORED
from argrad_service.engine import Prepared
from argrad_service.engine.options import never_stop
from argrad_service.operations import Operations
from argrad_service.registered import Registrations
from argrad_service.scheduling import Budget, Unfinished
from argrad_service.solves import Solve, SplitSolve
from argrad_service.state import MemoryProblemStore, MemoryStateStore, TokenSigner
from tests.service.support import SECRET, D
from tests.service.test_batching import WIDE, assert_same, draw, together

FACTORS = "whitened"
FIXED = ("problem.Q", "problem.G", "problem.h", "problem.A", "problem.b")


class House:
    """Operations, with parameters that can be named."""

    def __init__(self, budget: Budget | None = WIDE) -> None:
        problems = MemoryProblemStore(budget_bytes=1 << 30, ttl_s=60.0)
        self.registrations = Registrations(problems, Limits())
        self.operations = Operations(
            engine=engine,
            store=MemoryStateStore(budget_bytes=1 << 30, ttl_s=60.0, signer=TokenSigner(SECRET)),
            limits=Limits(),
            device=torch.device("cpu"),
            registrations=self.registrations,
            budget=budget,
        )

    def register(self, tensors: TensorMap) -> SolveRequest:
        fixed = {name: tensors[name] for name in FIXED if name in tensors}
        name = digest("qp", {key.removeprefix("problem."): t for key, t in fixed.items()})
        self.registrations.register(RegisterRequest(), fixed, name=name, owner="me")
        return SolveRequest(problem=ProblemDocument(registered=name))

    def prepare(self, request: SolveRequest, tensors: TensorMap) -> Any:
        given = {name: t for name, t in tensors.items() if name not in FIXED or request.problem.registered is None}
        return self.operations.prepare_solve(request, given, owner="me")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether factors were there, each time that they were looked for."""
    seen: list[bool] = []
    find = Prepared.find

    def noting(self: Prepared, what: str, sources: Sequence[torch.Tensor]) -> Any:
        result = find(self, what, sources)
        if what == FACTORS:
            seen.append(result is not None)
        return result

    monkeypatch.setattr(Prepared, "find", noting)
    return seen


def moved(tensors: TensorMap, seed: int, batch: int | None = None) -> TensorMap:
    """The same problem with another q, and a cotangent."""
    torch.manual_seed(seed)
    q, n = tensors["problem.q"], tensors["problem.q"].shape[-1]
    shape = (n,) if batch is None else (batch, n)
    return tensors | {"problem.q": q + torch.randn(*shape, dtype=D), "upstream.z": torch.randn(*shape, dtype=D)}


@pytest.mark.parametrize(("n", "m", "p"), [(12, 9, 2), (60, 90, 0), (70, 50, 5)])
@pytest.mark.parametrize("counts", [(None, None, None), (None, 3, None)], ids=["singles", "and a batch"])
def test_a_batch_of_solves_that_name_one_registration_uses_its_factors(
    n: int, m: int, p: int, counts: tuple[int | None, ...], found: list[bool]
) -> None:
    house, tensors = House(), draw(n, m, p)
    request = house.register(tensors)
    asked = [moved(tensors, seed, batch) for seed, batch in enumerate(counts)]
    solves = [house.prepare(request, given) for given in asked]
    wanted = [house.prepare(SolveRequest(), given)(never_stop, {}) for given in asked]
    assert len({solve.lot.key for solve in solves}) == 1
    found.clear()
    for _ in range(2):
        for (reply, out), (alone, exact) in zip(together(solves), wanted, strict=True):
            assert (reply.status, reply.gradient_status) == (alone.status, alone.gradient_status)
            assert_same(out, exact)
    assert found == [False, True]


def test_states_of_such_a_batch_differentiate_as_alone() -> None:
    house, tensors = House(), draw(12, 9, 2)
    request = house.register(tensors).model_copy(update={"keep_state": True})
    solves = [house.prepare(request, moved(tensors, seed)) for seed in range(3)]
    upstream = {"upstream.z": torch.randn(12, dtype=D)}
    for solve, (reply, _) in zip(solves, together(solves), strict=True):
        alone = solve(never_stop, {})[0]
        pulled = [
            house.operations.prepare_vjp(VjpRequest(state=token), upstream, owner="me")(never_stop, {})[1]
            for token in (reply.state, alone.state)
        ]
        assert_same(*pulled)


def test_who_shares_a_batch_with_whom() -> None:
    house = House()
    small, large = draw(12, 9), draw(80, 80)
    assert large["problem.Q"].numel() + large["problem.G"].numel() >= FACTORED

    def key(tensors: TensorMap, *, registers: bool, batch: int | None = None) -> object:
        request = house.register(tensors) if registers else SolveRequest()
        solve = house.prepare(request, moved(tensors, 1, batch))
        assert isinstance(solve, Solve)
        assert solve.lot is not None
        return solve.lot.key

    assert key(small, registers=True) == key(small, registers=False)
    assert key(large, registers=True) == key(large, registers=True)
    assert key(large, registers=True) not in (key(large, registers=False), key(draw(80, 80, seed=1), registers=True))
    assert key(large, registers=False, batch=64) is None
    assert key(large, registers=True, batch=64) is not None


def test_small_problems_of_several_registrations_are_solved_together() -> None:
    house = House()
    drawn = [draw(12, 9, seed=seed) for seed in range(3)]
    solves = [house.prepare(house.register(tensors), moved(tensors, 1)) for tensors in drawn]
    for solve, (reply, out) in zip(solves, together(solves), strict=True):
        alone, exact = solve(never_stop, {})
        assert reply.status == alone.status
        assert_same(out, exact)


def test_slices_use_the_factors_that_the_first_has_left(found: list[bool]) -> None:
    house, tensors = House(Budget(flops=3e4, nbytes=1 << 30)), draw(20, 12)
    given = moved(tensors, 1, batch=60)
    run = house.prepare(house.register(tensors), given)
    assert isinstance(run, SplitSolve)
    exact = House(None).prepare(SolveRequest(), given)(never_stop, {})[1]
    found.clear()
    slices = 1
    while True:
        try:
            out = run(never_stop, {})[1]
            break
        except Unfinished:
            slices += 1
    assert slices > 2
    assert found == [False] + [True] * (slices - 1)
    assert_same(out, exact)

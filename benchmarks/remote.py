"""What the way to the service and back adds to a training step."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

import argrad
from argrad.problems import PARAMETERS, gradients
from argrad_service import engine
from benchmarks.measures import FEWEST_TURNS, elapsed_ms
from benchmarks.workloads import Workload, optnet, two_variables


@dataclass(frozen=True, kw_only=True)
class RemoteStep:
    """Medians of one forward and backward, in milliseconds.

    Args:
        name: Of the workload; `registered` where its q alone is sent and differentiated, and the rest was registered.
            Elsewhere each parameter is sent and each gradient formed.
        solver: That solved it.
        engine_ms: The engine alone, called in this process.
        in_process_ms: The layer over `Client("local")`.
        remote_ms: The same layer over HTTP, gradients from the adjoint.
        repeats: Of each.
    """

    name: str
    solver: str
    engine_ms: float
    in_process_ms: float
    remote_ms: float
    repeats: int


def time_remote(url: str, *, seed: int, quick: bool) -> list[RemoteStep]:
    """Time a small step, where only the way counts, and a large one, where megabytes travel."""
    budget_s = 2.0 if quick else 15.0
    large = optnet(100, 128, seed=seed)
    cases = ((two_variables(), "auto"), (two_variables(), "pdipm"), (large, "auto"), (large, "pdipm"))
    with argrad.Client(url) as remote, argrad.Client("local") as local:
        steps = [_time(w, solver, local, remote, budget_s=budget_s, most=1000) for w, solver in cases]
        return [*steps, _time(large, "auto", local, remote, budget_s=budget_s, most=1000, registers=True)]


def _time(
    workload: Workload,
    solver: str,
    local: argrad.Client,
    remote: argrad.Client,
    *,
    budget_s: float,
    most: int,
    registers: bool = False,
) -> RemoteStep:
    make = _registered_step if registers else _layer_step
    steps: dict[str, Callable[[], object]] = {
        "engine_ms": lambda: _engine_step(workload, solver),
        "in_process_ms": make(workload, solver, local),
        "remote_ms": make(workload, solver, remote),
    }
    for step in steps.values():
        step()
    gc.collect()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + budget_s
    turns = 0
    while turns < most and (turns < FEWEST_TURNS or time.perf_counter() < end):
        for name, step in steps.items():
            taken[name].append(elapsed_ms(step))
        turns += 1
    medians = {name: median(times) for name, times in taken.items()}
    name = f"{workload.name}, registered" if registers else workload.name
    return RemoteStep(name=name, solver=solver, repeats=turns, **medians)


def _engine_step(workload: Workload, solver: str) -> None:
    problem, grad_z = workload.problem, workload.grad_z
    outcome = engine.solve(problem, solver=solver)
    adjoint = engine.vjp(outcome, {"z": grad_z.reshape(-1, problem.n)}).adjoint
    parameters = problem.parameters()
    gradients(outcome.solution, adjoint, wrt=parameters, batched=[k for k in parameters if problem.is_batched(k)])


def _layer_step(workload: Workload, solver: str, client: argrad.Client) -> Callable[[], object]:
    layer = argrad.nn.QPLayer(client, solver=solver, gradients="adjoint")
    given = workload.problem.parameters()
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    arguments = [leaves.get(name) for name in PARAMETERS if name != "entropy"]

    def step() -> object:
        z = layer(*arguments)
        return torch.autograd.grad((z * workload.grad_z).sum(), list(leaves.values()))

    return step


def _registered_step(workload: Workload, solver: str, client: argrad.Client) -> Callable[[], object]:
    layer = argrad.nn.QPLayer(client, solver=solver, gradients="adjoint")
    problem = workload.problem
    q = problem.q.clone().requires_grad_()
    fixed = client.register(Q=problem.Q, G=problem.G, h=problem.h, A=problem.A, b=problem.b)

    def step() -> object:
        z = layer(q=q, **fixed)
        return torch.autograd.grad((z * workload.grad_z).sum(), q)

    return step

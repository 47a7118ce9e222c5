"""The short way to the outcome of a batch of small QPs: around what only larger and harder ones need.

A thousand problems of a few variables are solved by the kernels in a millisecond, and everything on the way to them and
back takes part of that again. Where the kernels solve the whole batch the outcome is, to the last bit, that of the way
through `stack`, `find_solver` and `conclude`; where they do not, there is none.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from argrad.problems import QP, Solution, Status
from argrad_service.engine.data import Data, stack
from argrad_service.engine.options import OwnOptions, SolverOptions
from argrad_service.engine.outcome import Forward
from argrad_service.engine.point import KKTFactor
from argrad_service.engine.registry import AUTO, PIVOTING
from argrad_service.engine.sizes import is_small

NAMES = (AUTO, PIVOTING)
"""Solvers that take this way: `auto` chooses the other for all that is small, which a test holds against its table."""

_NO_OPTIONS = OwnOptions()


def solve(problem: QP, options: SolverOptions) -> Forward | None:
    """Solve a batch on the CPU as `pivoting` does, if all of it is small, float64, and solved by the kernels.

    Args:
        problem: On the CPU. Its values may be anything: kernels that meet one that is not finite solve nothing.
        options: Tolerance and who asks to stop.

    Returns:
        The outcome; None where this way does not lead to it.

    Raises:
        Stopped: options.should_stop() was true.
    """
    p, parameters = problem.p, problem.parameters()
    if problem.Q is None or problem.entropy is not None or options.own or not is_small(problem.n, p + problem.m):
        return None
    if any(tensor.dtype != torch.float64 for tensor in parameters.values()):
        return None
    plain = QP.of_checked({name: tensor.detach() for name, tensor in parameters.items()})
    data, given_Q = _stacked(plain)
    if data.has_free:
        return None
    # Compiled kernels take a second to load.
    from argrad_service.engine import compiled

    solved = compiled.solve_batch(data, options.should_stop, given_Q)
    if not solved.is_whole or not solved.worst <= options.tolerance:
        return None
    batch = data.B
    every, none = _masks(batch)
    primal, dual, gap, objective, _ = solved.report.unbind(1)
    factor = compiled.CompiledFactor(data=data, factors=solved.factors, width=solved.width)
    return Forward(
        problem=plain,
        data=data,
        solution=Solution(z=solved.z, nu=solved.y[:, :p], lam=solved.y[:, p:] if p else solved.y, s=solved.s),
        status=(Status.OPTIMAL,) * batch,
        flags=((),) * batch,
        iterations=solved.steps,
        primal_residual=primal,
        dual_residual=dual,
        gap=gap,
        objective=objective,
        solver=PIVOTING,
        options=SolverOptions(
            tolerance=options.tolerance,
            max_iterations=options.max_iterations,
            should_stop=options.should_stop,
            own=_NO_OPTIONS,
        ),
        factor=KKTFactor(factor=factor, is_optimal=every, is_weak=none, is_regular=True),
    )


def _stacked(problem: QP) -> tuple[Data, Tensor | None]:
    """What `stack` makes of a problem; and Q, if the kernel is to find its symmetric parts, for which there is room."""
    Q, q, G, h = problem.Q, problem.q, problem.G, problem.h
    if Q is None or G is None or h is None or problem.p:
        return stack(problem), None
    if len(q) == 1 or not Q.ndim == G.ndim == h.ndim + 1 == q.ndim + 1 == 3:
        return stack(problem), None
    has_free = float(h.max()) == torch.inf
    return Data(Q=torch.empty_like(Q, memory_format=torch.contiguous_format), q=q, C=G, d=h, p=0, has_free=has_free), Q


@lru_cache(maxsize=16)
def _masks(batch: int) -> tuple[Tensor, Tensor]:
    """`(B,)`, true everywhere and nowhere; nobody writes to them."""
    return torch.ones(batch, dtype=torch.bool), torch.zeros(batch, dtype=torch.bool)

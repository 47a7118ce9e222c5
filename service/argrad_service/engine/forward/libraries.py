"""A batch for a solver that takes one problem at a time: a thread pool, then the finish and the verdicts for all.

A library's call on one problem is a *session*'s: each thread opens one, so that what problems share (a symbolic
factorisation, a whole model) is set up once a thread. The threads take the problems one by one; between two of them,
and inside a session that can, the caller's wish to stop is heard. A library's answer is approximate: its active set is
confirmed by `point.confirm`, its claim that there is no solution by a certificate (`verdicts`). A linear program is
given to it in units in which costs and right-hand sides are about one, for the libraries' tolerances are absolute.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from argrad.problems import Status
from argrad_service.engine.data import Data, inf_norm, matvec, matvec_t
from argrad_service.engine.finish import Guess
from argrad_service.engine.forward.verdicts import classify
from argrad_service.engine.options import SolverOptions, Stopped
from argrad_service.engine.point import CODE, Point, confirm, factor_convex, guess_at, unsolved
from argrad_service.engine.threads import threads

Array = NDArray[np.float64]
T = TypeVar("T")

FINISH_ROUNDS = 8
"""Candidate active sets tried from a library's answer."""

STOP_POLL_S = 0.02
"""How often the caller's wish to stop is asked for while the libraries run."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrays:
    """The batch as the libraries take it: NumPy views of `Data`, matrices with leading dimension 1 where shared.

    Args:
        Q: `(1 or B, n, n)`, symmetric; None in an LP.
        q: `(B, n)`.
        C: `(1 or B, p + m, n)`, equalities first.
        d: `(B, p + m)`.
        p: Number of equalities.
        start: z `(B, n)` and y `(B, p + m)` of a warm start, or None.
    """

    Q: Array | None
    q: Array
    C: Array
    d: Array
    p: int
    start: tuple[Array, Array] | None

    @property
    def n(self) -> int:
        """Number of variables."""
        return int(self.q.shape[1])

    @property
    def r(self) -> int:
        """Number of rows, p + m."""
        return int(self.d.shape[1])

    def lower_bounds(self) -> Array:
        """D on equalities, −∞ on inequalities, `(B, p + m)`: the rows are l ≤ Cz ≤ d."""
        bounds = self.d.copy()
        bounds[:, self.p :] = -np.inf
        return bounds


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What a library says of one problem.

    Args:
        z: `(n,)`; anything where there is none.
        y: `(p + m,)`, [ν; λ] with λ ≥ 0.
        status: Its claim, `optimal` too.
        iterations: Its own.
        active: `(p + m,)`, the rows that its basis holds with equality, if it has one.
        ran_out_of_time: Whether a time limit of the session's own ended it.
    """

    z: Array
    y: Array
    status: Status
    iterations: int
    active: NDArray[np.bool_] | None = None
    ran_out_of_time: bool = False


class Session:
    """One thread's use of a library."""

    def solve(self, i: int) -> Answer:
        """Solve the i-th problem of the batch.

        Raises:
            Stopped: the caller wants no answer any more.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Give back what is held beyond memory."""


OpenSession = Callable[[Arrays, threading.Event], Session]
"""Opens a session; the event is set when nobody wants the answers any more."""


def solve_batch(
    data: Data,
    options: SolverOptions,
    open_session: OpenSession,
    *,
    warm: Guess | None = None,
    polish: bool = True,
    is_draft: bool = False,
) -> Point:
    """Solve a batch by a library, on the CPU.

    Args:
        data: The problems.
        options: Tolerance, and who asks to stop; iteration limits are the session's to read.
        open_session: Of the library.
        warm: A point to begin with; handed on in `Arrays.start`.
        polish: Whether the active set is confirmed and the problem solved exactly on it; otherwise the library's own
            iterate is the answer.
        is_draft: Whether to leave what is not confirmed without a verdict, as `max_iterations`.

    Raises:
        Stopped: options.should_stop() was true before or while the library ran.
    """
    if options.should_stop():
        raise Stopped
    if data.is_linear:
        data, z_unit, y_unit = _in_units(data)
        warm = warm if warm is None else replace(warm, z=warm.z / z_unit, y=warm.y / y_unit)
    is_convex = torch.ones(1, dtype=torch.bool) if data.is_linear else factor_convex(data.Q)[2]
    is_convex = is_convex.expand(data.B)
    arrays = Arrays(
        Q=None if data.is_linear else to_array(data.Q),
        q=to_array(data.q),
        C=to_array(data.C),
        d=to_array(data.d),
        p=data.p,
        start=None if warm is None else (to_array(warm.z), to_array(warm.y)),
    )
    answers = _run(arrays, torch.nonzero(is_convex).flatten().tolist(), options, open_session)
    point, claim = _finish(data, options, answers, is_convex, polish=polish)
    if not is_draft:
        # A claim without a certificate, and a solution that is none, are both a failure of the library's numerics.
        is_out = claim == CODE[Status.MAX_ITERATIONS]
        classify(data, point, options, otherwise=torch.where(is_out, claim, CODE[Status.NUMERICAL_ERROR]))
    if data.is_linear:
        point.z, point.y = point.z * z_unit, point.y * y_unit
    return point


def _in_units(data: Data) -> tuple[Data, Tensor, Tensor]:
    """A linear program with costs and right-hand sides of the size of one, and the same rows.

    Returns:
        The program, and the units `(B, 1)` of its z and of its multipliers.
    """
    length = torch.linalg.vector_norm(data.C, dim=2)
    reach = torch.where(length > 0, data.d.abs() / length.clamp(min=torch.finfo(length.dtype).tiny), 0.0)
    z_unit, y_unit = (torch.where(size > 0, size, 1.0).unsqueeze(-1) for size in (inf_norm(reach), inf_norm(data.q)))
    return replace(data, q=data.q / y_unit, d=data.d / z_unit), z_unit, y_unit


def _run(arrays: Arrays, chosen: list[int], options: SolverOptions, open_session: OpenSession) -> dict[int, Answer]:
    """Answers of the problems named by chosen, by place; several threads, one session each."""
    answers: dict[int, Answer] = {}
    is_over = threading.Event()
    places, lock = iter(chosen), threading.Lock()

    def work() -> None:
        session: Session | None = None
        try:
            while not is_over.is_set():
                with lock:
                    i = next(places, None)
                if i is None:
                    return
                session = session or open_session(arrays, is_over)
                answers[i] = session.solve(i)
        finally:
            if session is not None:
                session.close()

    pool = _pool(os.getpid(), threads())
    futures = [pool.submit(work) for _ in range(min(threads(), len(chosen)))]
    try:
        while wait(futures, timeout=STOP_POLL_S, return_when=FIRST_EXCEPTION).not_done:
            if options.should_stop() or any(future.done() and future.exception() for future in futures):
                break
    finally:
        is_over.set()
        wait(futures)
    for future in futures:
        future.result()
    if len(answers) < len(chosen):
        raise Stopped
    return answers


def _finish(
    data: Data, options: SolverOptions, answers: dict[int, Answer], is_convex: Tensor, *, polish: bool
) -> tuple[Point, Tensor]:
    """The point, its active sets confirmed where the library's are nearly right; and the library's claims."""
    base = unsolved(data)
    claim = base.status.clone()
    has_basis = torch.zeros_like(base.is_exact)
    is_late = data.q.new_zeros(data.B)
    for i, answer in answers.items():
        if np.isfinite(answer.z).all() and np.isfinite(answer.y).all():
            base.z[i], base.y[i] = torch.from_numpy(answer.z), torch.from_numpy(answer.y)
        if answer.active is not None:
            base.active[i], has_basis[i] = torch.from_numpy(answer.active), True
        claim[i], base.iterations[i], is_late[i] = CODE[answer.status], answer.iterations, float(answer.ran_out_of_time)
    base.y[:, data.p :].clamp_(min=0)
    if data.is_linear:
        base.y[(data.q == 0).all(-1)] = 0.0
    guess = guess_at(data, base.z, base.y)
    # Where all multipliers are zero, those that the library left there are large beside each other only.
    terms = (matvec(data.Q, base.z), data.q, matvec_t(data.C, base.y))
    least = options.tolerance * (1 + torch.stack([inf_norm(term) for term in terms]).amax(0)).unsqueeze(-1)
    guess.active[:, data.p :] &= base.y[:, data.p :] > least
    active = torch.where(has_basis.unsqueeze(-1), base.active, guess.active)
    if polish:
        point = confirm(data, Guess(active=active, z=guess.z, y=guess.y), rounds=FINISH_ROUNDS)
        point.iterations = base.iterations
    else:
        point = base
        point.active, point.is_final = active, True
        point.status = torch.where(is_convex, point.status, CODE[Status.NONCONVEX])
    if bool((is_late > 0).any()):
        point.measures["ran_out_of_time"] = is_late
    return point, claim


def on_threads(work: Callable[[int], T], count: int) -> list[T]:
    """Results of work(0), …, work(count − 1), which hold no lock for long, from as many threads as the engine has."""
    return list(_pool(os.getpid(), threads()).map(work, range(count)))


def to_array(tensor: Tensor) -> Array:
    """The same numbers for NumPy, contiguous."""
    return np.ascontiguousarray(tensor.detach().numpy())


@lru_cache(maxsize=4)
def _pool(pid: int, count: int) -> ThreadPoolExecutor:  # noqa: ARG001 - a forked child needs threads of its own
    return ThreadPoolExecutor(count, thread_name_prefix="argrad-library")

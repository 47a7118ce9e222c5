"""OSQP on problems of one pattern: set up once, updated after; in this process, or alone in one of its own.

OSQP factors its KKT matrix while it holds Python's global lock: at 1600 rows and variables, dense, that silenced all
other threads for 0.8 s. Beyond a bound on that work this file is run as a program, to which the problems are sent. It
therefore imports nothing of argrad. Asked to stop, a process is ended at once; in a thread the wish is heard between
blocks of iterations.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np
import osqp
from numpy.typing import NDArray
from scipy import sparse

Array = NDArray[np.float64]

MOST_HELD = 1.5e8
"""Floating-point operations of a factorisation that may hold the lock: some 0.1 s."""

BLOCK_WORK = 5e8
"""Entries of the factors that a block of iterations goes through at most: about a second."""

BLOCK = (50, 1000)
"""The least and the most iterations of a block."""

RHO_INTERVAL = 50
"""Iterations between two adaptations of ρ: a number, for OSQP's default measures time and is not repeatable."""

UNFINISHED = ("maximum iterations reached", "solved inaccurate")
"""Statuses after which the next block goes on."""

WITH_SOLUTION = ("solved", *UNFINISHED)
"""Statuses whose x and y are numbers: elsewhere OSQP writes 2143289344, the bits of a NaN."""

POLL_S = 0.05
"""How often the wish to stop is looked up while a process computes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Patterns:
    """Where the matrices of all problems have entries, by columns; and how OSQP is set.

    Args:
        n: Variables.
        r: Rows.
        P: Row indices and column starts of P's upper triangle.
        A: The same of A.
        settings: OSQP's own, by its names; `max_iter` bounds one problem.
    """

    n: int
    r: int
    P: tuple[Any, Any]
    A: tuple[Any, Any]
    settings: dict[str, Any]

    @property
    def work(self) -> float:
        """Rough number of floating-point operations of the factorisation; too small where it fills in."""
        size = self.n + self.r
        return 2 / 3 * (len(self.P[0]) + len(self.A[0]) + size) * size


@dataclass(frozen=True, kw_only=True, eq=False)
class Numbers:
    """½xᵀPx + qᵀx subject to l ≤ Ax ≤ u; None stands for the same as before.

    Args:
        P: Entries of the upper triangle.
        q: `(n,)`.
        A: Entries.
        l: `(r,)`, may be −inf.
        u: `(r,)`.
        start: x and y to begin with; None for zero.
    """

    P: Array | None
    q: Array
    A: Array | None
    l: Array
    u: Array
    start: tuple[Array, Array] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """What OSQP found: x `(n,)`, y `(r,)`, its status in its own words, its iterations."""

    x: Array
    y: Array
    status: str
    iterations: int


class Interrupted(Exception):  # noqa: N818 - not an error: the caller asked for it
    """The caller wants no answer any more."""


class OSQP(Protocol):
    """Solves problems of one pattern."""

    def solve(self, numbers: Numbers) -> Result:
        """Solve a problem; the first has all numbers.

        Raises:
            Interrupted: the caller wants no answer any more.
        """
        ...

    def close(self) -> None:
        """Give back what is held."""
        ...


def open_osqp(patterns: Patterns, is_over: Callable[[], bool]) -> OSQP:
    """OSQP here where it holds the lock for a moment only, in a process of its own elsewhere."""
    return Here(patterns, is_over) if patterns.work <= MOST_HELD else Apart(patterns, is_over)


class Here:
    """OSQP in this process."""

    def __init__(self, patterns: Patterns, is_over: Callable[[], bool] = lambda: False) -> None:
        self._patterns, self._is_over = patterns, is_over
        self._solver: osqp.OSQP | None = None
        self._P = self._A = np.zeros(0)
        work = (patterns.n + patterns.r) ** 2
        self._block = int(min(max(BLOCK_WORK / max(work, 1), BLOCK[0]), BLOCK[1]))

    def solve(self, numbers: Numbers) -> Result:
        """Solve a problem; the first has all numbers."""
        try:
            solver = self._ready(numbers)
        except osqp.OSQPException as error:
            self._solver = None
            return _failure(self._patterns, str(error))
        left, done = int(self._patterns.settings["max_iter"]), 0
        while True:
            solver.update_settings(max_iter=min(left - done, self._block))
            found = solver.solve(raise_error=False)
            done += int(found.info.iter)
            if found.info.status not in UNFINISHED or done >= left:
                break
            if self._is_over():
                raise Interrupted
        if found.info.status not in WITH_SOLUTION:
            return _failure(self._patterns, found.info.status, done)
        x, y = (np.array(vector, dtype=float) for vector in (found.x, found.y))
        return Result(x=x, y=y, status=found.info.status, iterations=done)

    def close(self) -> None:
        """Nothing is held but memory."""
        self._solver = None

    def _ready(self, numbers: Numbers) -> osqp.OSQP:
        shape = self._patterns
        x, y = numbers.start or (np.zeros(shape.n), np.zeros(shape.r))
        self._P = self._P if numbers.P is None else numbers.P
        self._A = self._A if numbers.A is None else numbers.A
        if self._solver is None:
            P = sparse.csc_matrix((self._P, *shape.P), shape=(shape.n, shape.n))
            A = sparse.csc_matrix((self._A, *shape.A), shape=(shape.r, shape.n))
            self._solver = osqp.OSQP()
            settings = {"verbose": False, "warm_starting": True, "adaptive_rho_interval": RHO_INTERVAL}
            self._solver.setup(P, numbers.q, A, numbers.l, numbers.u, **(settings | shape.settings))
        else:
            changed = {"Px": numbers.P, "Ax": numbers.A}
            changed = {name: values for name, values in changed.items() if values is not None and len(values)}
            self._solver.update(q=numbers.q, l=numbers.l, u=numbers.u, **changed)
            # What the last problem made of ρ must not tell on this one.
            self._solver.update_settings(rho=shape.settings["rho"])
        self._solver.warm_start(x=x, y=y)
        return self._solver


class Apart:
    """OSQP in a process of its own, which is this file run as a program."""

    def __init__(self, patterns: Patterns, is_over: Callable[[], bool]) -> None:
        self._is_over = is_over
        self._wire, theirs = Pipe()
        # -P: the folder of this file has modules named like the libraries that it imports.
        command = [sys.executable, "-P", __file__, str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)  # noqa: S603
        theirs.close()
        self._send(patterns)

    def solve(self, numbers: Numbers) -> Result:
        """Solve a problem; the first has all numbers."""
        self._send(numbers)
        while not self._wire.poll(POLL_S):
            if self._is_over():
                raise Interrupted
        try:
            return Result(**self._wire.recv())
        except EOFError as error:
            raise RuntimeError(f"OSQP's process ended with code {self._process.wait()}") from error

    def close(self) -> None:
        """End the process, busy or not."""
        self._process.kill()
        self._process.wait()
        self._wire.close()

    def _send(self, what: Patterns | Numbers) -> None:
        try:
            self._wire.send(vars(what))
        except BrokenPipeError as error:
            raise RuntimeError(f"OSQP's process ended with code {self._process.wait()}") from error


def _failure(patterns: Patterns, status: str, iterations: int = 0) -> Result:
    return Result(x=np.full(patterns.n, np.nan), y=np.full(patterns.r, np.nan), status=status, iterations=iterations)


def serve(wire: Connection) -> None:
    """Be the other end of `Apart`: patterns, then problem after problem, until the wire is closed.

    Fields travel, not objects: here this file is `__main__`, and its classes are others.
    """
    solver = Here(Patterns(**wire.recv()))
    while True:
        try:
            numbers = wire.recv()
        except EOFError:
            return
        wire.send(vars(solver.solve(Numbers(**numbers))))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))

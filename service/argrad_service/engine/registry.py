"""Which solvers and which differentiation methods there are, and what pairs with what.

A solver is a function from stacked data to a `Point`; a method is a pair of functions from an outcome to an adjoint
and to tangents. Both meet at the outcome, so that a new one of either kind is one file and one entry here. Their
modules are imported when they are first asked for: some need packages that take a second to load, or are not there.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol, cast

from torch import Tensor

from argrad.errors import MissingExtraError, ProblemError
from argrad_service.engine.crossovers import choose
from argrad_service.engine.data import Data
from argrad_service.engine.finish import Guess
from argrad_service.engine.options import OwnOptions, SolverOptions, describe_options, read_options
from argrad_service.engine.outcome import Backward, Forward, Tangents
from argrad_service.engine.point import Point

AUTO = "auto"
CALLER = "caller"
"""The solver of a point that the caller brought."""

PIVOTING = "pivoting"
"""Has kernels on the CPU, to which there is a shortcut."""

FALLBACK = "pdipm"
"""Solves what `pivoting` could not decide."""


SHARED_OPTIONS: dict[str, dict[str, float]] = {
    "tolerance": {"default": SolverOptions.tolerance, "least": 1e-12, "most": 0.1},
    "max_iterations": {"default": SolverOptions.max_iterations, "least": 1, "most": 10_000},
}
"""Options that all solvers understand, as the table of solvers shows them."""


class SolverModule(Protocol):
    """What a file of `forward` has."""

    Options: type[OwnOptions]

    def solve(self, data: Data, options: SolverOptions, warm: Guess | None) -> Point:
        """Solve a batch; `options.own` is an instance of `Options`."""
        ...


class MethodModule(Protocol):
    """What a file of `backward` has; `jvp` only where its entry says so."""

    Options: type[OwnOptions]

    def vjp(self, forward: Forward, upstream: Mapping[str, Tensor], options: Any) -> Backward:
        """Pull cotangents back; options is an instance of `Options`."""
        ...

    def jvp(self, forward: Forward, tangents: Mapping[str, Tensor], options: Any) -> Tangents:
        """Push tangents forward."""
        ...


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A forward solver, `forward/<name>.py`.

    Args:
        name: What requests call it.
        summary: What it is, in a sentence.
        kinds: Problems that it takes: `qp`, `lp`, `entropy`.
        devices: Where it runs.
        methods: Differentiation methods that work with it; the first is what `auto` takes.
        warm_starts: Whether it makes use of a warm start.
        packages: What must be installed for it beyond the client's own, to run on the CPU.
        extra: The extra that installs them.
    """

    name: str
    summary: str
    kinds: tuple[str, ...]
    devices: tuple[str, ...] = ("cpu", "cuda")
    methods: tuple[str, ...] = ("kkt", "bpqp", "folded")
    warm_starts: bool = False
    packages: tuple[str, ...] = ()
    extra: str = "service"

    @property
    def module(self) -> SolverModule:
        """The file itself."""
        return cast("SolverModule", importlib.import_module(f"argrad_service.engine.forward.{self.name}"))

    @property
    def is_installed(self) -> bool:
        """Whether its packages are there."""
        return all(is_there(name) for name in self.packages)


@lru_cache(maxsize=64)
def is_there(package: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(package) is not None


@dataclass(frozen=True, kw_only=True)
class Method:
    """A differentiation method, `backward/<name>.py`.

    Args:
        name: What requests call it.
        summary: What it is, in a sentence.
        kinds: Problems that it differentiates.
        has_jvp: Whether it has a forward mode.
        takes_points: Whether it differentiates at a point that the caller brought.
    """

    name: str
    summary: str
    kinds: tuple[str, ...]
    has_jvp: bool = False
    takes_points: bool = True

    @property
    def module(self) -> MethodModule:
        """The file itself."""
        return cast("MethodModule", importlib.import_module(f"argrad_service.engine.backward.{self.name}"))


SOLVERS = {
    solver.name: solver
    for solver in (
        Solver(
            name="pivoting",
            summary="Exact active sets of strictly convex problems, compiled on the CPU; hard ones go to pdipm.",
            kinds=("qp",),
            packages=("numba", "scipy", "threadpoolctl"),
        ),
        Solver(
            name="pdipm",
            summary="Batched primal-dual interior point method, finished on the exact active set.",
            kinds=("qp", "lp", "entropy"),
            methods=("kkt", "bpqp", "smoothed", "folded"),
            warm_starts=True,
        ),
        Solver(
            name="pgd",
            summary="Projected gradient, plain or accelerated; the projection is a QP, a box or a simplex.",
            kinds=("qp",),
            methods=("kkt", "bpqp", "unrolled", "folded"),
        ),
        Solver(
            name="barrier",
            summary="Log-barrier Newton method with phase I, for problems with a strictly feasible point.",
            kinds=("lp", "qp"),
            methods=("kkt", "bpqp", "unrolled", "smoothed", "folded"),
        ),
        Solver(
            name="admm",
            summary="Batched ADMM in Alt-Diff's splitting, finished on the exact active set.",
            kinds=("qp", "lp", "entropy"),
            methods=("kkt", "bpqp", "altdiff", "folded", "unrolled"),
            warm_starts=True,
        ),
        Solver(
            name="osqp",
            summary="OSQP, the operator splitting library, polished and finished on the exact active set.",
            kinds=("qp", "lp"),
            devices=("cpu",),
            warm_starts=True,
            packages=("osqp", "scipy"),
        ),
        Solver(
            name="clarabel",
            summary="Clarabel, the interior point library, finished on the exact active set.",
            kinds=("qp", "lp"),
            devices=("cpu",),
            packages=("clarabel", "scipy"),
        ),
        Solver(
            name="highs",
            summary="HiGHS: simplex with its basis for linear programs, and an active-set code for convex ones.",
            kinds=("lp", "qp"),
            methods=("kkt", "bpqp", "smoothed", "folded"),
            devices=("cpu",),
            warm_starts=True,
            packages=("highspy",),
        ),
        Solver(
            name="proxqp",
            summary="ProxQP, the proximal augmented Lagrangian library, finished on the exact active set.",
            kinds=("qp",),
            devices=("cpu",),
            warm_starts=True,
            packages=("proxsuite",),
            extra="proxqp",
        ),
    )
}

METHODS = {
    method.name: method
    for method in (
        Method(
            name="kkt",
            summary="Implicit differentiation of the KKT conditions on the exact active set, by the forward factor.",
            kinds=("qp", "lp", "entropy"),
            has_jvp=True,
        ),
        Method(
            name="unrolled",
            summary="Automatic differentiation of the solver's own iterations, all of them or the last few.",
            kinds=("qp", "lp"),
            takes_points=False,
        ),
        Method(
            name="smoothed",
            summary="Derivatives of a smoothed problem: barrier, quadratic, entropy or random perturbations.",
            kinds=("lp", "qp"),
        ),
        Method(
            name="altdiff",
            summary="Alternating differentiation: the derivative of ADMM's iteration, truncated.",
            kinds=("qp", "lp", "entropy"),
            takes_points=False,
        ),
        Method(
            name="folded",
            summary="Fixed-point folding of ADMM or projected gradient: iteration, GMRES or BiCGSTAB at the solution.",
            kinds=("qp", "lp", "entropy"),
        ),
        Method(
            name="bpqp",
            summary="The backward pass as a QP on the active set of any solution: direct, by OSQP, or by multipliers.",
            kinds=("qp", "lp"),
            has_jvp=True,
        ),
    )
}


def find_solver(name: str, data: Data, options: SolverOptions, warm: Guess | None) -> tuple[Solver, SolverOptions]:
    """The solver of that name, and the options with its own ones read; `auto` chooses by problem and device.

    Raises:
        ProblemError: there is none, it does not take this kind of problem or run on its device, or an option is wrong.
        MissingExtraError: its packages are not installed.
    """
    if name == AUTO:
        if options.own:
            raise ProblemError("solver.options", "options for auto", "a solver by name, for each has its own")
        solver = SOLVERS[choose(data, lambda able: suits(able, data, warm))]
        return solver, replace(options, own=_defaults(solver.module.Options))
    if name not in SOLVERS:
        raise ProblemError("solver.name", repr(name), f"one of {', '.join([AUTO, *SOLVERS])}")
    solver = SOLVERS[name]
    if data.kind not in solver.kinds:
        able = ", ".join(other.name for other in SOLVERS.values() if data.kind in other.kinds)
        raise ProblemError("solver.name", f"{name!r}, which takes no {data.kind}", f"one of {AUTO}, {able}")
    device = data.q.device.type
    if device not in solver.devices:
        raise ProblemError("solver.name", f"{name!r} on {device}", f"a solver for {device}")
    if device == "cpu" and not solver.is_installed:
        raise MissingExtraError(f"solver {name!r}", solver.extra)
    own = options.own
    if not isinstance(own, OwnOptions):
        own = read_options(solver.module.Options, own, inside="solver.options")
    return solver, replace(options, own=own)


@lru_cache(maxsize=64)
def _defaults(options: type[OwnOptions]) -> OwnOptions:
    return options()


def suits(name: str, data: Data, warm: Guess | None) -> bool:
    """Whether `auto` may take a solver: it makes use of a warm start, if there is one, and its packages are there."""
    solver = SOLVERS[name]
    return (warm is None or solver.warm_starts) and (data.q.device.type != "cpu" or solver.is_installed)


def find_method(
    name: str, forward: Forward, own: Mapping[str, Any] | None = None, *, is_jvp: bool = False
) -> tuple[Method, OwnOptions]:
    """The method of that name for an outcome, and its options read; `auto` is the first of the solver's methods.

    Args:
        name: Of the method, or `auto`.
        forward: What is differentiated.
        own: The method's options, by name.
        is_jvp: Whether tangents are to be pushed forward.

    Raises:
        ProblemError: there is none, it does not work with the solver or the kind of problem, it has no forward mode,
            or an option is wrong.
    """
    able = _able(forward.solver, forward.data.kind, is_jvp)
    own = own or {}
    if name == AUTO:
        if own:
            raise ProblemError("differentiation.options", "options for auto", "a method by name, for each has its own")
        return METHODS[able[0]], _defaults(OwnOptions)
    if name not in able:
        what = f"{forward.data.kind} problems solved by {forward.solver}" + (", in forward mode" if is_jvp else "")
        wanted = f"one of {', '.join([AUTO, *able])} for {what}"
        raise ProblemError("differentiation.method", repr(name), wanted)
    method = METHODS[name]
    return method, read_options(method.module.Options, own, inside="differentiation.options")


@lru_cache(maxsize=256)
def _able(solver: str, kind: str, is_jvp: bool) -> list[str]:
    """The methods that work at what a solver, or who is none, has found of problems of a kind."""

    def is_able(method: Method) -> bool:
        pairs = method.name in SOLVERS[solver].methods if solver in SOLVERS else method.takes_points
        return pairs and kind in method.kinds and (method.has_jvp or not is_jvp)

    return [method.name for method in METHODS.values() if is_able(method)]


def describe() -> list[dict[str, Any]]:
    """The table of solvers, for people and for GET /v1/solvers."""
    return [
        {
            "name": solver.name,
            "summary": solver.summary,
            "problems": list(solver.kinds),
            "devices": list(solver.devices),
            "warm_starts": solver.warm_starts,
            "installed": solver.is_installed,
            "methods": [
                {
                    "name": name,
                    "summary": METHODS[name].summary,
                    "problems": list(METHODS[name].kinds),
                    "jvp": METHODS[name].has_jvp,
                    "options": describe_options(METHODS[name].module.Options),
                }
                for name in solver.methods
            ],
            "options": SHARED_OPTIONS,
            "own_options": describe_options(solver.module.Options) if solver.is_installed else {},
        }
        for solver in SOLVERS.values()
    ]

"""The field: every contestant, its settings in words, and which workloads it is not tried on."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from argrad_service.engine import registry
from benchmarks.contestants.base import Contestant
from benchmarks.workloads import Workload

OURS = "argrad"


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A contestant by name, made in a process of its own.

    Args:
        name: What a table calls it.
        settings: In words.
        factory: `module:Class` inside `benchmarks.contestants`.
        arguments: Of the class.
        package: That must be importable.
        kinds: Workloads that it can take.
        refuses: Why it is not tried on a workload of such a kind; None where it is.
    """

    name: str
    settings: str
    factory: str
    arguments: dict[str, Any] = field(default_factory=dict)
    package: str = "argrad"
    kinds: tuple[str, ...] = ("qp", "tv")
    refuses: Callable[[Workload], str | None] = lambda _: None

    @property
    def is_ours(self) -> bool:
        """Whether it is argrad, and so no peer."""
        return self.package == "argrad"

    def obstacle(self, workload: Workload) -> str | None:
        """Why it does not take part, or None."""
        if find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if workload.kind not in self.kinds:
            return f"takes no {workload.kind}"
        return self.refuses(workload)

    def create(self) -> Contestant:
        """Make it, in the process in which it will run."""
        module, _, name = self.factory.partition(":")
        return getattr(importlib.import_module(f"benchmarks.contestants.{module}"), name)(**self.arguments)  # type: ignore[no-any-return]


def _dense_limit(most: int) -> Callable[[Workload], str | None]:
    """Not tried on dense problems of more variables: a conic form of them takes minutes or gigabytes."""

    def refuses(workload: Workload) -> str | None:
        n = workload.grad_z.shape[-1]
        too_large = n > most and workload.kind != "sparsemax"
        return f"not tried on dense problems with n > {most}" if too_large else None

    return refuses


PEERS = (
    Entrant(
        name="qpth",
        settings="defaults: eps 1e-12, 20 iterations; shared matrices copied",
        factory="optnet:Qpth",
        package="qpth",
    ),
    Entrant(
        name="proxsuite",
        settings="torch layer, eps 1e-10, eps_backward 1e-9, rho and mu_backward 1e-8, parallel on all cores, float64",
        factory="prox:Proxsuite",
        package="proxsuite",
        kinds=("qp", "tv", "lp"),
    ),
    Entrant(
        name="ProxQP batch",
        settings="C++ batch, eps 1e-10, backward eps 1e-9, rho and mu_backward 1e-8, all cores",
        factory="prox:ProxqpBatch",
        package="proxsuite",
        kinds=("qp", "tv", "lp"),
    ),
    Entrant(
        name="moreau",
        settings="defaults: active-set code for small QPs, else interior point at 1e-8",
        factory="moreau:Moreau",
        package="moreau",
        kinds=("qp", "tv", "lp", "sparsemax"),
        refuses=_dense_limit(600),
    ),
    Entrant(
        name="moreau ipm",
        settings="interior point, tolerances 1e-11",
        factory="moreau:Moreau",
        arguments={"solver": "ipm"},
        package="moreau",
        kinds=("qp", "tv", "lp", "sparsemax"),
        refuses=_dense_limit(600),
    ),
    Entrant(
        name="cvxpylayers",
        settings="diffcp with SCS, eps 1e-10, derivative by lsmr",
        factory="cvxpy_layers:CvxpyLayers",
        package="cvxpylayers",
        kinds=("qp", "tv", "lp", "sparsemax", "softmax"),
        refuses=_dense_limit(600),
    ),
    Entrant(
        name="cvxpylayers moreau",
        settings="moreau backend, tolerances 1e-11",
        factory="cvxpy_layers:CvxpyLayers",
        arguments={"backend": "moreau"},
        package="cvxpylayers",
        kinds=("qp", "tv", "lp", "sparsemax", "softmax"),
        refuses=_dense_limit(600),
    ),
    Entrant(
        name="cvxpylayers moreau, defaults",
        settings="moreau backend, its defaults",
        factory="cvxpy_layers:CvxpyLayers",
        arguments={"backend": "moreau", "is_tight": False},
        package="cvxpylayers",
        kinds=("sparsemax", "softmax"),
    ),
    Entrant(
        name="OSQP",
        settings="one by one, eps 1e-9, polishing, its own adjoint derivative",
        factory="operator_splitting:Osqp",
        package="osqp",
        kinds=("qp", "tv", "lp"),
        refuses=_dense_limit(600),
    ),
)

_EVERYTHING = ("qp", "lp", "tv", "sparsemax", "softmax")


def ours() -> Entrant:
    """The default: argrad as it comes."""
    return Entrant(name=OURS, settings="auto, tolerance 1e-8", factory="ours:Argrad", kinds=_EVERYTHING)


def our_variants() -> list[Entrant]:
    """Every installed solver with its first method, and every other method with the first solver that has it."""
    found, methods = [], set()
    for solver in registry.SOLVERS.values():
        if not solver.is_installed:
            continue
        for position, method in enumerate(solver.methods):
            if position == 0 or method not in methods:
                methods.add(method)
                found.append(_variant(solver, method))
    return found


def _variant(solver: registry.Solver, method: str) -> Entrant:
    able = set(solver.kinds) & set(registry.METHODS[method].kinds)
    kinds = tuple(kind for kind, own in _KIND_OF.items() if own in able)
    return Entrant(
        name=f"{OURS} {solver.name} + {method}",
        settings=f"solver {solver.name}, method {method}, tolerance 1e-8",
        factory="ours:Argrad",
        arguments={"solver": solver.name, "method": method},
        kinds=kinds,
    )


_KIND_OF = {"qp": "qp", "tv": "qp", "lp": "lp", "softmax": "entropy"}


def installed_versions() -> dict[str, str]:
    """Versions of whatever takes part, by distribution name."""
    found = {}
    for name in ("argrad", "torch", "numpy", "qpth", "proxsuite", "moreau", "cvxpylayers", "diffcp", "cvxpy", "osqp"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found

"""What a caller may choose: who solves and how exactly, and what happens to a problem without a solution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Literal, get_args

import orjson

from argrad.problems import check_names
from argrad.validation import validate
from argrad.wire.messages import DifferentiationDocument, Gradients, Precision, SolverDocument, SolveRequest

OnFailure = Literal["raise", "nan", "zero_grad"]
_ON_FAILURE, _GRADIENTS = get_args(OnFailure), get_args(Gradients)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a problem is solved and differentiated.

    Args:
        solver: A solver of `Client.solvers()`, or `auto`.
        tolerance: Bound on the scaled KKT residuals at which a problem counts as optimal, from 1e-12 to 0.1.
        max_iterations: Bound on the iterations of one problem, from 1 to 10 000.
        method: A differentiation method of `Client.solvers()`, or `auto`.
        solver_options: Options of that solver alone, by name, as `Client.solvers()` lists them.
        method_options: Options of that method alone.
        deterministic: Solve unpadded and alone: the same bits for the same call, whatever else a service is solving.
        precision: `float32` halves what travels of solutions, cotangents, gradients and reports, to seven digits; the
            problem goes as it is, is solved in float64, and results come in its dtype.

    Raises:
        ProblemError: a value is out of range, in the service's own words. Own options are checked where the problem is
            solved.
    """

    solver: str = "auto"
    tolerance: float = 1e-8
    max_iterations: int = 100
    method: str = "auto"
    solver_options: Mapping[str, bool | float | str | None] = field(default_factory=dict)
    method_options: Mapping[str, bool | float | str | None] = field(default_factory=dict)
    deterministic: bool = False
    precision: Precision = "float64"
    solver_document: SolverDocument = field(init=False, repr=False, compare=False)
    differentiation_document: DifferentiationDocument = field(init=False, repr=False, compare=False)
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        solver = {
            "name": self.solver,
            "tolerance": self.tolerance,
            "max_iterations": self.max_iterations,
            "options": dict(self.solver_options),
        }
        differentiation = {"method": self.method, "options": dict(self.method_options)}
        checked = validate(
            SolveRequest,
            {
                "solver": solver,
                "differentiation": differentiation,
                "deterministic": self.deterministic,
                "precision": self.precision,
            },
        )
        object.__setattr__(self, "solver_document", checked.solver)
        object.__setattr__(self, "differentiation_document", checked.differentiation)
        # A compiled graph, which holds no objects, holds this.
        chosen = {one.name: getattr(self, one.name) for one in fields(self) if one.init}
        object.__setattr__(self, "text", orjson.dumps(chosen, default=dict).decode())

    @classmethod
    @lru_cache(maxsize=128)
    def from_text(cls, text: str) -> Options:
        """The options whose `text` it is."""
        return cls(**orjson.loads(text))


def check_choices(on_failure: str, gradients: str) -> None:
    """Refuse words that are not choices.

    Raises:
        ProblemError: names the choice, and the words that are.
    """
    check_names("on_failure", [on_failure], _ON_FAILURE)
    check_names("gradients", [gradients], _GRADIENTS)

"""What a caller may ask of a solver: options that all understand, and those that one solver or method has alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from argrad.validation import validate

ShouldStop = Callable[[], bool]
"""Asked between two iterations; True ends the solve with `Stopped`."""


class Stopped(Exception):  # noqa: N818 - not an error: the caller asked for it
    """The solve ended because nobody wants its result any more."""


def never_stop() -> bool:
    """The `ShouldStop` of a caller that waits as long as it takes."""
    return False


class OwnOptions(BaseModel):
    """No options; solvers and methods that have some derive from this.

    Every field has a default, a bound and a description: they are what `GET /v1/solvers` and the documentation show.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def in_use(self) -> dict[str, bool | float | str]:
        """The options that had a say, by name, for the report; without those that are null."""
        return self.model_dump(exclude_none=True)


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """What every solver understands.

    Args:
        tolerance: Bound on the scaled KKT residuals at which a problem is optimal.
        max_iterations: Bound on the iterations of one problem; `pivoting` has bounds of its own on rounds and steps.
        should_stop: Asked between two iterations; by `pivoting` between pieces of the batch.
        own: Options of the solver alone: raw, by name, until `find_solver` reads them.
    """

    tolerance: float = 1e-8
    max_iterations: int = 100
    should_stop: ShouldStop = never_stop
    own: Mapping[str, Any] | OwnOptions = field(default_factory=dict)


O = TypeVar("O", bound=OwnOptions)


def read_options(model: type[O], given: Mapping[str, Any], *, inside: str) -> O:
    """The options of a call.

    Args:
        model: Of the solver or the method.
        given: By name, as the call has them.
        inside: Where they stand in the call, for messages: `solver.options`.

    Raises:
        ProblemError: an option is unknown, or its value is of the wrong kind or out of range.
    """
    return validate(model, given, inside=inside)


def describe_options(model: type[OwnOptions]) -> dict[str, dict[str, Any]]:
    """Of each option its JSON schema: type, default, bounds, description."""
    properties: dict[str, dict[str, Any]] = model.model_json_schema().get("properties", {})
    return {name: {key: schema[key] for key in schema if key != "title"} for name, schema in properties.items()}

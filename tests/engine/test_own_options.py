"""Options of one solver alone: read once, against the solver's own model."""

from __future__ import annotations

import pytest
from pydantic import Field

from argrad.errors import ProblemError
from argrad_service.engine.options import OwnOptions, describe_options, read_options


class Some(OwnOptions):
    """Options for the tests."""

    rho: float = Field(default=1.0, gt=0, le=10)
    """Penalty."""

    rounds: int = 3
    """Rounds at most."""


def test_what_is_given_is_read_and_the_rest_has_its_default():
    assert read_options(Some, {"rho": 2}, inside="solver.options") == Some(rho=2.0, rounds=3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rh": 1}, r"solver\.options\.rh: found an unknown field, wanted one of rho, rounds$"),
        ({"rho": 0.0}, r"solver\.options\.rho: found 0.0, wanted a number > 0"),
        ({"rho": "1"}, r'solver\.options\.rho: found "1", wanted a valid number'),
        ({"rounds": 1.5}, r"solver\.options\.rounds: found 1.5, wanted a valid integer"),
    ],
)
def test_what_is_wrong_is_named(given: dict[str, object], message: str):
    with pytest.raises(ProblemError, match=message):
        read_options(Some, given, inside="solver.options")


def test_options_describe_themselves():
    assert describe_options(Some) == {
        "rho": {"default": 1.0, "description": "Penalty.", "exclusiveMinimum": 0, "maximum": 10, "type": "number"},
        "rounds": {"default": 3, "description": "Rounds at most.", "type": "integer"},
    }
    assert describe_options(OwnOptions) == {}

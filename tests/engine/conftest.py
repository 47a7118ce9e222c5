"""Every test of the engine runs once with the solver that `auto` takes, and once with `pdipm` alone."""

from __future__ import annotations

import pytest

from argrad_service.engine import registry


@pytest.fixture(params=["auto", "pdipm"], autouse=True)
def solver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The solver behind `engine.solve` without a name."""
    name: str = request.param
    if name == "pdipm":
        monkeypatch.setattr(registry, "choose", lambda data, suits: "pdipm")
    return name

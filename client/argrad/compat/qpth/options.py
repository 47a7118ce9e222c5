"""What qpth's arguments mean here."""

from __future__ import annotations

from argrad.client import Client
from argrad.defaults import default_client
from argrad.options import Options

_FINEST, _COARSEST = 1e-8, 1e-1
_ITERATIONS, _MOST_ITERATIONS = 100, 10_000


def options_of(solver: str, eps: float, max_iterations: int) -> Options:
    """A tolerance that ours can have, and no fewer iterations than ours needs."""
    return Options(
        solver=solver,
        tolerance=min(max(eps, _FINEST), _COARSEST),
        max_iterations=min(max(max_iterations, _ITERATIONS), _MOST_ITERATIONS),
    )


def who_solves(url: str | Client | None) -> Client:
    """The client that was given, that of the address, or the default one."""
    return url if isinstance(url, Client) else default_client(url)

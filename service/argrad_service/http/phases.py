"""How many calls are where on their way, outside the queue and the solver."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

PHASES = ("read", "decode", "encode")


class Phases:
    """Counts calls by phase; on the event loop only, so there is no lock."""

    def __init__(self) -> None:
        self.calls = dict.fromkeys(PHASES, 0)

    @contextlib.contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Count a call for as long as this is open."""
        self.calls[phase] += 1
        try:
            yield
        finally:
            self.calls[phase] -= 1

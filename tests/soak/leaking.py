"""The positive control: the service as it is, but for an engine that keeps a few kilobytes of every solve for ever."""

from __future__ import annotations

import sys
from typing import Any

from argrad_service import engine
from argrad_service.server import serve
from argrad_service.settings import load_settings

LEAKED_BYTES = 16 * 1024
"""Of each solve, in this process."""


class LeakingEngine:
    """The real engine, and a list that only grows."""

    def __init__(self) -> None:
        self._kept: list[bytes] = []

    def solve(self, problem: Any, **more: Any) -> Any:
        self._kept.append(b"\x01" * LEAKED_BYTES)
        return engine.solve(problem, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(engine, name)


if __name__ == "__main__":
    serve(load_settings(port=sys.argv[sys.argv.index("--port") + 1]), LeakingEngine())

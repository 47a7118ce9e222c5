"""`argrad serve` with an engine whose solves of three variables take as long as the first argument says."""

from __future__ import annotations

import sys
import time
from typing import Any

from argrad_service import engine
from argrad_service.engine.options import SolverOptions, Stopped
from argrad_service.server import serve
from argrad_service.settings import load_settings


class SlowEngine:
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def solve(self, problem: Any, *, options: SolverOptions, **more: Any) -> Any:
        until = time.monotonic() + (self._seconds if problem.q.shape[-1] == 3 else 0.0)
        while time.monotonic() < until:
            if options.should_stop():
                raise Stopped
            time.sleep(0.005)
        return engine.solve(problem, options=options, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(engine, name)


if __name__ == "__main__":
    serve(load_settings(), SlowEngine(float(sys.argv[1])))

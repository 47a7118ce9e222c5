"""The service that is soaked, whose process says what it has in use; told to leak, it is the positive control."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from pathlib import Path
from typing import Any

from argrad_service import engine
from argrad_service.server import serve
from argrad_service.settings import load_settings

PERIOD_S = 0.5
LEAKED_BYTES = 2 * 1024
"""Of each solve, where it is to leak."""


class _Mallinfo2(ctypes.Structure):
    """What glibc says of all its arenas."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


class LeakingEngine:
    """The real engine, and a list that only grows."""

    def __init__(self) -> None:
        self._kept: list[bytes] = []

    def solve(self, problem: Any, **more: Any) -> Any:
        self._kept.append(b"\x01" * LEAKED_BYTES)
        return engine.solve(problem, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(engine, name)


def in_use() -> tuple[int, int]:
    """Bytes that `malloc` has given out, for tensors and all that is large, and blocks of Python's own allocator.

    Resident memory is neither: it grows for a long time while the allocators reach pages that they have had from the
    start, and never falls.
    """
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    found = mallinfo2()
    return found.uordblks + found.hblkhd, sys.getallocatedblocks()


def _report(file: Path) -> None:
    """Write what is in use into a file, again and again; a reader finds one whole line."""
    draft = file.with_suffix(".draft")
    while True:
        draft.write_text("{} {}\n".format(*in_use()))
        draft.replace(file)
        time.sleep(PERIOD_S)


if __name__ == "__main__":
    port, report, leaks = sys.argv[1:]
    threading.Thread(target=_report, args=(Path(report),), daemon=True).start()
    serve(load_settings(port=port), LeakingEngine() if leaks == "leaks" else engine)

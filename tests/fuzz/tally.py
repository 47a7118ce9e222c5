"""What a run of fuzzing saw: how many inputs, what they gave, and every finding with the input that shows it."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType

MOST_FINDINGS = 20


class Hang(BaseException):
    """An input took longer than any may; no `except Exception` swallows it."""


@dataclass
class Tally:
    """Of one target.

    Args:
        name: Of the target.
        inputs: Tried.
        outcomes: How often each kind of outcome came.
        behaviours: Different places at which inputs were refused; each one new kept its input for further mutation.
        findings: What should not be, in words, by the input that shows it.
        slowest_s: Time of the slowest input.
        wall_s: Time of all.
    """

    name: str
    inputs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    behaviours: set[tuple[object, ...]] = field(default_factory=set)
    findings: dict[bytes, str] = field(default_factory=dict)
    slowest_s: float = 0.0
    wall_s: float = 0.0

    def find(self, shown: bytes, words: str) -> None:
        """Note a finding."""
        if len(self.findings) < MOST_FINDINGS:
            self.findings[shown] = words

    def save(self, folder: Path) -> list[Path]:
        """Write the inputs of the findings into a folder, each with what it showed beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for shown, words in self.findings.items():
            path = folder / f"{self.name.replace(' ', '-')}-{hashlib.sha256(shown).hexdigest()[:12]}"
            path.write_bytes(shown)
            path.with_suffix(".txt").write_text(words)
            paths.append(path)
        return paths

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time of a run."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.wall_s += time.perf_counter() - began


def place_of(error: BaseException) -> tuple[object, ...]:
    """Where an exception came from: its kind, and the lines it passed."""
    lines: list[object] = [type(error).__name__]
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        lines.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    return tuple(lines)


@contextlib.contextmanager
def no_longer_than(cpu_s: float) -> Iterator[None]:
    """Raise `Hang` in what takes more processor time than that; main thread only.

    Processor time, because a busy machine is no defect; and its own signal, because pytest-timeout has SIGALRM.
    """

    def ring(_: int, __: FrameType | None) -> None:
        raise Hang(f"more than {cpu_s} s of processor time")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


def table(tallies: list[Tally]) -> str:
    """All runs, a row a target."""
    rows = [("target", "inputs", "seconds", "slowest ms", "behaviours", "outcomes", "findings")]
    for one in tallies:
        outcomes = ", ".join(f"{count} {name}" for name, count in one.outcomes.most_common())
        rows.append(
            (
                one.name,
                str(one.inputs),
                f"{one.wall_s:.1f}",
                f"{1e3 * one.slowest_s:.1f}",
                str(len(one.behaviours)),
                outcomes,
                str(len(one.findings)),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 2)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join([*cells, row[-1].rjust(8), row[-2]]))
    return "\n".join(lines)

"""One workload, everybody in turns: times and errors side by side."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.contestants.field import Entrant
from benchmarks.measures import FEWEST_TURNS, find_best, is_right, judge, total_ms
from benchmarks.reference import Truth, exact
from benchmarks.runner import Failed, Runner
from benchmarks.storage import save_workload
from benchmarks.workloads import Workload


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long everything may take.

    Args:
        command_s: One preparation or one turn of a contestant, before it is ended and counts as failed.
        budget_s: All turns of a contestant but the first; three turns are taken in any case, one where a step takes
            longer than this.
        turn_ms: A turn is as many steps as fill it, so that caches are as warm as they are in training.
    """

    command_s: float
    budget_s: float
    turn_ms: float


class Field:
    """The processes of all contestants, which live from one workload to the next."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._runners: dict[str, Runner] = {}

    def race(self, workload: Workload, entrants: Sequence[Entrant], *, goal: float | None) -> dict[str, Any]:
        """Time and judge every entrant.

        Args:
            workload: To be solved.
            entrants: argrad among them; the rest is compared with the first of its rows.
            goal: How many times faster than the best peer argrad is to be; None where there is no figure.

        Returns:
            An object for the results file: a row for each entrant, and who is best.
        """
        print(workload.name, file=sys.stderr, flush=True)
        truth = exact(workload)
        rows = {entrant.name: _row(entrant) for entrant in entrants}
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            path = Path(folder) / "workload.pt"
            save_workload(workload, path)
            obstacles = {entrant.name: entrant.obstacle(workload) for entrant in entrants}
            for name, why in obstacles.items():
                if why is not None:
                    rows[name] |= {"status": "not tried", "why": why}
            racing = [self._runner(entrant) for entrant in entrants if obstacles[entrant.name] is None]
            times = self._take_turns(racing, path, rows)
            for runner in racing:
                self._finish(runner, workload, truth, Path(folder), times, rows[runner.entrant.name])
        return _summary(workload, truth, list(rows.values()), goal)

    def close(self) -> None:
        """End all processes."""
        for runner in self._runners.values():
            runner.stop()
        self._runners.clear()

    def _runner(self, entrant: Entrant) -> Runner:
        return self._runners.setdefault(entrant.name, Runner(entrant, limit_s=self.limits.command_s))

    def _take_turns(
        self, racing: Sequence[Runner], path: Path, rows: dict[str, dict[str, Any]]
    ) -> dict[str, tuple[list[float], list[float]]]:
        """Times by name; the first turn, which compiles and warms, is not counted."""
        left = {}
        for runner in racing:
            try:
                runner.prepare(path)
                runner.turn(0.0)
                left[runner.entrant.name] = self.limits.budget_s
            except Failed as failure:
                rows[runner.entrant.name] |= {"status": "failed", "why": str(failure)}
        times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in left}
        turns = 0
        while left:
            for runner in racing:
                name = runner.entrant.name
                if name in left:
                    self._take_turn(runner, times, left, rows[name], turns)
            turns += 1
        return times

    def _take_turn(
        self,
        runner: Runner,
        times: dict[str, tuple[list[float], list[float]]],
        left: dict[str, float],
        row: dict[str, Any],
        turns: int,
    ) -> None:
        name, start = runner.entrant.name, time.perf_counter()
        try:
            forward, backward = runner.turn(self.limits.turn_ms)
        except Failed as failure:
            row |= {"status": "failed", "why": str(failure)}
            del left[name]
            return
        times[name][0].extend(forward)
        times[name][1].extend(backward)
        spent = time.perf_counter() - start
        left[name] -= spent
        if left[name] <= 0 and (turns + 1 >= FEWEST_TURNS or spent > self.limits.budget_s):
            del left[name]

    def _finish(
        self,
        runner: Runner,
        workload: Workload,
        truth: Truth,
        folder: Path,
        times: dict[str, tuple[list[float], list[float]]],
        row: dict[str, Any],
    ) -> None:
        if row["status"] == "ok":
            try:
                accuracy = judge(workload, runner.answer(folder / "answer.pt"), truth)
            except (Failed, ValueError) as failure:
                row |= {"status": "failed", "why": str(failure)}
            else:
                forward, backward = times[runner.entrant.name]
                row |= {"forward_ms": median(forward), "backward_ms": median(backward), "repeats": len(forward)}
                row |= asdict(accuracy)
        try:
            runner.release()
        except Failed as failure:
            print(f"{runner.entrant.name}: {failure}", file=sys.stderr)


def _row(entrant: Entrant) -> dict[str, Any]:
    return {"name": entrant.name, "settings": entrant.settings, "is_ours": entrant.is_ours, "status": "ok"}


def _summary(workload: Workload, truth: Truth, rows: list[dict[str, Any]], goal: float | None) -> dict[str, Any]:
    own = next(row for row in rows if row["is_ours"])
    best = find_best(rows)
    ratio = None
    if best is not None and own["status"] == "ok":
        ratio = total_ms(best) / total_ms(own)
    return {
        "name": workload.name,
        "wrt": list(workload.wrt),
        "elements": len(truth.z),
        "active_mean": float(truth.active.mean()),
        "smallest_margin": float(truth.margin.min()),
        "contestants": rows,
        "best": None if best is None else best["name"],
        "ratio": ratio,
        "goal": goal,
        "is_right": own["status"] == "ok" and is_right(own),
    }

"""Contestants in processes of their own, each command under a time limit."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from benchmarks.contestants.base import Answer
from benchmarks.contestants.field import Entrant
from benchmarks.storage import load_answer

_START_LIMIT_S = 120.0


class Failed(Exception):  # noqa: N818 - a result like another: it becomes a row of the table
    """A contestant raised, died or was not done in time; says which."""


class Runner:
    """A contestant's process, started when first asked, and again after it failed."""

    def __init__(self, entrant: Entrant, *, limit_s: float) -> None:
        self.entrant, self.limit_s = entrant, limit_s
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[bytes] | None = None

    def prepare(self, workload: Path) -> None:
        """Take a workload that was saved there."""
        self._ask({"do": "prepare", "path": str(workload)})

    def turn(self, least_ms: float) -> tuple[list[float], list[float]]:
        """Milliseconds of forward and of backward, of as many steps as fill the time."""
        reply = self._ask({"do": "turn", "least_ms": least_ms})
        return reply["forward"], reply["backward"]

    def answer(self, path: Path) -> Answer:
        """What the last step returned; the file is taken away again."""
        self._ask({"do": "answer", "path": str(path)})
        try:
            return load_answer(path)
        finally:
            path.unlink(missing_ok=True)

    def release(self) -> None:
        """Let go of the workload."""
        if self._process is not None:
            self._ask({"do": "release"})

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout, self._log):
                if stream is not None:
                    stream.close()
        self._process = self._log = None

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Failed(self._end("its process died")) from None
        reply = self._read(self.limit_s)
        if "error" in reply:
            self.stop()
            raise Failed(str(reply["error"]))
        return reply

    def _start(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - `stop` closes it
        specification = json.dumps({"factory": self.entrant.factory, "arguments": self.entrant.arguments})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", specification],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        self._read(_START_LIMIT_S)

    def _read(self, limit_s: float) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], limit_s)
        if not ready:
            self.stop()
            raise Failed(f"not done in {limit_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise Failed(self._end("its process died"))
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _end(self, reason: str) -> str:
        """Stop it, and add what it said last."""
        assert self._log is not None
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        self.stop()
        return f"{reason}: {lines[-1].strip()[:300]}" if lines else reason

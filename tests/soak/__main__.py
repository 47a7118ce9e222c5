"""`make soak`: mixed traffic for SOAK_S seconds (600), then the same on a service that leaks, which must be found out.

Exit status 1 where memory, file descriptors, threads or the p99 of a solve grow, where an answer was wrong, or where
the leak of the control goes unnoticed. The first quarter is not looked at, and half a minute at least: caches fill,
kernels are read, the allocator finds its size.

Memory is judged by what is in use: `malloc`'s bytes and Python's blocks, to a fraction of what any call could leave
behind. Resident memory is judged too, by more: it creeps for many minutes, since each allocation may be the first to
touch a page that the heap has had from the start (MALLOC_TOP_PAD_, see the server), while nothing more is in use.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import psutil

from argrad_service.server import PROCESS_ENVIRONMENT
from tests.conftest import free_port
from tests.soak.traffic import WORKERS, Caller, Seen
from tests.soak.trend import BLOCKS, Trend, trend_of
from tests.soak.watched import PERIOD_S

LEAST_S = 60.0
SETTLING, LEAST_SETTLING_S = 0.25, 30.0
START_S = 300.0
LEAK_BYTES_PER_CALL, LEAK_BLOCKS_PER_CALL = 128, 1.0
"""Growth of what is in use that counts as a leak; a state, a request or a reply that was forgotten is larger."""
RESIDENT_BYTES_PER_CALL = 1024
"""Growth of resident memory that does."""

SETTINGS = {
    "ARGRAD_STATE_BUDGET_BYTES": "8MiB",
    "ARGRAD_PROBLEM_BUDGET_BYTES": "2MiB",
    "ARGRAD_LOG_LEVEL": "error",
    "ARGRAD_TORCH_THREADS": "1",
}
"""Caches that are full within seconds: what grows then is no cache."""


@dataclass(frozen=True)
class Soak:
    """A finished run.

    Args:
        seen: By the callers.
        calls: Answered after the settling.
        resident: Bytes.
        in_use: Bytes, of `malloc`.
        blocks: In use, of Python's allocator.
        descriptors: Open files and sockets.
        threads: Of the process.
        p99_ms: Of plain solves, of each block.
    """

    seen: Seen
    calls: int
    resident: Trend
    in_use: Trend
    blocks: Trend
    descriptors: Trend
    threads: Trend
    p99_ms: Trend

    @property
    def leaks(self) -> bool:
        """Whether what is in use grows by more than is tolerated for each call."""
        is_in_use = self.in_use.grows(LEAK_BYTES_PER_CALL * self.calls)
        return is_in_use or self.blocks.grows(LEAK_BLOCKS_PER_CALL * self.calls)

    def complaints(self) -> list[str]:
        """What should not be."""
        found = list(self.seen.wrong[:10])
        if self.leaks:
            a_call = (
                f"{self.in_use.growth / self.calls:.0f} bytes and {self.blocks.growth / self.calls:.1f} blocks a call"
            )
            found.append(f"memory in use grows by {a_call}")
        if self.resident.grows(RESIDENT_BYTES_PER_CALL * self.calls):
            found.append(f"resident memory grows by {self.resident.growth / self.calls:.0f} bytes a call")
        if self.descriptors.grows(4):
            found.append(f"{self.descriptors.growth:.1f} file descriptors more")
        if self.threads.grows(2):
            found.append(f"{self.threads.growth:.1f} threads more")
        if self.p99_ms.grows(0.3 * self.p99_ms.mean):
            found.append(f"the p99 of a solve grew by {self.p99_ms.growth:.1f} ms")
        return found


@contextlib.contextmanager
def service(folder: Path, *, leaks: bool) -> Iterator[tuple[str, int]]:
    """A service in a process of its own, and its process id; it writes what it has in use into `folder / "in-use"`."""
    port, log = free_port(), folder / "log.txt"
    environment = os.environ | PROCESS_ENVIRONMENT | SETTINGS
    with log.open("wb") as output:
        report = str(folder / "in-use")
        command = [sys.executable, "-m", "tests.soak.watched", str(port), report, "leaks" if leaks else "does not leak"]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(url, process, log)
            yield url, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    with httpx.Client(trust_env=False) as client:
        until = time.monotonic() + START_S
        while time.monotonic() < until and process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if client.get(f"{url}/health/ready").status_code == 200:
                    return
            time.sleep(0.1)
    raise RuntimeError(f"the service did not become ready:\n{log.read_text()}")


def soak(seconds: float, *, leaks: bool = False) -> Soak:
    """Load a service, and watch its process.

    Args:
        seconds: Of traffic, the settling included.
        leaks: Whether it is to leak.
    """
    samples: list[tuple[float, ...]] = []
    seen, stop = Seen(), threading.Event()
    with TemporaryDirectory() as name, service(Path(name), leaks=leaks) as (url, pid):
        process = psutil.Process(pid)
        callers = [Caller(url, seed, seen, stop) for seed in range(WORKERS)]
        for caller in callers:
            caller.start()
        began = time.monotonic()
        settled_at, settled_calls = began + max(LEAST_SETTLING_S, SETTLING * seconds), 0
        while time.monotonic() < began + seconds:
            time.sleep(PERIOD_S)
            if time.monotonic() < settled_at:
                settled_calls = seen.calls.total()
                continue
            in_use, blocks = map(float, (Path(name) / "in-use").read_text().split())
            resident = process.memory_info().rss
            samples.append((resident, in_use, blocks, process.num_fds(), process.num_threads()))
        stop.set()
        for caller in callers:
            caller.join(60)
        if any(caller.is_alive() for caller in callers):
            seen.wrong.append("a call hangs")
    trends = [trend_of(column) for column in zip(*samples, strict=True)]
    took = [s for at, s in seen.latencies_s if at >= settled_at]
    return Soak(seen, seen.calls.total() - settled_calls, *trends, p99_ms=_p99_of_blocks(took))


def _p99_of_blocks(took_s: list[float]) -> Trend:
    size = max(1, len(took_s) // (2 * BLOCKS))
    blocks = [sorted(took_s[at : at + size]) for at in range(0, size * 2 * BLOCKS, size)]
    return trend_of([1e3 * block[int(0.99 * (len(block) - 1))] for block in blocks])


def table(name: str, run: Soak) -> str:
    """A run, a row a measure."""
    rows = [(name, "mean", "growth", "99 % confidence")]
    for label, trend, unit in (
        ("resident MiB", run.resident, 2.0**20),
        ("  bytes a call", run.resident, float(run.calls)),
        ("in use, MiB", run.in_use, 2.0**20),
        ("  bytes a call", run.in_use, float(run.calls)),
        ("blocks of Python", run.blocks, 1.0),
        ("  a call", run.blocks, float(run.calls)),
        ("file descriptors", run.descriptors, 1.0),
        ("threads", run.threads, 1.0),
        ("p99 of a solve, ms", run.p99_ms, 1.0),
    ):
        mean = "" if label.endswith("a call") else f"{trend.mean / unit:.1f}"
        rows.append((label, mean, f"{trend.growth / unit:+.2f}", f"{trend.low / unit:+.2f} … {trend.high / unit:+.2f}"))
    return "\n".join(f"{a:<24}{b:>10}{c:>12}{d:>26}" for a, b, c, d in rows)


def main() -> int:
    """Exit status: 1 where something grows that should not, or the control passes."""
    seconds = max(LEAST_S, float(os.environ.get("SOAK_S") or 600))
    load = [os.getloadavg()[0]]
    run = soak(seconds)
    load.append(os.getloadavg()[0])
    calls = ", ".join(f"{count} {name}" for name, count in run.seen.calls.most_common())
    print(f"{seconds:g} s, {run.seen.calls.total()} calls: {calls}; {len(run.seen.wrong)} wrong")
    print(f"load of the machine {load[0]:.1f} before, {load[1]:.1f} at the end, {WORKERS} callers included\n")
    print(table("the service", run), flush=True)
    control = soak(max(LEAST_S, seconds / 5), leaks=True)
    print(f"\n{table('a service that leaks', control)}\n")
    complaints = run.complaints()
    if not control.leaks:
        complaints.append("the leak of the control was not noticed")
    for complaint in complaints:
        print(f"NOT AS IT SHOULD BE: {complaint}")
    print("not flat" if complaints else "flat; the control's leak was noticed")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())

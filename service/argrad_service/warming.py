"""Kernels are compiled before a service is ready: once for a machine, and by several processes where there are cores.

`python -m argrad_service.warming` does it without a service; with `--for-image` for any processor of this one's kind,
into a folder beside the kernels: a container's files are read-only, and its processor may be another.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from argrad.problems import QP
from argrad.wire.messages import SolverDocument, SolveRequest
from argrad_service import engine
from argrad_service.admission import Limits
from argrad_service.engine.backward import kkt
from argrad_service.engine.options import never_stop
from argrad_service.engine.outcome import Forward
from argrad_service.keyring import PUBLIC
from argrad_service.operations import Operations
from argrad_service.state import MemoryStateStore, TokenSigner

_POLL_S = 0.1
_WHOLE_STATE_BYTES = 1 << 20


class Log(Protocol):
    """Where it is said what is compiled."""

    def info(self, event: str, **values: Any) -> Any:
        """Note something."""

    def warning(self, event: str, **values: Any) -> Any:
        """Note something that should not be."""


def _few_variables(operations: Operations) -> None:
    for rows in (1, 4):
        _solve(operations, 2, rows)
    pair = torch.eye(2, dtype=torch.float64).expand(2, 2, 2).contiguous()
    outcome = engine.solve(QP(Q=pair, q=pair[0], G=pair, h=pair[0]))
    if isinstance(outcome, Forward):
        kkt.gradients(outcome, pair[0], ("Q", "G"))


def _more_variables(operations: Operations) -> None:
    _solve(operations, 13, 4)


def _interior_point(operations: Operations) -> None:
    for rows in (1, 4):
        _solve(operations, 2, rows, solver="pdipm")


def _entropy(operations: Operations) -> None:
    _solve(operations, 2, 1, entropy=1.0)


def _shared(operations: Operations) -> None:
    """A batch that shares Q and rows, as many as its kernels begin at."""
    Q = torch.eye(48, dtype=torch.float64)
    tensors = {"problem.Q": Q, "problem.q": -Q[:16], "problem.G": Q, "problem.h": 0.5 * Q.sum(0)}
    operations.prepare_solve(SolveRequest(keep_state=False), tensors, owner=PUBLIC)(never_stop, {})


PARTS: dict[str, Callable[[Operations], None]] = {
    "few variables": _few_variables,
    "more variables": _more_variables,
    "interior point": _interior_point,
    "entropy": _entropy,
    "shared coefficients": _shared,
}
"""A problem for each kernel, forward and backward. Together they are what a first call could have to wait for."""

ELSEWHERE = ("entropy", "shared coefficients")
"""Parts that have little in common with the others, and as much of their own: another process may compile them."""


def _solve(operations: Operations, n: int, rows: int, *, solver: str = "auto", entropy: float | None = None) -> None:
    """`n` variables and `rows` inequalities, forward and backward; with an entropy in place of Q."""
    Q = torch.eye(n, dtype=torch.float64)
    tensors = {
        **({"problem.Q": Q} if entropy is None else {"problem.entropy": Q.new_tensor(entropy)}),
        "problem.q": Q.new_ones(n),
        "problem.G": Q.new_ones(rows, n),
        "problem.h": Q.new_ones(rows),
        "upstream.z": Q.new_ones(n),
    }
    request = SolveRequest(solver=SolverDocument(name=solver))
    operations.prepare_solve(request, tensors, owner=PUBLIC)(never_stop, {})


@contextlib.asynccontextmanager
async def compiling(log: Log, *, threads: int) -> AsyncIterator[Callable[[str], Awaitable[None]]]:
    """For as long as this is open, this process alone compiles kernels on this machine, with others to help it.

    Args:
        log: Told what is compiled, if anything is.
        threads: Processes that may compile at a time, this one included; 0 where there is nothing to compile.

    Yields:
        Waits until a part that another process compiles is there; called with each part before it is begun.
    """
    marker = _marker()
    if not threads or marker.exists():
        yield _at_once
        return
    with _lock(marker.with_name("compiling.lock")) as lock:
        await _turn(lock, log)
        if marker.exists():
            yield _at_once
            return
        helpers = _helpers(min(threads - 1, len(ELSEWHERE)))
        log.info(
            "compiling kernels",
            why="first start on this machine: it takes a minute, once",
            parts=len(PARTS),
            processes=len(set(helpers.values())) + 1,
            cache=str(cache_folder()),
        )
        began = time.perf_counter()

        async def ready(part: str) -> None:
            number = list(PARTS).index(part)
            seconds = round(time.perf_counter() - began, 1)
            log.info("compiling kernels", part=part, number=f"{number + 1} of {len(PARTS)}", seconds=seconds)
            if (helper := helpers.get(part)) is None:
                return
            while helper.poll() is None:
                await asyncio.sleep(_POLL_S)
            if helper.returncode:
                log.warning("kernels are compiled here", part=part, reason=f"the other process: {helper.returncode}")

        try:
            yield ready
            _mark(marker)
        finally:
            for helper in set(helpers.values()):
                helper.kill()
                helper.wait()


async def _at_once(_: str) -> None:
    """Nothing is waited for: everything is compiled."""


def _helpers(count: int) -> dict[str, subprocess.Popen[bytes]]:
    """Processes that compile, by part."""
    found: dict[str, subprocess.Popen[bytes]] = {}
    for i in range(count):
        parts = ELSEWHERE[i::count]
        command = [sys.executable, "-m", "argrad_service.warming", *parts]
        helper = subprocess.Popen(  # noqa: S603 - this program, and names of our own
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        found |= dict.fromkeys(parts, helper)
    return found


def cache_folder() -> Path:
    """Where what is compiled is kept.

    Kernels are imported here and not above: that may make a folder for this process, and `argrad serve` starts itself
    anew after its imports.
    """
    from argrad_service.engine import kernels

    return kernels.cache_folder()


def _marker() -> Path:
    """A file in the cache that says that everything is compiled: by these sources, for this processor."""
    from argrad_service.engine.kernels import digest  # before numba, which then reads what this chooses

    import llvmlite.binding  # isort: skip
    import numba  # isort: skip

    processor = os.environ.get("NUMBA_CPU_NAME") or llvmlite.binding.get_host_cpu_name()
    about = (digest(), numba.__version__, sys.version, processor)
    return cache_folder() / f"all-{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}"


def _mark(marker: Path) -> None:
    with contextlib.suppress(OSError):  # the cache cannot be written: the next start compiles too
        for stale in marker.parent.glob("all-*"):
            stale.unlink()
        marker.touch()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[IO[bytes] | None]:
    """A file to lock; None where the cache cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("ab")
    except OSError:
        yield None
        return
    with opened:
        yield opened


async def _turn(lock: IO[bytes] | None, log: Log) -> None:
    """Wait while another service compiles the same."""
    has_said = False
    while lock is not None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not has_said:
                log.info("waiting for kernels", why="another process compiles them")
            has_said = True
            await asyncio.sleep(_POLL_S)
        except OSError:  # a file system without locks
            return
        else:
            return


def main(argv: Sequence[str]) -> int:
    """Compile parts, or all of them."""
    parser = argparse.ArgumentParser(prog="python -m argrad_service.warming", description="Compile kernels ahead.")
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--for-image", action="store_true", help="for any processor of this one's kind")
    given = parser.parse_args(argv)
    if given.for_image:
        from argrad_service.engine.kernels import COMPILED, portable

        # numba reads these when it is imported, which may have been.
        os.environ.update(portable(), NUMBA_CACHE_DIR=str(COMPILED))
        os.execv(sys.executable, [sys.executable, "-m", "argrad_service.warming"])  # noqa: S606
    signer = TokenSigner("compiles, and signs nothing")
    store = MemoryStateStore(budget_bytes=_WHOLE_STATE_BYTES, ttl_s=60, signer=signer, clock=time.monotonic)
    operations = Operations(engine=engine, store=store, limits=Limits(), device=torch.device("cpu"))
    for part in given.parts or PARTS:
        PARTS[part](operations)
    if not given.parts:
        _mark(_marker())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

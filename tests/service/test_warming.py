"""Kernels are compiled before a service is ready: all that calls can meet, by one service of a machine at a time."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from argrad_service import warming

pytestmark = pytest.mark.anyio


def not_ready(*left_out: str) -> list[str]:
    """Kernels that calls had to wait for."""
    command = [sys.executable, "-m", "tests.service.every_kernel", *left_out]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500)
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_call_waits_for_a_compiler():
    assert not_ready() == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_part_of_the_warm_up_is_needed():
    missing = set(not_ready("few variables", "more variables", "entropy", "shared coefficients"))
    wanted = {
        "small solve_small_range",
        "batch solve_range",
        "entropic_batch solve_range",
        "shared_rows solve_shared_range",
    }
    assert wanted <= missing


class Told:
    """A log that remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def info(self, event: str, **values: Any) -> None:
        self.events.append((event, values))

    warning = info

    def said(self, event: str) -> list[dict[str, Any]]:
        return [values for name, values in self.events if name == event]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; this process's own kernels stay where they are."""
    monkeypatch.setattr(warming, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


async def test_it_is_said_what_is_compiled_and_a_second_start_compiles_nothing(cache: Path):
    log, second = Told(), Told()
    async with warming.compiling(log, threads=1) as compiled:
        for part in warming.PARTS:
            await compiled(part)
    (begun, *parts) = log.said("compiling kernels")
    assert (begun["parts"], begun["processes"], begun["cache"]) == (5, 1, str(cache))
    assert [entry["part"] for entry in parts] == list(warming.PARTS)
    assert parts[0]["number"] == "1 of 5"
    async with warming.compiling(second, threads=1) as compiled:
        await compiled("entropy")
    assert second.events == []


async def test_a_start_that_fails_leaves_the_rest_to_the_next(cache: Path):
    with pytest.raises(RuntimeError, match="no memory"):
        async with warming.compiling(Told(), threads=1):
            raise RuntimeError("no memory")
    log = Told()
    async with warming.compiling(log, threads=1):
        pass
    assert log.said("compiling kernels")
    assert len(list(cache.glob("all-*"))) == 1


async def test_two_services_do_not_compile_the_same(cache: Path):
    first, second, has_begun, may_end = Told(), Told(), asyncio.Event(), asyncio.Event()

    async def compile_first() -> None:
        async with warming.compiling(first, threads=1):
            has_begun.set()
            await may_end.wait()

    async def compile_second() -> None:
        await has_begun.wait()
        async with warming.compiling(second, threads=1):
            assert may_end.is_set()

    tasks = [asyncio.create_task(compile_first()), asyncio.create_task(compile_second())]
    await has_begun.wait()
    while not second.events:
        await asyncio.sleep(0.01)
    assert second.said("waiting for kernels")
    assert not tasks[1].done()
    may_end.set()
    await asyncio.gather(*tasks)
    assert first.said("compiling kernels")
    assert not second.said("compiling kernels")


async def test_a_cache_that_cannot_be_written_stops_nobody(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(warming, "cache_folder", lambda: Path("/proc/none"))
    log = Told()
    async with warming.compiling(log, threads=1) as compiled:
        await compiled("entropy")
    assert len(log.said("compiling kernels")) == 2


class Helpers:
    """Processes in the place of those that compile."""

    def __init__(self, program: str) -> None:
        self._program, self.started = program, 0
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __call__(self, count: int) -> dict[str, subprocess.Popen[bytes]]:
        self.started = count
        process = subprocess.Popen([sys.executable, "-c", self._program])
        self.processes = dict.fromkeys(warming.ELSEWHERE, process)
        return self.processes

    @property
    def codes(self) -> set[int | None]:
        return {process.poll() for process in self.processes.values()}


@contextlib.contextmanager
def helping(monkeypatch: pytest.MonkeyPatch, program: str) -> Iterator[Helpers]:
    helpers = Helpers(program)
    monkeypatch.setattr(warming, "_helpers", helpers)
    yield helpers
    assert None not in helpers.codes, "nobody is left behind"


async def test_what_another_process_compiles_is_waited_for(cache: Path, monkeypatch: pytest.MonkeyPatch):
    with helping(monkeypatch, "import time; time.sleep(0.5)") as helpers:
        log, began = Told(), time.monotonic()
        async with warming.compiling(log, threads=8) as compiled:
            await compiled("few variables")
            assert time.monotonic() - began < 0.4
            await compiled("entropy")
            assert helpers.codes == {0}
        assert helpers.started == len(warming.ELSEWHERE)
        assert not log.said("kernels are compiled here")


async def test_one_that_dies_is_no_loss_and_one_that_is_left_is_ended(cache: Path, monkeypatch: pytest.MonkeyPatch):
    with helping(monkeypatch, "raise SystemExit(3)"):
        log = Told()
        async with warming.compiling(log, threads=2) as compiled:
            await compiled("entropy")
        assert log.said("kernels are compiled here")[0]["reason"] == "the other process: 3"
    for stale in cache.glob("all-*"):
        stale.unlink()
    with helping(monkeypatch, "import time; time.sleep(60)"):
        with pytest.raises(asyncio.TimeoutError):
            async with asyncio.timeout(0.2), warming.compiling(Told(), threads=2) as compiled:
                await compiled("entropy")
        assert not list(cache.glob("all-*"))

"""`argrad bench`: its statistics, its loops, its document, and a run of it."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from typer.testing import CliRunner

from argrad.bench import batches
from argrad.bench.connection import Line
from argrad.bench.histogram import Histogram
from argrad.bench.load import INTERRUPTED, REST, WAITING, Tally, arrivals, measure
from argrad.bench.plan import Plan
from argrad.bench.result import ResultDocument, now, result_of
from argrad.bench.steps import Stepper, Taken
from argrad.cli import app
from argrad.errors import ConnectionFailedError, OverloadedError
from argrad.transport.address import parse_address
from argrad.transport.exchange import Answer
from tests.client.support import FakeService, listening, problem_reply

NOWHERE = "http://127.0.0.1:1"
SHARES = (1.0, 50.0, 90.0, 99.0, 99.9, 100.0)


def plan(**changes: Any) -> Plan:
    """A short measurement of one caller."""
    chosen = {"url": NOWHERE, "duration_s": 0.1, "warmup_s": 0.0}
    chosen |= {} if "rate" in changes else {"callers": 1}
    return Plan(**(chosen | changes))


class Taker:
    """Takes steps that last as long as `step`, which is given the number of the step, does."""

    def __init__(self, step: Callable[[int], Any]) -> None:
        self._step = step

    def line(self) -> Line:
        return Line(parse_address(NOWHERE), None)

    async def take(self, number: int, line: Line) -> Taken:
        await self._step(number)
        return Taken(finished_at=time.perf_counter(), calls=1, stages_ms={"solve": 0.5}, statuses=["optimal"])


def taking(seconds: float) -> Taker:
    return Taker(lambda _: asyncio.sleep(seconds))


@pytest.mark.parametrize("draw", ["lognormal", "exponential", "uniform", "integers"])
@pytest.mark.parametrize("count", [1, 7, 4567])
def test_percentiles_are_numpys_to_one_per_cent(draw: str, count: int):
    random = np.random.default_rng(3)
    drawn = {
        "lognormal": lambda: random.lognormal(-6.0, 2.0, count),
        "exponential": lambda: random.exponential(0.004, count),
        "uniform": lambda: random.uniform(1e-5, 2.0, count),
        "integers": lambda: random.integers(1, 5, count).astype(float),
    }[draw]()
    histogram = Histogram()
    for seconds in drawn:
        histogram.add(seconds)
    exact = np.percentile(drawn, SHARES, method="inverted_cdf")
    assert [histogram.percentile(share) for share in SHARES] == pytest.approx(exact, rel=0.01, abs=1e-6)
    assert histogram.percentile(100.0) == histogram.longest_s == drawn.max()
    assert histogram.mean_s == pytest.approx(drawn.mean())
    for per_octave in (1, 4):
        coarse = list(histogram.coarse(per_octave))
        assert sum(number for *_, number in coarse) == count
        assert all(one[1] == other[0] for one, other in itertools.pairwise(coarse))
        assert coarse[0][0] <= drawn.min()
        assert drawn.max() <= coarse[-1][1]


def test_an_empty_histogram_has_no_percentiles():
    assert list(Histogram().coarse(4)) == []
    with pytest.raises(ValueError, match="an empty histogram has no percentiles"):
        Histogram().percentile(50.0)


def test_arrivals_are_poisson_and_seeded():
    first, again, other = (list(itertools.islice(arrivals(250.0, seed), 5000)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    gaps = np.diff([0.0, *first])
    assert gaps.min() > 0
    # Exponential: mean and standard deviation are both 1/rate.
    assert [gaps.mean(), gaps.std()] == pytest.approx([0.004, 0.004], rel=0.06)


def test_a_stall_shows_in_an_open_loop_and_is_omitted_by_a_closed_one():
    """The service stalls for half of the time: half of those who come at random wait, and one who takes turns."""

    def stalls_once() -> Taker:
        return Taker(lambda number: asyncio.sleep(0.06 if number == 5 else 0.001))

    closed = measure(plan(duration_s=0.12), stalls_once(), lambda: None)
    opened = measure(plan(duration_s=0.12, rate=200.0, in_flight=1), stalls_once(), lambda: None)
    assert closed.latencies.percentile(75.0) < 0.03
    assert opened.latencies.percentile(90.0) > 0.03
    assert opened.stages_ms[WAITING] > 1e3 * 0.1
    assert WAITING not in closed.stages_ms


def test_every_step_that_was_due_is_counted_once():
    chosen = plan(duration_s=0.12, rate=200.0, in_flight=2, seed=7)
    due = sum(1 for _ in itertools.takewhile(lambda at: at < 0.12, arrivals(200.0, 7)))
    tally = measure(chosen, taking(0.02), lambda: None)
    assert tally.unsent > 0
    assert tally.latencies.count > 0
    assert tally.latencies.count + tally.unsent == due
    assert tally.ended <= 2 * 0.12 / 0.02 + 2
    assert tally.statuses == {"optimal": tally.latencies.count}


def test_what_waits_since_the_warm_up_is_measured_when_it_is_begun():
    tally = measure(plan(duration_s=0.1, warmup_s=0.1, rate=1000.0, in_flight=1), taking(0.01), lambda: None)
    assert tally.latencies.count > 0
    assert tally.latencies.percentile(50.0) > 0.08
    assert tally.unsent > 100


def test_callers_of_a_closed_loop_go_on_at_the_same_time():
    tally = measure(plan(callers=4), taking(0.02), lambda: None)
    assert 5 < tally.latencies.count <= 20, "one alone takes five"
    assert tally.measured_s == pytest.approx(0.1, rel=0.3)
    sums = tally.stages_ms
    assert sums["solve"] == pytest.approx(0.5 * tally.latencies.count)
    assert sum(sums.values()) == pytest.approx(1e3 * tally.latencies.total_s)


def test_failures_are_counted_by_kind_and_pause_a_closed_loop_for_as_long_as_they_say():
    refusal = OverloadedError("full", status_code=429, type="overloaded", retry_after_s=0.03)

    async def fail(number: int) -> None:
        raise refusal if number % 2 == 0 else ConnectionFailedError("nobody")

    tally = measure(plan(duration_s=0.15), Taker(fail), lambda: None)
    assert tally.errors.keys() == {"429 overloaded", "ConnectionFailedError"}
    assert sum(tally.errors.values()) <= 3, "one at 0, one at 30 ms, one at 130 ms"
    tally = measure(plan(rate=500.0), Taker(fail), lambda: None)
    assert sum(tally.errors.values()) > 20
    assert tally.latencies.count == 0
    found = result_of(plan(), tally, now())
    assert (found.steps, found.latency_ms, found.histogram, found.stages_ms) == (0, None, [], {})


def test_a_defect_of_a_step_is_raised():
    async def break_down(number: int) -> None:
        raise ZeroDivisionError("a defect")

    with pytest.raises(ZeroDivisionError, match="a defect"):
        measure(plan(), Taker(break_down), lambda: None)


def test_an_interrupt_ends_it_and_keeps_what_was_counted():
    handler = signal.getsignal(signal.SIGINT)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    began = time.perf_counter()
    tally = measure(plan(duration_s=30.0, callers=2), taking(0.01), lambda: None)
    assert time.perf_counter() - began < 5.0
    assert tally.is_interrupted
    assert tally.measured_s < 5.0
    assert tally.latencies.count >= 2
    assert tally.errors[INTERRUPTED] <= 2
    assert signal.getsignal(signal.SIGINT) is handler


def test_batches_are_the_difference_of_two_looks():
    text = (
        'argrad_batch_calls_bucket{le="1.0"} 3.0\nargrad_batch_calls_count 5.0\nargrad_batch_calls_sum 9.0\n'
        'argrad_batches_total{reason="idle"} 2.0\nargrad_batches_total{reason="freed"} 3.0\n'
    )
    before = batches.read(text)
    after = batches.read(text.replace("9.0", "29.0").replace("5.0", "9.0").replace("3.0", "7.0"))
    assert before is not None
    assert after is not None
    found = after.since(before)
    assert found == batches.Batches(calls=20.0, count=4.0, released={"idle": 0.0, "freed": 4.0})
    assert found.mean_calls == 5.0
    assert before.since(after) is None, "the service started anew"
    assert batches.read("nothing of ours") is None
    assert batches.scrape(NOWHERE, None) is None
    scraped = iter([before, after])
    assert measure(plan(duration_s=0.02), taking(0.01), lambda: next(scraped)).batches == found


def bench(*arguments: str, columns: int = 100) -> Any:
    return CliRunner().invoke(app, ("bench", *arguments), env={"ARGRAD_URL": None, "COLUMNS": str(columns)})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--url local", "--url: found 'local', wanted the address of a service"),
        ("--url ftp://x", "url: found 'ftp://x', wanted http://host:port"),
        ("--callers 0", "--callers: found 0, wanted 1 to 512"),
        ("--callers 2 --rate 5", "--callers, --rate: found both or neither, wanted one of them"),
        ("--rate 0", "--rate: found 0, wanted a finite number above 0"),
        ("--rate 5 --in-flight 9999", "--in-flight: found 9999, wanted 1 to 512"),
        ("--duration -1", "--duration: found -1, wanted a finite number above 0"),
        ("--warmup -1", "--warmup: found -1, wanted seconds, 0 or more"),
        ("--timeout-s 0", "--timeout-s: found 0, wanted a finite number above 0"),
        ("--n 0", "--n: found 0, wanted 1 or more"),
        ("--m -1", "--m: found -1, wanted 0 or more"),
        ("--n 4 --p 5", "--p: found 5, wanted 0 to 4: no more equalities than variables"),
        ("--batch 0", "--batch: found 0, wanted 1 or more"),
        ("--seed -1", "--seed: found -1, wanted 0 to 4294967295"),
        ("--step solve --gradients full", "--gradients: found 'full', wanted nothing, as --step solve asks for none"),
        ("--step fly", "'fly' is not one of 'solve', 'solve+gradient', 'solve+vjp'"),
        ("--precision half", "'half' is not one of 'float64', 'float32'"),
    ],
)
def test_bad_options_are_refused(flags: str, message: str):
    result = bench(*flags.split(), columns=200)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_nobody_answers():
    result = bench("--url", NOWHERE)
    assert result.exit_code == 1
    assert "argrad: http://127.0.0.1:1: ConnectError" in result.stderr


def test_what_the_service_refuses_is_said_before_anything_is_measured():
    with listening(FakeService(problem_reply(422, "invalid", field="solver.name", found="x", wanted="y"))) as url:
        result = bench("--url", url, "--solver", "x", "--duration", "60")
    assert result.exit_code == 1
    assert "solver.name: found x, wanted y" in result.stderr


def test_a_lost_state_is_sent_again_as_clients_do():
    with listening(FakeService(None, problem_reply(409, "state-gone"))) as url:
        stepper = Stepper(plan(url=url, step="solve+vjp"), None)

        async def take() -> Taken:
            line = stepper.line()
            try:
                return await stepper.take(0, line)
            finally:
                line.close()

        taken = asyncio.run(take())
        assert (taken.resent, taken.calls) == (True, 3)
        taken = asyncio.run(take())
        assert (taken.resent, taken.calls, taken.statuses) == (False, 2, ["optimal"])


def closing(response: Any) -> Any:
    """The reply of a service that closes its connections."""
    response.headers["connection"] = "close"
    return response


@pytest.fixture(params=["tcp", "unix", "closing"])
def fake_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    faults = [closing] * 10_000 if request.param == "closing" else []
    with listening(FakeService(*faults), tmp_path / "socket" if request.param == "unix" else None) as url:
        yield url


def test_a_short_run_on_any_kind_of_connection(fake_url: str, tmp_path: Path):
    result = bench("--url", fake_url, "--duration", "0.1", "--warmup", "0", "--callers", "2", "--n", "3", "--p", "1")
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert "closed loop, 2 callers; solve+gradient, adjoint gradients; n = 3, m = 3, p = 1, batch 1" in said
    assert "the service's /metrics could not be read" in result.stdout


def test_a_result_that_cannot_be_written_is_shown_all_the_same(fake_url: str, tmp_path: Path):
    file = tmp_path / "nowhere" / "result.json"
    result = bench("--url", fake_url, "--duration", "0.1", "--warmup", "0", "--n", "3", "--json", str(file))
    assert (result.exit_code, str(file) in result.stderr) == (1, True)
    assert "closed loop, 8 callers" in " ".join(result.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--callers 3", "--rate 40 --step solve", "--rate 40 --step solve+vjp --batch 2"])
def test_a_run_against_a_service(service_url: str, tmp_path: Path, flags: str):
    file = tmp_path / "result.json"
    result = bench("--url", service_url, "--duration", "0.5", "--warmup", "0.1", "--json", str(file), *flags.split())
    assert result.exit_code == 0, result.output
    for words in ("steps/s", "calls a batch", "p99.9", "█", "queue", REST):
        assert words in result.stdout
    document = json.loads(file.read_text())
    jsonschema.validate(document, ResultDocument.model_json_schema())
    found = ResultDocument.model_validate(document)
    assert found.latency_ms is not None
    assert found.batches is not None
    assert found.batches.batches > 0
    assert sum(found.batches.released.values()) == found.batches.batches
    assert {"read", "decode", "queue", "solve", "encode", REST} <= set(found.stages_ms)
    assert ("differentiate" in found.stages_ms) == (found.load.step != "solve")
    assert sum(found.stages_ms.values()) == pytest.approx(found.latency_ms.mean)
    assert min(found.stages_ms.values()) >= 0
    assert sum(bucket.steps for bucket in found.histogram) == found.steps > 0
    assert found.problems == {"optimal": found.steps * found.load.batch}
    calls = 2 if found.load.step == "solve+vjp" else 1
    assert found.calls_per_s == pytest.approx(calls * found.steps_per_s)
    assert found.problems_per_s == pytest.approx(found.load.batch * found.steps_per_s)
    assert (found.errors, found.unsent, found.resent) == ({}, 0, 0)
    assert found.latency_ms.p50 <= found.latency_ms.p90 <= found.latency_ms.p99 <= found.latency_ms.max


@pytest.mark.slow
def test_json_alone_on_standard_output(service_url: str):
    result = bench("--url", service_url, "--duration", "0.2", "--warmup", "0", "--precision", "float32", "--json", "-")
    assert json.loads(result.stdout)["load"]["precision"] == "float32"


def test_a_tally_without_time_has_no_rates():
    found = result_of(plan(), Tally(is_interrupted=True), now())
    assert (found.steps_per_s, found.client_cores, found.is_interrupted) == (0.0, 0.0, True)


def test_exchanges_are_what_the_service_says_of_itself():
    taken = Taken()
    for words in ("read;dur=0.5, solve;dur=2", "solve;dur=1.25", ""):
        taken.note(Answer(200, {"server-timing": words}, b""), 7.0)
    assert (taken.calls, taken.finished_at, taken.stages_ms) == (3, 7.0, {"read": 0.5, "solve": 3.25})

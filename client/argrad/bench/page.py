"""A result for people: a few lines, bars, and tables."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from argrad.bench.load import REST, WAITING
from argrad.bench.result import BucketDocument, LoadDocument, ResultDocument

_BAR = 40
_MOST_ROWS = 24
_BUSY_CORES = 0.85
_WORDS = {"p99_9": "p99.9"}
_ORDER = (WAITING, "read", "decode", "queue", "solve", "differentiate", "encode", REST)


def show(result: ResultDocument, console: Console) -> None:
    """Print a result."""
    console.print(Text(_headline(result.load), style="bold"))
    if not result.measured_s:
        console.print(Text("interrupted during the warm-up: nothing was measured", style="yellow"))
        return
    for line in _rates(result):
        console.print(line, highlight=False)
    for warning in _warnings(result):
        console.print(Text(warning, style="yellow"))
    if result.latency_ms is None:
        return
    latency = result.latency_ms.model_dump()
    percentiles = Table(*(_WORDS.get(name, name) for name in latency), title="latency of a step, ms", box=box.SIMPLE)
    percentiles.add_row(*(_shown(ms) for ms in latency.values()))
    console.print(percentiles)
    buckets = _at_most(result.histogram, _MOST_ROWS)
    most = max(bucket.steps for bucket in buckets)
    for bucket in buckets:
        bar = "█" * round(_BAR * bucket.steps / most) or ("▏" if bucket.steps else "")
        edges = f"{_shown(bucket.least_ms):>7} – {_shown(bucket.most_ms):<7}"
        console.print(f"{edges} {bucket.steps:>7} {bar}", highlight=False)
    console.print(_stages(result))


def _headline(load: LoadDocument) -> str:
    if load.loop == "closed":
        how = f"closed loop, {load.callers} caller{'s' if load.callers != 1 else ''}"
    else:
        how = f"open loop, {load.rate_per_s:g} steps/s, at most {load.in_flight} at once"
    size = f"n = {load.n}, m = {load.m}, p = {load.p}, batch {load.batch}"
    form = "" if load.gradients is None else f", {load.gradients} gradients"
    return f"{load.url}: {how}; {load.step}{form}; {size}; {load.solver}, {load.method}, {load.precision}"


def _rates(result: ResultDocument) -> Iterator[str]:
    yield (
        f"{_shown(result.steps_per_s)} steps/s, {_shown(result.calls_per_s)} calls/s, "
        f"{_shown(result.problems_per_s)} problems/s over {result.measured_s:.1f} s ({result.steps} steps)"
    )
    if result.batches is not None:
        reasons = ", ".join(f"{reason} {number}" for reason, number in result.batches.released.items() if number)
        yield f"{result.batches.mean_calls:.2f} calls a batch; {result.batches.batches} batches ({reasons or 'none'})"
    else:
        yield "batches: the service's /metrics could not be read"
    if result.resent:
        yield f"{result.resent} steps sent problem and solution again: their state was gone"
    yield f"this process used {result.client_cores:.2f} of a core"


def _warnings(result: ResultDocument) -> Iterator[str]:
    if result.is_interrupted:
        yield "interrupted: this is what was measured until then"
    if not result.steps:
        yield "no step ended well"
    if result.errors:
        yield "failed steps: " + ", ".join(f"{kind} {number}" for kind, number in sorted(result.errors.items()))
    if failed := {status: number for status, number in result.problems.items() if status != "optimal"}:
        yield "problems: " + ", ".join(f"{status} {number}" for status, number in sorted(failed.items()))
    if result.unsent:
        yield (
            f"{result.unsent} steps were due and never begun, as {result.load.in_flight} were in flight: "
            "the service cannot keep this rate, and the true latencies are longer than those below"
        )
    if result.client_cores > _BUSY_CORES:
        yield "this process was near what one core can do: the figures say as much of it as of the service"


def _stages(result: ResultDocument) -> Table:
    total = sum(result.stages_ms.values())
    table = Table("stage", "ms a step", "share", title="where a step's time goes", box=box.SIMPLE)
    table.columns[1].justify = table.columns[2].justify = "right"
    for name in sorted(result.stages_ms, key=lambda name: _ORDER.index(name) if name in _ORDER else 0):
        ms = result.stages_ms[name]
        table.add_row(name, _shown(ms), f"{ms / total:.0%}")
    return table


def _at_most(buckets: list[BucketDocument], rows: int) -> list[BucketDocument]:
    """Neighbours merged until there are few enough."""
    while len(buckets) > rows:
        pairs = [buckets[i : i + 2] for i in range(0, len(buckets), 2)]
        buckets = [
            BucketDocument(least_ms=pair[0].least_ms, most_ms=pair[-1].most_ms, steps=sum(one.steps for one in pair))
            for pair in pairs
        ]
    return buckets


def _shown(number: float) -> str:
    """Three digits, and no exponents."""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}" if abs(number) >= 1e-3 else f"{number:.1g}"

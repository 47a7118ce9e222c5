"""The result of a measurement as a document: what `--json` writes."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

from argrad._version import __version__
from argrad.bench.load import Tally
from argrad.bench.plan import Plan, StepKind
from argrad.wire.messages import Gradients, Precision

PER_OCTAVE = 4
_PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99_9": 99.9, "max": 100.0}


class Document(BaseModel):
    """What every part of the result has."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LoadDocument(Document):
    """What was asked for; see `argrad.bench.plan.Plan`."""

    url: str
    loop: Literal["closed", "open"]
    callers: int | None
    rate_per_s: float | None
    in_flight: int | None
    duration_s: float
    warmup_s: float
    timeout_s: float
    n: int
    m: int
    p: int
    batch: int
    step: StepKind
    gradients: Gradients | None
    solver: str
    method: str
    precision: Precision
    seed: int


class LatencyDocument(Document):
    """Milliseconds from the moment at which a step was due to its last reply; percentiles within 1 %."""

    mean: float
    p50: float
    p90: float
    p99: float
    p99_9: float
    max: float


class BucketDocument(Document):
    """Steps whose latency lay between these milliseconds."""

    least_ms: float
    most_ms: float
    steps: int


class BatchesDocument(Document):
    """What the service solved together while it was measured, other callers' calls included."""

    batches: int
    mean_calls: float
    released: dict[str, int]


class ResultDocument(Document):
    """Outcome of one `argrad bench`.

    Args:
        version: Of this form.
        argrad: Version of the client.
        began: When, as ISO 8601.
        load: What was asked for.
        measured_s: Seconds that were measured; fewer than asked for if it was interrupted.
        is_interrupted: Whether it was.
        steps: Steps that were begun in that time and ended well.
        steps_per_s: Steps that ended well in that time, a second,
        calls_per_s: and their calls,
        problems_per_s: and their problems.
        latency_ms: Of the steps; None without any.
        histogram: Of their latencies, without gaps.
        stages_ms: Mean of a step, by stage; they add up to its mean latency.
        problems: Problems by status; `no gradient: …` counts those that lack one.
        errors: Steps that failed, by HTTP status and problem type or by exception.
        unsent: Steps that were due by the end and never begun, as too many were in flight.
        resent: Steps whose state the service had lost.
        batches: None if the service's metrics cannot be read.
        client_cores: Processor time of this process a second: near 1 the load was as much as one process can make.
    """

    version: Literal[1] = 1
    argrad: str = __version__
    began: str
    load: LoadDocument
    measured_s: float
    is_interrupted: bool
    steps: int
    steps_per_s: float
    calls_per_s: float
    problems_per_s: float
    latency_ms: LatencyDocument | None
    histogram: list[BucketDocument]
    stages_ms: dict[str, float]
    problems: dict[str, int]
    errors: dict[str, int]
    unsent: int
    resent: int
    batches: BatchesDocument | None
    client_cores: float


def now() -> str:
    """This moment, as the document has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def result_of(plan: Plan, tally: Tally, began: str) -> ResultDocument:
    """What a measurement found.

    Args:
        plan: What was asked for.
        tally: What came of it.
        began: When it began.
    """
    seconds, steps = tally.measured_s, tally.latencies.count
    per_s = 1.0 / seconds if seconds > 0 else 0.0
    return ResultDocument(
        began=began,
        load=_load_of(plan),
        measured_s=seconds,
        is_interrupted=tally.is_interrupted,
        steps=steps,
        steps_per_s=tally.ended * per_s,
        calls_per_s=tally.calls * per_s,
        problems_per_s=tally.ended * plan.batch * per_s,
        latency_ms=_latency_of(tally),
        histogram=[
            BucketDocument(least_ms=1e3 * least, most_ms=1e3 * most, steps=count)
            for least, most, count in tally.latencies.coarse(PER_OCTAVE)
        ],
        stages_ms={name: ms / steps for name, ms in tally.stages_ms.items()},
        problems=dict(tally.statuses),
        errors={kind: count for kind, count in tally.errors.items() if count},
        unsent=tally.unsent,
        resent=tally.resent,
        batches=_batches_of(tally),
        client_cores=tally.client_s * per_s,
    )


def _load_of(plan: Plan) -> LoadDocument:
    return LoadDocument(
        url=plan.url,
        loop="closed" if plan.rate is None else "open",
        callers=plan.callers,
        rate_per_s=plan.rate,
        in_flight=None if plan.rate is None else plan.in_flight,
        duration_s=plan.duration_s,
        warmup_s=plan.warmup_s,
        timeout_s=plan.timeout_s,
        n=plan.n,
        m=plan.m,
        p=plan.p,
        batch=plan.batch,
        step=plan.step,
        gradients=None if plan.step == "solve" else plan.gradient_form,
        solver=plan.options.solver,
        method=plan.options.method,
        precision=plan.options.precision,
        seed=plan.seed,
    )


def _latency_of(tally: Tally) -> LatencyDocument | None:
    latencies = tally.latencies
    if not latencies.count:
        return None
    found = {name: 1e3 * latencies.percentile(per_cent) for name, per_cent in _PERCENTILES.items()}
    return LatencyDocument(mean=1e3 * latencies.mean_s, **found)


def _batches_of(tally: Tally) -> BatchesDocument | None:
    found = tally.batches
    if found is None:
        return None
    released = {reason: round(number) for reason, number in found.released.items()}
    return BatchesDocument(batches=round(found.count), mean_calls=found.mean_calls, released=released)

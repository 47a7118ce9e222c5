"""What an operator sees: metrics of stages, solvers and memory, and spans for those who collect them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator

import httpx
import pytest
import torch
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client import Histogram as Reference
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

import argrad
from argrad.errors import MissingExtraError
from argrad.transport.tracing import traceparent
from argrad.wire.messages import SolveReply, SolveRequest
from argrad_service import engine
from argrad_service.app import create_app
from argrad_service.http.iterations import BOUNDS, Iterations
from argrad_service.http.logs import make_logger
from argrad_service.http.series import Counts, Histogram
from argrad_service.http.tracing import Tracing
from argrad_service.settings import Settings
from tests.service.support import HookedEngine, make_app, post, projection, running_app, serving, simplex, wait_until

pytestmark = pytest.mark.anyio

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def text_of(*series: Collector) -> list[str]:
    """What a scrape shows of some series, without the moment at which they began."""
    registry = CollectorRegistry()
    for one in series:
        registry.register(one)
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


def test_series_say_what_the_library_s_own_say() -> None:
    bounds, values = (0.1, 0.5, 2), (0.0, 0.1, 0.11, 0.5, 1.0, 2.0, 2.5, 100.0)
    own, theirs = (
        Histogram("took_seconds", "How long.", ["route"], bounds),
        Reference("took_seconds", "How long.", ["route"], buckets=bounds, registry=None),
    )
    counts, counter = (
        Counts("calls", "How many.", ["route", "status"]),
        Counter("calls", "How many.", ["route", "status"]),
    )
    for route in ("/a", '/b"\n'):
        for value in values:
            own.observe((route,), value)
            theirs.labels(route).observe(value)
            counts.add((route, "200"))
            counter.labels(route, "200").inc()
        counts.add((route, "429"), 2.5)
        counter.labels(route, "429").inc(2.5)
    assert text_of(own, counts) == text_of(theirs, counter)
    assert 'took_seconds_bucket{le="0.5",route="/a"} 4.0' in text_of(own)


async def scrape(client: httpx.AsyncClient) -> Samples:
    """Every sample of /metrics, by name and labels."""
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


async def test_each_stage_of_a_call_is_timed(client: httpx.AsyncClient):
    await client.post("/v1/solve", json={"problem": simplex(), "upstream": {"z": [1, 0]}, "wrt": ["q"]})
    samples = await scrape(client)
    for stage in ("read", "decode", "queue", "solve", "differentiate", "encode"):
        labels = (("route", "/v1/solve"), ("stage", stage))
        assert samples["argrad_stage_seconds_count", labels] == 1, stage
        assert 0 < samples["argrad_stage_seconds_sum", labels] < 10, stage


async def test_iterations_are_counted_by_problem(client: httpx.AsyncClient):
    await client.post("/v1/solve", json={"problem": simplex()})
    _, out = await post(client, "/v1/solve", SolveRequest(), projection((-1, 1), (1, 1), (1, -2)), SolveReply)
    reply = await client.post("/v1/solve", json={"problem": simplex(), "solver": {"name": "pdipm"}})
    samples = await scrape(client)
    labels = (("solver", "pivoting"),)
    assert samples["argrad_solver_iterations_count", labels] == 4
    first = (await client.post("/v1/solve", json={"problem": simplex()})).json()["report"]["iterations"]
    assert samples["argrad_solver_iterations_sum", labels] == first + int(out["report.iterations"].sum())
    own = (("solver", "pdipm"),)
    assert samples["argrad_solver_iterations_sum", own] == reply.json()["report"]["iterations"] > 1


@pytest.mark.parametrize("shape", [(), (1,), (7,)])
def test_a_batch_is_classed_as_its_problems_are_one_by_one(shape: tuple[int, ...]):
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 20_000, shape, generator=generator)
    numbers.flatten()[:1] = BOUNDS[3]  # on a bound: in the class below it
    together, alone = Iterations(), Iterations()
    together.count("s", numbers)
    for number in numbers.flatten():
        alone.count("s", number)
    (one,), (other,) = together.collect(), alone.collect()
    assert one.samples == other.samples
    by_bound = {s.labels.get("le"): s.value for s in one.samples}
    assert by_bound[str(float(BOUNDS[3]))] - by_bound[str(float(BOUNDS[2]))] >= 1


async def test_calls_are_counted_where_they_are():
    entered, go_on = threading.Event(), threading.Event()

    def wait(_: object) -> None:
        if is_armed.is_set():
            entered.set()
            assert go_on.wait(20)

    is_armed = threading.Event()
    app = make_app(engine_=HookedEngine(wait), batching=False)
    with serving(app) as url:
        is_armed.set()
        size = 4096
        slow = httpx.Client(base_url=url, trust_env=False)

        def unfinished() -> Iterator[bytes]:
            yield b"{"
            assert go_on.wait(20)
            yield b" " * (size - 1)

        threads = [
            threading.Thread(target=httpx.post, args=(f"{url}/v1/solve",), kwargs={"json": {"problem": simplex()}})
            for _ in range(2)
        ]
        threads.append(
            threading.Thread(
                target=httpx.post,
                args=(f"{url}/v1/solve",),
                kwargs={
                    "content": unfinished(),
                    "headers": {"content-length": str(size), "content-type": "application/json"},
                },
            )
        )
        for thread in threads:
            thread.start()
        assert entered.wait(20)

        def phases() -> dict[str, float]:
            families = text_string_to_metric_families(slow.get("/metrics").text)
            return {
                s.labels["phase"]: s.value for f in families for s in f.samples if s.name == "argrad_calls_in_flight"
            }

        wait_until(lambda: phases() == {"read": 1, "decode": 0, "encode": 0, "queue": 1, "solve": 1})
        go_on.set()
        for thread in threads:
            thread.join(20)
        wait_until(lambda: sum(phases().values()) == 0)
        slow.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the process's memory is read from /proc")
async def test_memory_of_the_process_is_what_the_system_says(client: httpx.AsyncClient):
    samples = await scrape(client)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    assert samples["process_resident_memory_bytes", ()] == pytest.approx(pages * 4096, rel=0.1)
    assert samples["process_open_fds", ()] > 0
    assert not any(name == "argrad_device_memory_bytes" for name, _ in samples) or torch.cuda.is_initialized()


# Spans.


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


async def traced(spans: InMemorySpanExporter, log: io.StringIO, *calls: dict) -> list[ReadableSpan]:
    """The spans of some calls, in the order of their beginnings."""
    settings = Settings.model_validate({"log_format": "json", "device": "cpu"})
    app = create_app(settings, engine=engine, log=make_logger(settings, log), tracing=Tracing(spans))
    async with running_app(app) as client:
        for call in calls:
            await client.request(**call)
    return sorted(spans.get_finished_spans(), key=lambda span: (span.start_time, span.kind is not SpanKind.SERVER))


async def test_a_request_is_a_span_with_its_stages_as_children(spans: InMemorySpanExporter):
    log = io.StringIO()
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    call = {
        "method": "POST",
        "url": "/v1/solve",
        "json": {"problem": simplex(), "upstream": {"z": [1, 0]}, "wrt": ["q"]},
        "headers": {"traceparent": f"00-{trace_id}-{parent_id}-01", "x-request-id": "mine"},
    }
    root, *stages = await traced(spans, log, call)
    assert (root.name, root.kind) == ("POST /v1/solve", SpanKind.SERVER)
    assert f"{root.context.trace_id:032x}" == trace_id
    assert f"{root.parent.span_id:016x}" == parent_id
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["argrad.request_id"] == "mine"
    assert root.attributes["argrad.problems"] == 1
    assert root.status.status_code is StatusCode.UNSET
    assert root.resource.attributes["service.name"] == "argrad"
    assert [stage.name for stage in stages] == ["read", "decode", "queue", "solve", "differentiate", "encode"]
    for stage, following in zip(stages, [*stages[1:], None], strict=True):
        assert stage.parent.span_id == root.context.span_id
        assert root.start_time <= stage.start_time <= stage.end_time <= root.end_time
        assert following is None or stage.end_time <= following.start_time + 1_000_000, "at most a millisecond over"
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    (line,) = [line for line in lines if line.get("request_id") == "mine"]
    assert line["trace_id"] == trace_id


async def test_without_a_parent_each_request_is_a_trace_of_its_own_and_probes_are_none(spans: InMemorySpanExporter):
    refused = {"method": "POST", "url": "/v1/solve", "json": {"problem": {"kind": "qp", "q": [[1, 2]], "Q": 3}}}
    roots = await traced(spans, io.StringIO(), refused, {"method": "GET", "url": "/v1/solvers"})
    roots = [span for span in roots if span.kind is SpanKind.SERVER]
    assert [span.name for span in roots] == ["POST /v1/solve", "GET /v1/solvers"], "and none of /health/ready"
    assert len({span.context.trace_id for span in roots}) == 2
    assert all(span.parent is None for span in roots)
    assert roots[0].attributes["error.type"] in {"invalid", "bad-request"}
    assert roots[0].status.status_code is StatusCode.UNSET, "the caller's mistake is no error of the server"


async def test_a_trace_that_is_not_sampled_is_not_exported(spans: InMemorySpanExporter):
    headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"}
    call = {"method": "GET", "url": "/v1/solvers", "headers": headers}
    assert await traced(spans, io.StringIO(), call) == []


def test_the_client_hands_on_the_active_span_and_nothing_without_one(spans: InMemorySpanExporter):
    assert traceparent() is None
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    seen: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("traceparent"))
        return httpx.Response(200, json={"solvers": [], "methods": []})

    with argrad.Client("http://argrad", transport=httpx.MockTransport(answer)) as client:
        client.solvers()
        with tracer.start_as_current_span("step") as span:
            client.solvers()
    context = span.get_span_context()
    assert seen == [None, f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"]


@pytest.mark.parametrize(
    ("script", "package"),
    [
        ("import argrad, argrad.nn", "opentelemetry"),
        # The framework has uses of its own for OpenTelemetry's interface; what implements it is what costs.
        ("from argrad_service import app, settings as s; app.create_app(s.Settings())", "opentelemetry.sdk"),
    ],
    ids=["client", "service"],
)
def test_opentelemetry_is_not_imported_unless_it_is_asked_for(script: str, package: str):
    script += f"; import sys; print(sorted(name for name in sys.modules if name.startswith({package!r})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_missing_extra_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "argrad_service.http.tracing", None)
    with pytest.raises(MissingExtraError, match=r"ARGRAD_OTLP_ENDPOINT needs .* pip install 'argrad\[otel\]'"):
        make_app(otlp_endpoint="http://127.0.0.1:4318")


async def test_spans_reach_a_collector_by_http():
    received: list[tuple[str, str, bytes]] = []

    async def collector(scope, receive, send):
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if scope["method"] == "POST":
            received.append((scope["path"], dict(scope["headers"])[b"content-type"].decode(), body))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    with serving(collector) as url:
        async with running_app(make_app(otlp_endpoint=f"{url}/")) as client:
            await client.get("/v1/solvers")
    ((path, content_type, body),) = received
    assert (path, content_type) == ("/v1/traces", "application/x-protobuf")
    assert b"GET /v1/solvers" in body

"""Several workers behind one socket: their shares, their metrics, their ends."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from argrad_service import server, workers
from argrad_service.settings import SettingsError, load_settings
from argrad_service.totals import Totals
from argrad_service.workers import divided
from tests.conftest import running_service
from tests.service.support import SECRET, simplex, wait_until

REDIS = "redis://127.0.0.1:1"  # nobody listens there: each worker then shares nothing, and solves

FIRST = """\
# HELP calls_total Calls.
# TYPE calls_total counter
calls_total{route="/a"} 3.0
calls_total{route="/b"} 1.0
# HELP calls_created Calls.
# TYPE calls_created gauge
calls_created{route="/a"} 1.7e9
# HELP held Held.
# TYPE held gauge
held 5.0
# HELP seconds Seconds.
# TYPE seconds histogram
seconds_bucket{le="1.0"} 1.0
seconds_bucket{le="+Inf"} 2.0
seconds_count 2.0
seconds_sum 7.5
"""


def test_a_worker_takes_its_part():
    settings = load_settings(workers=3, redis_url=REDIS, state_secret=SECRET, max_queue=10, state_budget_bytes=1000)
    part = divided(settings.model_copy(update={"torch_threads": 7}))
    assert (part.max_queue, part.state_budget_bytes, part.torch_threads) == (4, 333, 2)
    assert part.max_body_bytes == settings.max_body_bytes, "a limit of one call is no budget"
    assert part.state_secret == settings.state_secret
    assert divided(settings.model_copy(update={"torch_threads": 1})).torch_threads == 1


def test_a_worker_has_its_part_of_the_threads(monkeypatch: pytest.MonkeyPatch):
    given: list[int] = []
    monkeypatch.setattr(server, "use_threads", given.append)
    monkeypatch.setattr(server, "create_app", lambda *_, **__: SimpleNamespace(state=MagicMock()))
    monkeypatch.setattr(server, "_run", lambda *_: None)
    monkeypatch.setattr(server.os, "setpgid", lambda *_: None)
    settings = load_settings(workers=2, redis_url=REDIS, state_secret=SECRET, torch_threads=8)
    server._work(divided(settings), [], MagicMock(), 0)
    assert given == [4]


def test_without_a_setting_workers_divide_the_cores_of_the_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workers, "threads", lambda: 6)
    settings = load_settings(workers=3, redis_url=REDIS, state_secret=SECRET)
    assert divided(settings).torch_threads == 2


def test_more_than_one_needs_redis():
    with pytest.raises(SettingsError, match=r"ARGRAD_WORKERS is 2, and there is no ARGRAD_REDIS_URL: .* replicas"):
        load_settings(workers=2)


def test_totals_are_sums_and_do_not_fall_when_a_worker_is_replaced():
    totals = Totals()
    totals.note(0, FIRST)
    totals.note(1, FIRST)
    before = totals.render().decode()
    assert 'calls_total{route="/a"} 6.0' in before
    assert "held 10.0" in before
    assert 'seconds_bucket{le="+Inf"} 4.0' in before
    assert "seconds_sum 15.0" in before
    assert "_created" not in before
    totals.retire(0)
    totals.note(0, FIRST.replace("3.0", "1.0").replace("held 5.0", "held 1.0"))
    after = totals.render().decode()
    assert 'calls_total{route="/a"} 7.0' in after
    assert "held 6.0" in after, "what is held now is no sum over the past"


def value(url: str, name: str, **labels: str) -> float:
    text = httpx.get(f"{url}/metrics", trust_env=False, timeout=20).text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


@pytest.mark.slow
def test_workers_share_an_address_are_counted_together_and_replaced(tmp_path: Path):
    log = tmp_path / "log"
    settings = {"ARGRAD_REDIS_URL": REDIS, "ARGRAD_STATE_SECRET": SECRET, "ARGRAD_LOG_FORMAT": "json"}
    with running_service(log, "--workers", "2", **settings) as (url, process):
        wait_until(lambda: value(url, "argrad_workers_alive") == 2, 60)
        assert re.search(r"^argrad \S+ on http://127.0.0.1:\d+ \(cpu, \d+ threads, 2 workers\)$", log.read_text(), re.M)
        workers = set()
        missed = 0
        for _ in range(200):  # each on a connection of its own, which either may accept
            reply = httpx.post(f"{url}/v1/solve", json={"problem": simplex()}, trust_env=False, timeout=60)
            assert reply.json()["status"] == "optimal"
            pull = {"state": reply.json()["state"], "upstream": {"z": [1, 0]}}
            back = httpx.post(f"{url}/v1/vjp", json=pull, trust_env=False, timeout=60)
            missed += back.status_code == 409
            assert back.status_code == 200 or back.json()["type"] == "state-gone"
            lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
            workers = {line["worker"] for line in lines if line.get("route") == "/v1/solve"}
            if len(workers) == 2 and missed:
                break
        assert workers == {0, 1}
        solved = sum(line.get("route") == "/v1/solve" for line in lines)
        assert value(url, "argrad_requests_total", route="/v1/solve", status="200") == solved
        assert value(url, "argrad_affinity_misses_total") == missed > 0

        children = psutil.Process(process.pid).children()
        victim = next(child for child in children if "spawn_main" in " ".join(child.cmdline()))
        victim.kill()
        wait_until(lambda: value(url, "argrad_worker_restarts_total") == 1)
        wait_until(lambda: value(url, "argrad_workers_alive") == 2, 60)
        assert value(url, "argrad_requests_total", route="/v1/solve", status="200") >= solved
        assert httpx.post(f"{url}/v1/solve", json={"problem": simplex()}, trust_env=False).status_code == 200
        assert '"event": "worker ended"' in log.read_text()

        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
        wait_until(lambda: not any(child.is_running() for child in children))
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_workers_do_not_outlive_who_watches_them(tmp_path: Path):
    settings = {"ARGRAD_REDIS_URL": REDIS, "ARGRAD_STATE_SECRET": SECRET}
    with running_service(tmp_path / "log", "--workers", "2", **settings) as (url, process):
        wait_until(lambda: value(url, "argrad_workers_alive") == 2, 60)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        until = time.monotonic() + 30
        while time.monotonic() < until and any(child.is_running() for child in children):
            time.sleep(0.1)
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
        with contextlib.suppress(httpx.TransportError):
            assert httpx.get(url, trust_env=False).status_code != 200

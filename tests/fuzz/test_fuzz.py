"""A short run of every target of `make fuzz`, and proof that each of them can find something."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from argrad.wire import JSON, SAFETENSORS, codec
from argrad.wire import json as json_codec
from argrad_service.http import envelope, exchange, guard, registration
from argrad_service.http.protocol import GuardedProtocol
from tests.fuzz import __main__ as main_module
from tests.fuzz import api, calls, framing, keys, tally
from tests.fuzz import codec as codec_target
from tests.fuzz.tally import Tally

pytestmark = pytest.mark.slow

RUNS: dict[str, tuple[Callable[[], Tally], int]] = {
    "JSON requests": (lambda: codec_target.fuzz_messages(JSON, 4000, 1), 100),
    "binary requests": (lambda: codec_target.fuzz_messages(SAFETENSORS, 4000, 2), 100),
    "JSON replies": (lambda: codec_target.fuzz_messages(JSON, 1000, 3, of_replies=True), 50),
    "binary replies": (lambda: codec_target.fuzz_messages(SAFETENSORS, 1000, 4, of_replies=True), 50),
    "frames of zstd": (lambda: codec_target.fuzz_frames(2000, 5), 4),
    "calls": (lambda: calls.fuzz_calls(600, 6), 100),
    "calls with keys": (lambda: keys.fuzz_keys(300, 9), 50),
    "framing": (lambda: framing.fuzz_framing(400, 7), 10),
    "framing with keys": (lambda: framing.fuzz_framing(100, 10, with_keys=True), 8),
    "openapi": (lambda: api.fuzz_api(1, 8, ("examples", "fuzzing", "stateful")), 15),
    "openapi, no key": (lambda: api.fuzz_api(1, 11, ("examples", "fuzzing"), who="no key"), 10),
}


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_found(name: str):
    run, least_behaviours = RUNS[name]
    tallied = run()
    assert list(tallied.findings.values()) == []
    assert len(tallied.behaviours) >= least_behaviours, "it goes round in circles"


def test_an_exception_that_decoding_does_not_document_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(json_codec, "_NON_FINITE", {})  # an IndexError of a lookup, as a defect might have it
    monkeypatch.setattr(json_codec, "_is_number", lambda _: True)
    assert codec_target.fuzz_messages(JSON, 500, 0).findings


def test_a_reading_that_is_not_its_own_writing_is_found(monkeypatch: pytest.MonkeyPatch):
    right = json_codec._to_tensor
    monkeypatch.setattr(json_codec, "_to_tensor", lambda name, value: right(name, value) + 1)
    findings = codec_target.fuzz_messages(JSON, 500, 0).findings
    assert any("not what its own writing reads as" in words for words in findings.values())


def test_a_hang_is_found(monkeypatch: pytest.MonkeyPatch):
    def spin(*_: Any, **__: Any) -> None:
        while True:
            pass

    monkeypatch.setattr(codec_target, "MOST_CPU_S", 0.05)
    monkeypatch.setattr(codec.safetensors, "header_of", spin)
    tallied = codec_target.fuzz_messages(SAFETENSORS, 3, 0)
    assert tallied.outcomes["hang"] == 3


def test_a_defect_of_the_application_is_found(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(exchange.Exchange, "_timeout_s", fail)
    monkeypatch.setattr(registration, "_name", fail)
    findings = calls.fuzz_calls(30, 0).findings
    assert any("a defect: 500" in words for words in findings.values())


def test_a_connection_that_stays_open_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(framing, "MOST_S", 1.5)
    monkeypatch.setattr(GuardedProtocol, "_start_clock", lambda _: None)
    assert framing.fuzz_framing(60, 0).outcomes["hang"]


@pytest.mark.parametrize("target", ["calls", "framing", "openapi"])
def test_a_route_that_asks_for_no_key_is_found(monkeypatch: pytest.MonkeyPatch, target: str):
    monkeypatch.setattr(guard, "OPEN", {*guard.OPEN, "/v1/solve", "/v1/solvers", "/metrics"})
    run: dict[str, Callable[[], Tally]] = {
        "calls": lambda: keys.fuzz_keys(60, 0),
        "framing": lambda: framing.fuzz_framing(60, 0, with_keys=True),
        "openapi": lambda: api.fuzz_api(1, 0, ("examples",), who="wrong key"),
    }
    findings = list(run[target]().findings.values())
    assert any("not 401" in words or "without a key" in words for words in findings), findings


def test_a_key_that_is_not_served_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(keys, "KEYS", keys.KEYS.replace("0", "1"))
    assert any("a key that is refused" in words for words in keys.fuzz_keys(20, 0).findings.values())


def test_a_key_in_the_log_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(envelope, "_route", lambda scope: str(scope["headers"]))
    assert "a key is in the log" in keys.fuzz_keys(20, 0).findings.values()


def test_a_run_of_too_few_inputs_or_with_an_idle_target_is_not_passed(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(sys, "argv", ["make fuzz"])
    for counts, words in (((199_999, 0), "idle: ['1']"), ((199_998, 1), "idle: []"), ((199_999, 1), "")):
        tallies = [Tally(str(i), inputs=count) for i, count in enumerate(counts)]
        monkeypatch.setattr(main_module, "run", lambda *_, tallies=tallies: tallies)
        assert main_module.main() == bool(words)
        assert words in capsys.readouterr().out


def test_a_status_that_the_document_does_not_have_is_found(monkeypatch: pytest.MonkeyPatch):
    answer = calls.Answer(404, {"content-type": calls.PROBLEM, "x-request-id": "r"}, b"", 1)
    problem = {"type": "gone", "title": "t", "status": 404, "detail": "d", "request_id": "r"}
    answer.body = json.dumps(problem).encode()
    assert calls.judge(answer, {200}, {"gone"}) == "a status that is not documented"
    assert calls.judge(answer, {404}, {"other"}) == "a type that is not documented"
    assert calls.judge(answer, {404}, {"gone"}) is None


def test_the_table_has_a_row_a_target():
    tallied = Tally("one", inputs=3)
    tallied.outcomes["read"] = 3
    tallied.find(b"x", "wrong")
    lines = tally.table([tallied]).splitlines()
    assert lines[1].split() == ["one", "3", "0.0", "0.0", "0", "1", "3", "read"]
    assert threading.current_thread() is threading.main_thread(), "where the clock of an input rings"

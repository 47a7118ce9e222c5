from __future__ import annotations

import io
import json
import logging
import re

from argrad_service.http.logs import Forwarded, make_logger
from argrad_service.settings import Settings


def logged(level: str = "info", **settings: str) -> tuple[object, io.StringIO]:
    stream = io.StringIO()
    return make_logger(Settings.model_validate({"log_level": level, **settings}), stream), stream


def test_a_line_for_people():
    log, stream = logged()
    log.info("request", route="/v1/solve", ms=1.5, type=None)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT[\d:.]+Z info    request route=/v1/solve ms=1.5 type=None\n", stream.getvalue()
    )


def test_no_value_can_fake_a_line():
    log, stream = logged()
    log.info("request", detail="one\n2026-01-01T00:00:00Z error forged", path="a b")
    assert stream.getvalue().count("\n") == 1
    assert r"detail='one\n2026-01-01T00:00:00Z error forged' path='a b'" in stream.getvalue()


def test_a_line_for_machines_with_its_traceback():
    log, stream = logged(log_format="json")
    try:
        raise ValueError("wrong")
    except ValueError as error:
        log.error("defect", request_id="r", exc_info=error)
    line = json.loads(stream.getvalue())
    assert (line["event"], line["level"], line["request_id"]) == ("defect", "error", "r")
    assert line["exception"][0]["exc_value"] == "wrong"


def test_what_is_no_unicode_is_spelt_out():
    for settings in ({"log_format": "json"}, {}):
        log, stream = logged(**settings)
        log.info("request", detail="\ud800")
        assert r"\ud800" in stream.getvalue()


def test_a_traceback_for_people_stands_below_its_line():
    log, stream = logged()
    try:
        raise ValueError("wrong")
    except ValueError as error:
        log.error("defect", exc_info=error)
    head, *rest = stream.getvalue().splitlines()
    assert head.endswith("error   defect")
    assert rest[0] == "Traceback (most recent call last):"
    assert rest[-1] == "ValueError: wrong"


def test_what_is_below_the_level_is_left_out():
    log, stream = logged("warning")
    log.info("request")
    log.warning("no authentication")
    assert stream.getvalue().count("\n") == 1


def test_loggers_share_nothing():
    first, one = logged()
    second, other = logged(log_format="json")
    first.info("a")
    second.info("b")
    assert (one.getvalue().count("\n"), other.getvalue().count("\n")) == (1, 1)


def test_records_of_the_standard_library_are_handed_on():
    log, stream = logged(log_format="json")
    source = logging.Logger("uvicorn.error")
    source.addHandler(Forwarded(log))
    source.warning("Invalid HTTP request received.")
    line = json.loads(stream.getvalue())
    assert (line["event"], line["level"], line["source"]) == (
        "Invalid HTTP request received.",
        "warning",
        "uvicorn.error",
    )

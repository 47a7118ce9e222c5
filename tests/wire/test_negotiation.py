"""Content-Type and Accept."""

from __future__ import annotations

import pytest

from argrad.wire import (
    JSON,
    SAFETENSORS,
    NotAcceptableError,
    UnsupportedMediaTypeError,
    body_format,
    reply_format,
)


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ("application/json", JSON),
        ("Application/JSON; charset=UTF-8", JSON),
        ('application/json;charset="utf-8"', JSON),
        (" application/x-safetensors ", SAFETENSORS),
    ],
)
def test_body_format(header: str, wanted: str) -> None:
    assert body_format(header) == wanted


@pytest.mark.parametrize("header", [None, "", "text/plain", "application/json; charset=latin-1", "json", "*/*"])
def test_other_content_types_are_refused(header: str | None) -> None:
    with pytest.raises(
        UnsupportedMediaTypeError, match="wanted application/x-safetensors or application/json"
    ) as caught:
        body_format(header)
    assert caught.value.found == ("no such header" if not header else repr(header))


@pytest.mark.parametrize(
    ("accept", "default", "wanted"),
    [
        (None, JSON, JSON),
        ("", SAFETENSORS, SAFETENSORS),
        ("*/*", JSON, JSON),
        ("application/*", SAFETENSORS, SAFETENSORS),
        ("application/json", SAFETENSORS, JSON),
        ("text/html, application/json;q=0.5, */*;q=0.1", SAFETENSORS, JSON),
        ("application/json;q=0.4, application/x-safetensors;q=0.9", JSON, SAFETENSORS),
        ("application/json, application/x-safetensors", SAFETENSORS, SAFETENSORS),
        ("application/json, application/x-safetensors", JSON, JSON),
        ("*/*, application/json;q=0", JSON, SAFETENSORS),
        ("application/*;q=0.2, application/json;q=0.1", JSON, SAFETENSORS),
    ],
)
def test_reply_format(accept: str | None, default: str, wanted: str) -> None:
    assert reply_format(accept, default=default) == wanted


@pytest.mark.parametrize(
    ("accept", "message"),
    [
        ("text/html", r"Accept: found 'text/html', wanted application/x-safetensors or application/json"),
        ("application/json;q=0", "wanted application/x-safetensors or application/json"),
        ("*/*;q=0", "wanted application/x-safetensors or application/json"),
        ("application/json;q=2", "wanted weights q from 0 to 1"),
        ("application/json;q=nan", "wanted weights q from 0 to 1"),
        ("application/json;q=x", "wanted weights q from 0 to 1"),
    ],
)
def test_what_cannot_be_accepted(accept: str, message: str) -> None:
    with pytest.raises(NotAcceptableError, match=message):
        reply_format(accept, default=JSON)

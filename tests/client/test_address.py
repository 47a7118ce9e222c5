"""Addresses of services."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import argrad
from argrad.errors import ProblemError
from argrad.transport.address import parse_address


@pytest.mark.parametrize(
    ("url", "route", "uds", "is_loopback"),
    [
        pytest.param("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1/solve", None, True, id="loopback"),
        pytest.param("http://localhost:8000/", "http://localhost:8000/v1/solve", None, True, id="slash-at-the-end"),
        pytest.param("http://[::1]:80", "http://[::1]/v1/solve", None, True, id="ipv6"),
        pytest.param("https://box.example/opt/", "https://box.example/opt/v1/solve", None, False, id="prefix"),
        pytest.param("http://10.0.0.1", "http://10.0.0.1/v1/solve", None, False, id="private"),
        pytest.param("http+unix:///run/a%20b.sock", "http://localhost/v1/solve", "/run/a b.sock", True, id="unix"),
    ],
)
def test_parses(url: str, route: str, uds: str | None, is_loopback: bool) -> None:
    address = parse_address(url)
    assert str(address.join("/v1/solve")) == route
    assert (address.uds, address.is_loopback) == (uds, is_loopback)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        pytest.param("ftp://host", "url: found 'ftp://host', wanted http://host:port", id="scheme"),
        pytest.param("127.0.0.1:8000", "url: found '127.0.0.1:8000'", id="no-scheme"),
        pytest.param("http://", "url: found 'http://'", id="no-host"),
        pytest.param("http://host:port", "url: found 'http://host:port' (", id="no-port-number"),
        pytest.param("http://me:secret@host", "url: found a user name or password, wanted api_key", id="credentials"),
        pytest.param("http://host?x=1", "with a query or a fragment", id="query"),
        pytest.param("http+unix://socket", "wanted http+unix:/// and the absolute path", id="relative-socket"),
    ],
)
def test_refuses(url: str, message: str) -> None:
    with pytest.raises(ProblemError, match=re.escape(message)) as caught:
        parse_address(url)
    assert "secret" not in str(caught.value)


def test_proxies_of_the_environment_are_for_other_hosts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "near.example")
    assert parse_address("http://127.0.0.1:1").proxy is None
    assert parse_address("http+unix:///s").proxy is None
    assert parse_address("http://near.example").proxy is None
    assert parse_address("http://far.example").proxy == "http://proxy:3128"
    monkeypatch.setenv("http_proxy", "proxy:3128")
    assert parse_address("http://far.example").proxy == "http://proxy:3128"


@pytest.mark.parametrize("named", ["socks5://me:secret@proxy:1080", "::bad::", "http://", "http://proxy:99999"])
@pytest.mark.parametrize("make", [argrad.Client, argrad.AsyncClient])
def test_what_is_no_proxy_is_refused(monkeypatch: pytest.MonkeyPatch, named: str, make: Any) -> None:
    monkeypatch.setenv("http_proxy", named)
    with pytest.raises(ProblemError, match=r"proxy: found '.*' in the environment \(HTTP_PROXY.*NO_PROXY") as caught:
        make("http://far.example")
    assert "secret" not in str(caught.value)


def test_failures_name_the_proxy_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:1")
    message = re.escape("http://far.example by the proxy 127.0.0.1:1: ConnectError")
    with (
        argrad.Client("http://far.example", retries=0) as client,
        pytest.raises(argrad.ConnectionFailedError, match=message) as caught,
    ):
        client.solvers()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("make", [argrad.Client, argrad.AsyncClient])
def test_certificates_that_cannot_be_read_are_named(monkeypatch: pytest.MonkeyPatch, make: Any, tmp_path: Path) -> None:
    (tmp_path / "junk.pem").write_text("junk")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "junk.pem"))
    with pytest.raises(ProblemError, match=r"^SSL_CERT_FILE=.*junk.pem: found .*, wanted certificates in PEM"):
        make("https://far.example")

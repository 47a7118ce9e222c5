"""Callers that offer another protocol, as HTTP/2 clients do on a plain connection, are served in HTTP/1.1."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from argrad_service.http.protocol import GuardedProtocol
from tests.service.support import make_app, serving, simplex

BODY = json.dumps({"problem": simplex(), "keep_state": False}).encode()
OFFER = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
LENGTH = b"content-length: %d\r\n" % len(BODY)
CHUNKED = b"transfer-encoding: chunked\r\n"
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    with serving(make_app(), http=GuardedProtocol.with_bounds()) as url:
        host, port = url.removeprefix("http://").split(":")
        yield host, int(port)


def request(framing: bytes, body: bytes, offer: bytes = OFFER) -> bytes:
    head = b"POST /v1/solve HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return head + offer + framing + b"\r\n" + body


def replies(address: tuple[str, int], *parts: bytes) -> list[tuple[int, dict]]:
    """Send the parts one by one, end with a call that asks for the connection to be closed, and read all replies."""
    last = b"GET /health/live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    with socket.create_connection(address, timeout=30) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in (*parts, last):
            connection.sendall(part)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    found = []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        lines = head.decode().lower().split("\r\n")
        length = next(int(line.partition(":")[2]) for line in lines if line.startswith("content-length:"))
        found.append((int(lines[0].split()[1]), json.loads(received[:length])))
        received = received[length:]
    return found


@pytest.mark.parametrize(("framing", "body"), [(LENGTH, BODY), (CHUNKED, CHUNKS)], ids=["length", "chunked"])
@pytest.mark.parametrize("offer", [OFFER, b"connection: upgrade\r\nupgrade: websocket\r\n"], ids=["h2c", "websocket"])
@pytest.mark.parametrize("cut", [0, 7, None], ids=["body-later", "body-in-two", "at-once"])
def test_body_is_read_where_an_upgrade_is_offered(address, framing, body, offer, cut):
    whole = request(framing, body, offer)
    head = len(whole) - len(body)
    parts = [whole] if cut is None else [whole[: head + cut], whole[head + cut :]]
    (status, document), live = replies(address, *parts)
    assert status == 200, document
    assert document["solution"]["z"] == pytest.approx([0.25, 0.75], abs=1e-9)
    assert live == (200, {"status": "live"})


def test_offers_in_a_pipeline_are_all_declined(address):
    found = replies(address, request(LENGTH, BODY) * 40 + request(LENGTH, BODY, b"") + request(LENGTH, BODY))
    assert [status for status, _ in found] == [200] * 43
    assert [document["solution"]["z"] for _, document in found[:-1]] == [found[0][1]["solution"]["z"]] * 42


def test_upgrade_without_a_body_is_answered(address):
    offer = b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n" + OFFER + b"\r\n"
    assert replies(address, offer) == [(200, {"status": "live"})] * 2

"""How bytes leave the service."""

from __future__ import annotations

import asyncio

import pytest

from argrad_service.http.protocol import OneWrite

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"


class Noting:
    """A transport that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[bytes | str] = []

    def write(self, data: bytes | memoryview) -> None:
        self.told.append(bytes(data))

    def writelines(self, parts: list[bytes]) -> None:
        self.told.append(b"".join(parts))

    def close(self) -> None:
        self.told.append("close")

    def is_closing(self) -> bool:
        return False


def play(*writes: bytes | memoryview, close: bool = False) -> list[bytes | str]:
    async def run() -> list[bytes | str]:
        inner = Noting()
        transport = OneWrite(inner, asyncio.get_running_loop())  # type: ignore[arg-type]
        for data in writes:
            transport.write(data)
        if close:
            transport.close()
        assert transport.is_closing() is False
        told = list(inner.told)
        await asyncio.sleep(0)
        return [*told, "turn", *inner.told[len(told) :]]

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("writes", "told"),
    [
        pytest.param([HEAD, b"hi"], [HEAD + b"hi", "turn"], id="head-and-body"),
        pytest.param([HEAD, b"h", b"i"], [HEAD + b"h", b"i", "turn"], id="body-in-pieces"),
        pytest.param([HEAD, b"h", memoryview(b"i")], [HEAD + b"h", b"i", "turn"], id="body-with-views"),
        pytest.param([HEAD], ["turn", HEAD], id="head-alone-is-held-one-turn"),
        pytest.param([b"hi"], [b"hi", "turn"], id="body-alone"),
        pytest.param([HEAD, b"hi", HEAD, b"ho"], [HEAD + b"hi", HEAD + b"ho", "turn"], id="two-replies"),
    ],
)
def test_head_and_body_leave_together(writes: list[bytes | memoryview], told: list[bytes | str]) -> None:
    assert play(*writes) == told


def test_nothing_is_lost_at_the_end() -> None:
    assert play(HEAD, close=True) == [HEAD, "close", "turn"]

"""No body makes the service take more memory than the documented multiple of the caps (docs/configuration.md).

One service, with caps that are small beside what the bodies pretend to be. What it had at most is compared with what it
had before the first of them: the allocator keeps what was freed, and would hide from one body what another took.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
import torch

from argrad.wire import JSON, SAFETENSORS, compress, encode
from argrad.wire.messages import SolveRequest
from tests.conftest import running_service
from tests.service.support import D, simplex
from tests.wire.test_compression import bomb

pytestmark = pytest.mark.slow

MIB = 1024**2
BODY, TEXT, WORK, REPLY = 8 * MIB, MIB, 32 * MIB, 8 * MIB
ROOM = 24 * MIB
"""As in tests/service/test_memory.py: sockets, headers, a log, pieces under way."""

READ = 2 * BODY + ROOM
PARSED = 20 * TEXT + ROOM
SOLVED = 2 * BODY + WORK + REPLY + ROOM
ZSTD = {"content-encoding": "zstd"}

Bodies = dict[str, tuple[Callable[[], bytes], str, dict[str, str], int]]


def layout(header: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps({"__metadata__": {"argrad": "{}"}} | header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F64", "shape": shape, "data_offsets": [begin, end]}


def many_cotangents() -> bytes:
    n, k = 20, 4096
    tensors = {"problem.Q": torch.eye(n, dtype=D), "problem.q": torch.ones(n, dtype=D)}
    tensors |= {"upstream.z": torch.ones(k, n, dtype=D)}
    return b"".join(encode(SolveRequest(), tensors, SAFETENSORS))


def nested(depth: int) -> bytes:
    return b'{"problem":{"q":' + b"[" * depth + b"1" + b"]" * depth + b"}}"


def repeated(piece: bytes) -> bytes:
    begin, end = b'{"problem":{"Q":[', b"[]]}}"
    return begin + piece * ((TEXT - len(begin) - len(end)) // len(piece)) + end


def drawn(seed: int) -> bytes:
    """JSON at its cap, of pieces drawn by chance."""
    random, parts, size = Random(seed), [], 0
    while size < TEXT - 100:
        piece = random.choice(
            (b"[],", b"[[]],", b"1,", b'"",', b"{},", b'{"a":1},', b"1e308,", b"null,", b'"\\u0000",')
        )
        piece *= random.choice((1, 10, 1000))
        parts.append(
            piece[: TEXT - 100 - size - (TEXT - 100 - size) % len(piece)] if size + len(piece) > TEXT else piece
        )
        size += len(parts[-1]) or TEXT
    return b'{"problem":{"Q":[' + b"".join(parts) + b"[]]}}"


BODIES: Bodies = {
    "4 GiB in 140 kB, announced": (lambda: bomb(4 << 30, announced=4 << 30), SAFETENSORS, ZSTD, READ),
    "4 GiB in 140 kB, lying": (lambda: bomb(4 << 30, announced=BODY), SAFETENSORS, ZSTD, READ),
    "4 GiB in 140 kB, unannounced": (lambda: bomb(4 << 30, announced=None), SAFETENSORS, ZSTD, READ),
    "brackets, compressed": (lambda: b"".join(compress([repeated(b"[],")], TEXT)), JSON, ZSTD, PARSED),
    "empty lists": (lambda: repeated(b"[],"), JSON, {}, PARSED),
    "lists of one": (lambda: repeated(b"[1],"), JSON, {}, PARSED),
    "numbers": (lambda: repeated(b"1,"), JSON, {}, PARSED),
    "strings": (lambda: repeated(b'"",'), JSON, {}, PARSED),
    "objects": (lambda: repeated(b"{},"), JSON, {}, PARSED),
    "deeply nested": (lambda: nested(TEXT // 2 - 20), JSON, {}, PARSED),
    "one long string": (lambda: b'{"problem":{"kind":"' + b"\\u0041" * (TEXT // 6 - 10) + b'"}}', JSON, {}, PARSED),
    "keys without end": (
        lambda: ("{" + ",".join(f'"{i}":1' for i in range(80_000)) + "}").encode(), JSON, {}, PARSED,
    ),
    "a shape of 2**60 and no data": (lambda: layout({"problem.q": entry([2**60], 0, 0)}), SAFETENSORS, {}, READ),
    "a shape of 2**52 by 0": (lambda: layout({"problem.Q": entry([2**52, 0], 0, 0)}), SAFETENSORS, {}, READ),
    "a million problems of no size": (lambda: layout({"problem.q": entry([10**6, 0], 0, 0)}), SAFETENSORS, {}, READ),
    "a header of its full length": (
        lambda: layout({f"problem.{i}": entry([0], 0, 0) for i in range(12_000)}), SAFETENSORS, {}, PARSED,
    ),
    **{f"drawn by chance, {i}": (lambda i=i: drawn(i), JSON, {}, PARSED) for i in range(6)},
    "4096 cotangents": (many_cotangents, SAFETENSORS, {}, SOLVED),
}  # fmt: skip


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Path, int]]:
    flags = {"body": BODY, "json": TEXT, "work": WORK, "reply": REPLY, "json-reply": TEXT}
    given = [word for name, size in flags.items() for word in (f"--max-{name}-bytes", str(size))]
    with (
        running_service(tmp_path_factory.mktemp("memory") / "log.txt", *given, "--log-level", "error") as (
            url,
            process,
        ),
        httpx.Client(base_url=url, trust_env=False, timeout=60) as client,
    ):
        for _ in range(5):
            client.post("/v1/solve", json={"problem": simplex()})
        folder = Path(f"/proc/{process.pid}")
        yield client, folder, resident(folder, "VmRSS")


def resident(process: Path, name: str) -> int:
    lines = (process / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def taken_by(service: Service, body: bytes, headers: dict[str, str]) -> tuple[int, httpx.Response]:
    """Bytes that the service had at most since it was ready, over what it had then."""
    client, process, before = service
    try:
        (process / "clear_refs").write_text("5")
    except PermissionError:
        before = min(before, resident(process, "VmHWM"))
    reply = client.post("/v1/solve", content=body, headers=headers)
    return resident(process, "VmHWM") - before, reply


def test_what_does_take_memory_is_seen(service: Service):
    """Comes first: a body of nearly the cap lifts the memory by about as much."""
    tensors = {"problem.Q": torch.eye(1000, dtype=D), "problem.q": torch.ones(1000, dtype=D)}
    body = b"".join(encode(SolveRequest(), tensors, SAFETENSORS))
    taken, _ = taken_by(service, body, {"content-type": SAFETENSORS})
    assert taken > len(body) // 2


@pytest.mark.parametrize("name", BODIES)
def test_a_body_takes_no_more_than_its_documented_multiple_of_the_cap(service: Service, name: str):
    make, content_type, headers, most = BODIES[name]
    body = make()
    assert len(body) <= BODY
    taken, reply = taken_by(service, body, {"content-type": content_type, **headers})
    assert reply.status_code in (200, 400, 413, 422), reply.text
    assert taken <= most, f"{taken / MIB:.1f} MiB, {reply.text[:200]}"

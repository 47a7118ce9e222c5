"""What bad input gets: a row a case, each with the status, the problem type, and a message that names what is wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI

from argrad.wire import JSON, SAFETENSORS, encode
from argrad.wire.messages import SolverDocument, SolveRequest
from argrad_service.engine import registry
from tests.service.support import D, make_app, projection, running_app, simplex

pytestmark = pytest.mark.anyio

LIMITS = {"max_json_bytes": 20_000, "max_body_bytes": 4 << 20, "max_work_bytes": 1 << 30, "max_reply_bytes": 2 << 20}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def server(anyio_backend: str) -> AsyncIterator[httpx.AsyncClient]:
    """One application for every row, so that each row shows that those before it did no harm."""
    async with running_app(make_app(**LIMITS)) as client:
        yield client


async def check_alive(client: httpx.AsyncClient) -> None:
    """The next request works."""
    response = await client.post("/v1/solve", json={"problem": simplex()})
    assert response.status_code == 200
    assert response.json()["solution"]["z"] == pytest.approx([0.25, 0.75])


def check_problem(response: httpx.Response, status: int, type_: str, field: str, found: str, wanted: str) -> None:
    problem = response.json()
    assert response.headers["content-type"] == "application/problem+json"
    assert (response.status_code, problem["status"], problem["type"]) == (status, status, type_), problem
    assert problem["field"] == field
    assert found in problem["found"], problem
    assert wanted in problem["wanted"], problem
    assert f"{problem['field']}: found {problem['found']}, wanted {problem['wanted']}" in problem["detail"]
    assert problem["request_id"] == response.headers["x-request-id"]


def safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A body with a header that may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, *shape: int) -> dict[str, Any]:
    return {"dtype": "F64", "shape": list(shape), "data_offsets": [begin, end]}


DOCUMENT = {"__metadata__": {"argrad": "{}"}}

JSON_ROWS = {
    "wrong rank": (
        {"problem": simplex() | {"Q": [1, 2]}},
        (422, "invalid", "problem.Q", "shape (2,)", "(n, n) or (B, n, n)"),
    ),
    "mismatched sizes": (
        {"problem": simplex() | {"q": [1, 1, 1]}},
        (422, "invalid", "problem.", "shape", "3"),
    ),
    "ragged rows": (
        {"problem": simplex() | {"Q": [[1, 0], [1]]}},
        (422, "invalid", "problem.Q", "a row of 1 at [1]", "2"),
    ),
    "NaN in Q": (
        {"problem": simplex() | {"Q": [["NaN", 1], [1, 2]]}},
        (422, "invalid", "problem.Q", "nan at [0, 0]", "finite numbers"),
    ),
    "infinite q": (
        {"problem": simplex() | {"q": [0, "-Infinity"]}},
        (422, "invalid", "problem.q", "-inf at [1]", "finite numbers"),
    ),
    "a word among numbers": (
        {"problem": simplex() | {"q": [0, "one"]}},
        (422, "invalid", "problem.q", '"one" at [1]', "numbers"),
    ),
    "empty batch": (
        {"problem": simplex() | {"q": []}},
        (422, "invalid", "problem.q", "shape (0,)", ""),
    ),
    "mixed batches": (
        {"problem": simplex() | {"q": [[1, 1], [1, 1]], "h": [[0, 0]] * 3}},
        (422, "invalid", "problem.h", "a batch of 3", "2, as problem.q has"),
    ),
    "half of a pair": (
        {"problem": {name: value for name, value in simplex().items() if name != "b"}},
        (422, "invalid", "problem.b", "nothing", "problem.A is given"),
    ),
    "no q": ({"problem": {"Q": [[1]]}}, (422, "invalid", "problem.q", "nothing", "(n,) or (B, n)")),
    "options of a solver that has none": (
        {"problem": simplex(), "solver": {"name": "pdipm", "options": {"rho": 1}}},
        (422, "invalid", "solver.options.rho", "an unknown field", "none: there are no options"),
    ),
    "options of auto": (
        {"problem": simplex(), "solver": {"options": {"rho": 1}}},
        (422, "invalid", "solver.options", "options for auto", "a solver by name"),
    ),
    "options of the automatic method": (
        {"problem": simplex(), "upstream": {"z": [1, 0]}, "differentiation": {"options": {"k": 1}}},
        (422, "invalid", "differentiation.options", "options for auto", "a method by name"),
    ),
    "an option that is a list": (
        {"problem": simplex(), "solver": {"name": "pdipm", "options": {"rho": [1]}}},
        (422, "invalid", "solver.options", "a list of 1", "a number, a string"),
    ),
    "an unknown parameter": (
        {"problem": simplex() | {"C": [1]}},
        (422, "invalid", "problem.C", "an unknown parameter", "one of Q, q, G, h, A, b"),
    ),
    "an unknown kind": (
        {"problem": simplex() | {"kind": "sdp"}},
        (422, "invalid", "problem.kind", '"sdp"', "'qp', 'qp_two_sided' or 'sparse_qp'"),
    ),
    "an unknown field": (
        {"problem": simplex(), "tolerance": 1e-8},
        (422, "invalid", "tolerance", "an unknown field", "one of differentiation"),
    ),
    "another protocol": (
        {"problem": simplex(), "protocol": 2},
        (422, "invalid", "protocol", "2", "1"),
    ),
    "an unknown solver": (
        {"problem": simplex(), "solver": {"name": "gurobi"}},
        (422, "invalid", "solver.name", "'gurobi'", "auto, pivoting, pdipm"),
    ),
    "an unknown option": (
        {"problem": simplex(), "solver": {"tolerence": 1e-8}},
        (422, "invalid", "solver.tolerence", "an unknown field", "tolerance"),
    ),
    "an unknown method": (
        {"problem": simplex(), "upstream": {"z": [1, 0]}, "differentiation": {"method": "guess"}},
        (422, "invalid", "differentiation.method", "'guess'", "kkt"),
    ),
    "tolerance 0": (
        {"problem": simplex(), "solver": {"tolerance": 0.0}},
        (422, "invalid", "solver.tolerance", "0", ">= 1e-12"),
    ),
    "tolerance NaN": (
        {"problem": simplex(), "solver": {"tolerance": "NaN"}},
        (422, "invalid", "solver.tolerance", '"NaN"', "number"),
    ),
    "max_iterations 1e9": (
        {"problem": simplex(), "solver": {"max_iterations": 1_000_000_000}},
        (422, "invalid", "solver.max_iterations", "1000000000", "<= 10000"),
    ),
    "a number as text": (
        {"problem": simplex(), "solver": {"max_iterations": "100"}},
        (422, "invalid", "solver.max_iterations", '"100"', "integer"),
    ),
    "an upstream of the wrong shape": (
        {"problem": simplex(), "upstream": {"z": [1, 0, 0]}},
        (422, "invalid", "upstream.z", "shape (3,)", "(2,) or (k, 2)"),
    ),
    "an upstream of no block": (
        {"problem": simplex(), "upstream": {"x": [1, 0]}},
        (422, "invalid", "upstream", "'x'", "one of z, nu, lam, s"),
    ),
    "a gradient of no parameter": (
        {"problem": simplex(), "upstream": {"z": [1, 0]}, "wrt": ["Q", "c"]},
        (422, "invalid", "wrt", "'c'", "one of Q, q, G, h, A, b"),
    ),
    "an infinite upstream": (
        {"problem": simplex(), "upstream": {"z": [1, "Infinity"]}},
        (422, "invalid", "upstream.z", "inf at [1]", "finite numbers"),
    ),
    "a list for a body": ([1, 2], (422, "invalid", "body", "list", "a JSON object")),
}


@pytest.mark.parametrize("row", JSON_ROWS)
async def test_readable_json_that_says_something_wrong(server: httpx.AsyncClient, row: str):
    body, wanted = JSON_ROWS[row]
    response = await server.post("/v1/solve", json=body)
    if row == "mismatched sizes":  # any of the parameters with a size n may be the one that is named
        wanted = (*wanted[:2], response.json()["field"], *wanted[3:])
        assert response.json()["field"].startswith("problem.")
    check_problem(response, *wanted)
    await check_alive(server)


VERDICTS = {
    "non-PSD Q": (simplex() | {"Q": [[1, 0], [0, -1]]}, "nonconvex"),
    "infeasible": ({"Q": [[1]], "q": [0], "G": [[1], [-1]], "h": [-1, 0]}, "infeasible"),
    "unbounded": ({"Q": [[0]], "q": [-1], "G": [[-1]], "h": [0]}, "unbounded"),
}


@pytest.mark.parametrize("row", VERDICTS)
async def test_a_verdict_is_not_an_error(server: httpx.AsyncClient, row: str):
    problem, status = VERDICTS[row]
    n = len(problem["q"])
    response = await server.post("/v1/solve", json={"problem": problem, "upstream": {"z": [1.0] * n}})
    assert response.status_code == 200
    reply = response.json()
    assert (reply["status"], reply["gradient_status"]) == (status, status)
    assert reply["gradients"]["q"] == ["NaN"] * n
    await check_alive(server)


BYTES_ROWS: dict[str, tuple[str, bytes | Callable[[], bytes], tuple[int, str, str, str, str]]] = {
    "JSON cut short": (JSON, b'{"problem": {"Q": [[4', (400, "bad-request", "body", "at line 1", "JSON in UTF-8")),
    "no body": (JSON, b"", (400, "bad-request", "body", "", "JSON in UTF-8")),
    "not UTF-8": (JSON, b'{"a": "\xff"}', (400, "bad-request", "body", "", "JSON in UTF-8")),
    "a key twice": (
        JSON,
        b'{"problem": {"q": [1], "q": [2], "Q": [[1]]}}',
        (400, "bad-request", "body", 'the key "q" twice', "without repeated keys"),
    ),
    "JSON over its limit": (
        JSON,
        b'{"problem": {"q": [' + b"1, " * 10_000 + b"1]}}",
        (413, "too-large", "body", "30023 bytes", "at most 20000 bytes (ARGRAD_MAX_JSON_BYTES; the binary form"),
    ),
    "brackets in JSON": (
        JSON,
        b'{"problem": {"q": ' + b"[" * 2_100 + b"]" * 2_100 + b"}}",
        (413, "too-large", "body", "brackets in JSON", "at most 2000: use the binary form"),
    ),
    "a body over the limit": (
        SAFETENSORS,
        lambda: bytes((4 << 20) + 1),
        (413, "too-large", "body", "4194305 bytes", "at most 4194304 bytes (ARGRAD_MAX_BODY_BYTES)"),
    ),
    "safetensors cut short": (
        SAFETENSORS,
        lambda: b"".join(encode(SolveRequest(), projection((-1, 2)), SAFETENSORS))[:-8],
        (400, "bad-request", "problem.", "data_offsets", "within the"),
    ),
    "a header that overruns": (
        SAFETENSORS,
        safetensors(DOCUMENT, length=10_000),
        (400, "bad-request", "body", "bytes", "at least 10008"),
    ),
    "a huge header": (
        SAFETENSORS,
        struct.pack("<Q", 1 << 62),
        (400, "bad-request", "header length", f"{1 << 62} bytes", "at most"),
    ),
    "tensors that overlap": (
        SAFETENSORS,
        safetensors({**DOCUMENT, "problem.q": entry(0, 8, 1), "problem.h": entry(0, 8, 1)}, bytes(8)),
        (400, "bad-request", "problem.q", "an overlap at data_offsets [0, 8]", "[8, …]"),
    ),
    "a tensor that overruns": (
        SAFETENSORS,
        safetensors({**DOCUMENT, "problem.q": entry(0, 16, 2)}, bytes(8)),
        (400, "bad-request", "problem.q", "data_offsets [0, 16]", "within the 8 bytes of data"),
    ),
    "a shape that lies": (
        SAFETENSORS,
        safetensors({**DOCUMENT, "problem.q": entry(0, 8, 100)}, bytes(8)),
        (400, "bad-request", "problem.q", "data_offsets [0, 8]", "800 bytes"),
    ),
    "half precision": (
        SAFETENSORS,
        safetensors({**DOCUMENT, "problem.q": {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}}, bytes(8)),
        (422, "invalid", "problem.q", "dtype F16", "half precision is refused"),
    ),
    "no document": (
        SAFETENSORS,
        safetensors({"problem.q": entry(0, 8, 1)}, bytes(8)),
        (400, "bad-request", "__metadata__.argrad", "nothing", "the JSON document"),
    ),
}


@pytest.mark.parametrize("row", BYTES_ROWS)
async def test_bytes_that_cannot_be_read_or_are_too_many(server: httpx.AsyncClient, row: str):
    content_type, body, wanted = BYTES_ROWS[row]
    content = body() if callable(body) else body
    response = await server.post("/v1/solve", content=content, headers={"content-type": content_type})
    if wanted[2].endswith("."):
        assert response.json()["field"].startswith(wanted[2])
        wanted = (*wanted[:2], response.json()["field"], *wanted[3:])
    check_problem(response, *wanted)
    await check_alive(server)


HEADER_ROWS = {
    "no content type": ({}, (415, "unsupported-media-type", "Content-Type", "no such header", JSON)),
    "a form": (
        {"content-type": "application/x-www-form-urlencoded"},
        (415, "unsupported-media-type", "Content-Type", "x-www-form-urlencoded", SAFETENSORS),
    ),
    "compressed": (
        {"content-type": JSON, "content-encoding": "gzip"},
        (415, "unsupported-media-type", "Content-Encoding", "'gzip'", "identity or zstd"),
    ),
    "an image wanted": (
        {"content-type": JSON, "accept": "image/png"},
        (406, "not-acceptable", "Accept", "'image/png'", SAFETENSORS),
    ),
    "a deadline of zero": (
        {"content-type": JSON, "argrad-timeout-ms": "0"},
        (400, "bad-request", "Argrad-Timeout-Ms", "'0'", "milliseconds, more than 0"),
    ),
    "a deadline in words": (
        {"content-type": JSON, "argrad-timeout-ms": "soon"},
        (400, "bad-request", "Argrad-Timeout-Ms", "'soon'", "milliseconds"),
    ),
    "a deadline of NaN": (
        {"content-type": JSON, "argrad-timeout-ms": "nan"},
        (400, "bad-request", "Argrad-Timeout-Ms", "'nan'", "milliseconds"),
    ),
    "too many released tokens": (
        {"content-type": JSON, "argrad-release": ",".join(["x"] * 257)},
        (400, "bad-request", "Argrad-Release", "257 tokens", "at most 256"),
    ),
}


@pytest.mark.parametrize("row", HEADER_ROWS)
async def test_headers_that_are_wrong(server: httpx.AsyncClient, row: str):
    headers, wanted = HEADER_ROWS[row]
    body = json.dumps({"problem": simplex()}).encode()
    check_problem(await server.post("/v1/solve", content=body, headers=headers), *wanted)
    await check_alive(server)


async def raw(app: FastAPI, chunks: list[bytes], headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
    """A request whose Content-Length need not be true, straight into the application."""
    sent: list[dict[str, Any]] = []
    left = list(chunks)

    async def receive() -> dict[str, Any]:
        chunk = left.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(left)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/solve",
        "raw_path": b"/v1/solve",
        "root_path": "",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in ({"host": "localhost"} | headers).items()],
        "http_version": "1.1",
    }
    await app(scope, receive, send)
    return sent[0]["status"], json.loads(b"".join(message["body"] for message in sent[1:]))


@pytest.mark.parametrize(
    ("length", "chunks", "status", "found", "wanted"),
    [
        ("100", [b"{}"], 400, "2 bytes", "100 bytes, as Content-Length says"),
        ("1", [b"{", b"}"], 400, "more than 1 bytes", "1 bytes, as Content-Length says"),
        ("-1", [b"{}"], 400, "'-1'", "a number of bytes"),
        ("1e3", [b"{}"], 400, "'1e3'", "a number of bytes"),
        ("9" * 19, [b"{}"], 413, "9999999999999999999 bytes", "at most 2097152 bytes"),
    ],
    ids=["truncated", "longer", "negative", "no integer", "more than there is"],
)
async def test_content_lengths_that_lie(length: str, chunks: list[bytes], status: int, found: str, wanted: str):
    got, problem = await raw(make_app(), chunks, {"content-type": JSON, "content-length": length})
    assert got == status
    assert found in problem["found"]
    assert wanted in problem["wanted"]


async def test_a_chunked_body_is_capped_while_it_comes():
    app = make_app(max_json_bytes=1000)
    status, problem = await raw(app, [b"x" * 400] * 50, {"content-type": JSON})
    assert (status, problem["type"], problem["found"]) == (413, "too-large", "more than 1000 bytes")


async def test_a_shared_Q_and_a_million_problems_is_refused_from_the_shapes(server: httpx.AsyncClient):
    header = {
        **DOCUMENT,
        "problem.Q": entry(0, 80_000, 100, 100),
        "problem.q": entry(80_000, 80_800, 100),
        "problem.G": entry(80_800, 81_600, 1, 100),
        "problem.h": {"dtype": "F32", "shape": [1_000_000, 1], "data_offsets": [81_600, 4_081_600]},
    }
    response = await server.post(
        "/v1/solve", content=safetensors(header, bytes(4_081_600)), headers={"content-type": SAFETENSORS}
    )
    what = "memory to solve 1000000 problems with 100 variables and 1 constraints"
    check_problem(response, 413, "too-large", what, " bytes", "at most 1073741824 bytes (ARGRAD_MAX_WORK_BYTES)")
    await check_alive(server)


async def test_a_reply_over_the_limit_is_refused_before_it_is_solved(server: httpx.AsyncClient):
    n = 40
    tensors = {
        "problem.Q": torch.eye(n, dtype=D),
        "problem.q": torch.zeros(10, n, dtype=D),
        "upstream.z": torch.zeros(200, 10, n, dtype=D),
    }
    body = b"".join(encode(SolveRequest(), tensors, SAFETENSORS))
    response = await server.post("/v1/solve", content=body, headers={"content-type": SAFETENSORS})
    wanted = "at most 2097152 bytes (ARGRAD_MAX_REPLY_BYTES)"
    check_problem(response, 413, "too-large", "reply (gradients: adjoint is smaller)", " bytes", wanted)
    await check_alive(server)


async def test_solver_options_of_the_service_bind_the_binary_form_too():
    async with running_app(make_app(max_iterations=200)) as client:
        request = SolveRequest(solver=SolverDocument(max_iterations=201))
        body = b"".join(encode(request, projection((-1, 2)), SAFETENSORS))
        response = await client.post("/v1/solve", content=body, headers={"content-type": SAFETENSORS})
        wanted = "at most 200 (ARGRAD_MAX_ITERATIONS)"
        check_problem(response, 422, "invalid", "solver.max_iterations", "201", wanted)


async def test_a_name_that_is_no_unicode_is_quoted(server: httpx.AsyncClient):
    header = json.dumps({**DOCUMENT, "problem.\ud800": entry(0, 16, 1)}).encode()
    response = await server.post(
        "/v1/solve", content=safetensors(header, bytes(8)), headers={"content-type": SAFETENSORS}
    )
    assert response.status_code == 400
    assert response.json()["type"] == "bad-request"
    await check_alive(server)


async def test_words_of_the_request_are_cut(server: httpx.AsyncClient):
    body = {"problem": simplex(), "upstream": {"z": [1, 0]}, "wrt": ["c" * 10_000]}
    response = await server.post("/v1/solve", json=body)
    assert response.status_code == 422
    assert len(response.json()["found"]) == len(response.json()["detail"]) == 1000


async def test_bytes_at_random_never_cause_a_defect(server: httpx.AsyncClient):
    random = np.random.default_rng(0)
    whole = b"".join(
        encode(SolveRequest(), projection((-1, 2)) | {"upstream.z": torch.ones(1, 2, dtype=D)}, SAFETENSORS)
    )
    for _ in range(150):
        body = bytearray(whole)
        for position in random.integers(0, len(body), size=3):
            body[position] = random.integers(0, 256)
        response = await server.post("/v1/solve", content=bytes(body), headers={"content-type": SAFETENSORS})
        assert response.status_code in (200, 400, 413, 422), response.text
    await check_alive(server)


async def test_unknown_and_foreign_tokens_are_the_same_409(server: httpx.AsyncClient):
    async with running_app(make_app(state_secret="another server's secret")) as other:
        foreign = (await other.post("/v1/solve", json={"problem": simplex()})).json()["state"]
    replies = []
    for token in ("", "nonsense", "A" * 40, foreign, foreign[:-1] + "é"):
        body = {"state": token, "upstream": {"z": [1, 0]}}
        for path in ("/v1/vjp", "/v1/jvp"):
            given = body if path == "/v1/vjp" else {"state": token, "tangents": {"q": [1, 0]}}
            response = await server.post(path, json=given)
            problem = response.json()
            assert response.status_code == 409, problem
            replies.append((problem["type"], problem["title"], problem["detail"], sorted(problem)))
    assert len(set(map(str, replies))) == 1
    assert replies[0][0] == "state-gone"
    await check_alive(server)


async def test_a_solver_whose_packages_are_missing(server: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "is_there", lambda name: name != "proxsuite")
    response = await server.post("/v1/solve", json={"problem": simplex(), "solver": {"name": "proxqp"}})
    problem = response.json()
    assert (response.status_code, problem["type"]) == (501, "not-installed")
    assert (problem["what"], problem["extra"]) == ("solver 'proxqp'", "proxqp")
    assert problem["detail"].endswith("not installed: pip install 'argrad[proxqp]'")
    table = (await server.get("/v1/solvers")).json()["solvers"]
    assert [row["name"] for row in table if not row["installed"]] == ["proxqp"]
    await check_alive(server)


async def test_an_option_may_be_null_as_its_default_is(server: httpx.AsyncClient):
    document = {"problem": simplex(), "solver": {"name": "admm", "options": {"rho": None}}}
    response = await server.post("/v1/solve", json=document)
    assert response.json()["status"] == "optimal", response.text
    response = await server.post("/v1/solve", json=document | {"solver": {"name": "admm", "options": {"block": None}}})
    check_problem(response, 422, "invalid", "solver.options.block", "null", "integer")


async def test_more_options_than_any_solver_has(server: httpx.AsyncClient):
    many = {f"option_{i}": 1 for i in range(33)}
    response = await server.post("/v1/solve", json={"problem": simplex(), "solver": {"options": many}})
    check_problem(response, 422, "invalid", "solver.options", "33 entries", "at most 32")

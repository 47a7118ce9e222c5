"""The requests behind the table of bad input in docs/errors.md, by the names of its rows."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from typing import Any

import httpx

from argrad.wire import compress

JSON = {"content-type": "application/json"}
BINARY = {"content-type": "application/x-safetensors", "accept": "application/json"}
IDENTITY = "c076fa58f1e82c8437b00651ef0b8d465d414ab71872151dcf351a170999a69d"
"""Digest of Q = [[1, 0], [0, 1]]."""
Send = Callable[[httpx.Client], httpx.Response]


def problem(**changes: Any) -> dict[str, Any]:
    """Projection of q on z ≥ 0 in two variables, changed."""
    return {"Q": [[1, 0], [0, 1]], "q": [1, 1], "G": [[-1, 0], [0, -1]], "h": [0, 0], **changes}


def solve(document: dict[str, Any]) -> Send:
    """POST /v1/solve with a JSON body."""
    return lambda client: client.post("/v1/solve", content=json.dumps(document), headers=JSON)


def vjp(document: dict[str, Any]) -> Send:
    """POST /v1/vjp with a JSON body."""
    return lambda client: client.post("/v1/vjp", content=json.dumps(document), headers=JSON)


def binary(header: dict[str, Any], data: bytes, *, length: int | None = None) -> Send:
    """POST /v1/solve with a safetensors body whose header says what we like."""
    text = json.dumps({"__metadata__": {"argrad": json.dumps({"protocol": 1})}, **header}).encode()
    body = struct.pack("<Q", len(text) if length is None else length) + text + data
    return lambda client: client.post("/v1/solve", content=body, headers=BINARY)


def tensor(shape: list[int], begin: int, end: int) -> dict[str, Any]:
    """A line of a safetensors header."""
    return {"dtype": "F64", "shape": shape, "data_offsets": [begin, end]}


def sparse(**changes: Any) -> dict[str, Any]:
    """The same problem as CSR triplets, changed."""
    patterns = {
        f"{name}_{part}": value
        for name, entry in (("Q", 1), ("G", -1))
        for part, value in (("indptr", [0, 1, 2]), ("indices", [0, 1]), ("values", [entry, entry]))
    }
    return {"kind": "sparse_qp", **patterns, "q": [1, 1], "h": [0, 0], **changes}


def softmax(**changes: Any) -> dict[str, Any]:
    """Softmax of −q over two entries, changed."""
    return {"q": [1, 2], "A": [[1, 1]], "b": [1], "entropy": 1, **changes}


def differentiated(name: str, given: dict[str, Any], **differentiation: Any) -> Send:
    """POST /v1/solve with a cotangent, by a solver of that name."""
    document = {"problem": given, "solver": {"name": name}, "differentiation": differentiation}
    return solve(document | {"upstream": {"z": [1, 0]}})


def claimed(client: httpx.Client) -> httpx.Response:
    """A sparse problem whose row pointers claim a billion stored entries, of which there are two."""
    return solve({"problem": sparse(G_indptr=[0, 1, 1_000_000_000])})(client)


def expanded(client: httpx.Client) -> httpx.Response:
    """A million problems that share Q of 100 × 100: 8 MB on the wire, 80 GB if Q were copied for each."""
    shapes = {"problem.Q": [100, 100], "problem.q": [100], "problem.G": [1, 100], "problem.h": [1_000_000, 1]}
    lines, begin = {}, 0
    for name, shape in shapes.items():
        end = begin + 8 * math.prod(shape)
        lines[name] = tensor(shape, begin, end)
        begin = end
    return binary(lines, bytes(begin))(client)


def compressed(body: bytes) -> Send:
    """POST /v1/solve with a body that says that it is compressed with zstd."""
    return lambda client: client.post("/v1/solve", content=body, headers={**JSON, "content-encoding": "zstd"})


def frame(content: bytes) -> bytes:
    """A body compressed with zstd."""
    return b"".join(compress([content], len(content)))


def put(digest: str, given: dict[str, Any]) -> Send:
    """PUT /v1/problems/{sha256} with a JSON body."""
    body = json.dumps({"problem": given})
    return lambda client: client.put(f"/v1/problems/{digest}", content=body, headers=JSON)


def with_registered(given: dict[str, Any]) -> Send:
    """POST /v1/solve that names the identity as Q, registered just before."""

    def send(client: httpx.Client) -> httpx.Response:
        assert put(IDENTITY, {"Q": [[1, 0], [0, 1]]})(client).status_code in (200, 201)
        return solve({"problem": {"registered": IDENTITY, **given}})(client)

    return send


def forged(client: httpx.Client) -> httpx.Response:
    """A token that is well formed, with a signature that another key would make."""
    mine = solve({"problem": problem()})(client).json()["state"]
    flipped = mine[:-2] + ("A" if mine[-2] != "A" else "B") + mine[-1]
    return vjp({"state": flipped, "upstream": {"z": [1, 0]}})(client)


REQUESTS: dict[str, Send] = {
    "wrong rank": solve({"problem": problem(q=[[[1, 1]]])}),
    "sizes that do not fit": solve({"problem": problem(q=[1, 1, 1])}),
    "batches that do not fit": solve({"problem": problem(q=[[1, 1]] * 3, h=[[0, 0]] * 2)}),
    "NaN in the data": solve({"problem": problem(q=[1, "NaN"])}),
    "h without G": solve({"problem": {"Q": [[1]], "q": [1], "h": [1]}}),
    "empty batch": binary({"problem.Q": tensor([2, 2], 0, 32), "problem.q": tensor([0, 2], 32, 32)}, bytes(32)),
    "Q not positive semidefinite": solve({"problem": problem(Q=[[1, 0], [0, -1]])}),
    "infeasible": solve({"problem": problem(G=[[1, 0], [-1, 0]], h=[-1, 0])}),
    "unbounded": solve({"problem": problem(Q=[[0, 0], [0, 0]], q=[-1, 0])}),
    "unknown solver": solve({"problem": problem(), "solver": {"name": "simplex"}}),
    "unknown option": solve({"problem": problem(), "solver": {"tolerence": 1e-6}}),
    "unknown option of a solver": solve({"problem": problem(), "solver": {"name": "osqp", "options": {"rhoo": 1}}}),
    "option of the wrong type": solve({"problem": problem(), "solver": {"name": "admm", "options": {"block": "40"}}}),
    "option out of range": solve({"problem": problem(), "solver": {"name": "osqp", "options": {"alpha": 3}}}),
    "option that is a list": solve({"problem": problem(), "solver": {"name": "admm", "options": {"rho": [1]}}}),
    "options for auto": solve({"problem": problem(), "solver": {"options": {"rho": 1}}}),
    "unknown option of a method": differentiated("pdipm", problem(), method="kkt", options={"ridge": 1}),
    "solver that does not take the problem": solve({"problem": {"q": [1], "lb": [0]}, "solver": {"name": "pgd"}}),
    "method that does not pair with the solver": differentiated("osqp", problem(), method="unrolled"),
    "method that does not take the problem": differentiated("pdipm", softmax(), method="bpqp"),
    "entropy 0": solve({"problem": softmax(entropy=0)}),
    "entropy that is a matrix": solve({"problem": softmax(entropy=[[1]])}),
    "sparse row pointers that fall": solve({"problem": sparse(Q_indptr=[0, 2, 1])}),
    "sparse row pointers that claim too much": claimed,
    "sparse column out of range": solve({"problem": sparse(G_indices=[0, 2])}),
    "sparse column twice in a row": solve({"problem": sparse(Q_indptr=[0, 2, 2], Q_indices=[0, 0])}),
    "sparse problem in a batch": solve({"problem": sparse(q=[[1, 1]])}),
    "dense solver for a sparse problem": solve({"problem": sparse(), "solver": {"name": "pdipm"}}),
    "tolerance 0": solve({"problem": problem(), "solver": {"tolerance": 0}}),
    "max_iterations 1e9": solve({"problem": problem(), "solver": {"max_iterations": 1_000_000_000}}),
    "upstream of the wrong shape": solve({"problem": problem(), "upstream": {"z": [1, 0, 0]}}),
    "unknown state token": vjp({"state": "bm8gc3VjaCB0b2tlbg", "upstream": {"z": [1, 0]}}),
    "forged token, or another server's": forged,
    "digest under which nothing is registered": solve({"problem": {"registered": "0" * 64, "q": [1, 1]}}),
    "digest that is no digest": solve({"problem": {"registered": "A1B2", "q": [1, 1]}}),
    "parameter sent and registered": with_registered({"Q": [[1, 0], [0, 1]], "q": [1, 1]}),
    "registered as another kind": with_registered({"kind": "qp_two_sided", "q": [1, 1]}),
    "registration under another digest": put("0" * 64, {"Q": [[1, 0], [0, 1]]}),
    "registration of NaN": put("0" * 64, {"q": [1, "NaN"]}),
    "registration of nothing": put("0" * 64, {}),
    "truncated JSON": lambda c: c.post("/v1/solve", content=b'{"problem": {"Q": [[1, 0', headers=JSON),
    "JSON body over its limit": lambda c: c.post("/v1/solve", content=b" " * (2 * 1024**2 + 1), headers=JSON),
    "JSON of deep brackets": lambda c: c.post("/v1/solve", content=b'{"q": ' + b"[" * 3000, headers=JSON),
    "JSON of brackets": lambda c: c.post("/v1/solve", content=b'{"q": ' + b"[" * 300_000, headers=JSON),
    "truncated tensors": binary({"problem.q": tensor([2], 0, 16)}, bytes(8)),
    "overlapping tensors": binary({"problem.q": tensor([2], 0, 16), "problem.h": tensor([2], 8, 24)}, bytes(24)),
    "header longer than the body": binary({}, b"", length=4096),
    "huge header": binary({}, b"", length=2**40),
    "shape that the bytes do not fill": binary({"problem.q": tensor([1_000_000], 0, 16)}, bytes(16)),
    "shared Q expanded a million times": expanded,
    "compressed body that is none": compressed(json.dumps({"problem": problem()}).encode()),
    "compressed body cut short": compressed(frame(json.dumps({"problem": problem()}).encode())[:-9]),
    "compressed body with something behind it": compressed(frame(b"{}") + b"{}"),
    "compressed body over its limit": compressed(frame(bytes(2 * 1024**2 + 1))),
    "body compressed otherwise": lambda c: c.post(
        "/v1/solve", content=b"{}", headers={**JSON, "content-encoding": "gzip"}
    ),
    "no content type": lambda c: c.post("/v1/solve", content=b"{}"),
    "reply in a format nobody writes": lambda c: c.post(
        "/v1/solve", content=json.dumps({"problem": problem()}), headers={**JSON, "accept": "text/csv"}
    ),
    "unknown route": lambda c: c.post("/v1/solves", content=b"{}", headers=JSON),
    "wrong method": lambda c: c.get("/v1/solve"),
    "deadline that has passed": lambda c: c.post(
        "/v1/solve", content=json.dumps({"problem": problem()}), headers={**JSON, "Argrad-Timeout-Ms": "0.001"}
    ),
}

"""From a message that is right to one that may not be: by its structure, by its layout, by its bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

from argrad.wire import SAFETENSORS

MOST_BYTES = 64 * 1024
"""Mutations of mutations do not grow beyond it."""

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 0.5, -0.0, 1e308, 1e-320, 2**31, 2**53, 2**63, -(2**63) - 1, 2**64, 10**400,
    float("nan"), float("inf"), "", "NaN", "Infinity", "-Infinity", "z", "Q", "q", "auto", "pdipm", "kkt", "qp",
    "sparse_qp", "adjoint", "float32", "F64", "F32", "F16", "I64", "\x00", "\ud800", "é", "𝔸", "a" * 300, "0" * 64,
    ":" * 20, [], {}, [[]], [[], []], [None], [1], [1, 2, 3], [[1, 2], [3]], [0, 8], [8, 0], [-8, 8], [2**62, 2**63],
    {"": 1},
)  # fmt: skip
NAMES = (
    "problem", "upstream", "solution", "tangents", "warm_start", "state", "solver", "options", "wrt", "gradients",
    "kind", "registered", "protocol", "Q", "q", "G", "h", "A", "b", "lb", "ub", "P", "l", "u", "entropy", "Q_indptr",
    "Q_indices", "Q_values", "z", "nu", "lam", "s", "dtype", "shape", "data_offsets", "__metadata__", "argrad",
    "problem.Q", "problem.q", "problem.", ".q", "upstream.z", "report.flags", "", "\ud800", "name", "method",
    "tolerance", "max_iterations",
)  # fmt: skip
PIECES = (
    b"\x00", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"[", b"]", b"{", b"}", b'"', b",", b":", b"\\u0000", b"\\ud800",
    b"NaN", b"1e999", b"-", b".", b"null", b"[" * 40, b"[]," * 30, b" " * 64, b"\n", b"\r\n\r\n", b'"a":1,', b"\x7f",
)  # fmt: skip
_Node = tuple[Any, Any]  # a container, and a key or index of it


def mutate(random: Random, body: bytes, content_type: str, others: Callable[[], bytes]) -> bytes:
    """One to four changes of a body.

    Args:
        random: All chance comes from it.
        body: What is changed.
        content_type: How it is to be understood; what cannot be is changed by bytes alone.
        others: Another body, to splice with.
    """
    for _ in range(random.choice((1, 1, 1, 2, 2, 4))):
        if random.random() < 0.75:
            changed = _by_layout(random, body) if content_type == SAFETENSORS else _by_structure(random, body)
        else:
            changed = None
        body = _by_bytes(random, body, others) if changed is None else changed
    return body[:MOST_BYTES]


def mutate_tree(random: Random, tree: Any) -> Any:
    """One change of a parsed document, which is not touched."""
    tree = copy.deepcopy(tree)
    nodes = _nodes(tree)
    if not nodes or random.random() < 0.02:
        return copy.deepcopy(random.choice(VALUES))
    container, key = random.choice(nodes)
    change = random.randrange(9)
    if change == 0:
        del container[key]
    elif change == 1:
        other, other_key = random.choice(nodes)
        container[key] = copy.deepcopy(other[other_key])
    elif change == 2 and isinstance(container, dict):
        container[random.choice(NAMES)] = container.pop(key)
    elif change == 3:
        container[key] = _nested(random, container[key])
    elif change == 4 and isinstance(container, list):
        container[key:key] = [copy.deepcopy(container[key])] * random.choice((1, 1, 7, 60))
    elif change == 5 and isinstance(container, dict):
        container[random.choice(NAMES)] = copy.deepcopy(random.choice(VALUES))
    elif change == 6 and type(container[key]) in (int, float):
        container[key] = _near(random, container[key])
    elif change == 7 and isinstance(container[key], str):
        container[key] = container[key][: random.randrange(8)] + random.choice(NAMES)
    else:
        container[key] = copy.deepcopy(random.choice(VALUES))
    return tree


def _nodes(tree: Any) -> list[_Node]:
    found: list[_Node] = []
    open_ = [tree]
    while open_:
        container = open_.pop()
        if isinstance(container, dict):
            members = [(container, key) for key in container]
        elif isinstance(container, list):
            members = [(container, i) for i in range(len(container))]
        else:
            continue
        found += members
        open_ += [container[key] for _, key in members]
    return found


def _nested(random: Random, value: Any) -> Any:
    for _ in range(random.choice((1, 1, 2, 9, 40))):
        value = [value]
    return value


def _near(random: Random, number: float) -> float:
    if isinstance(number, int):
        return random.choice(
            (number + 1, number - 1, -number, number * 2, number << 32, number + 0.5 if abs(number) < 2**60 else 1e19)
        )
    return random.choice(
        (-number, number * 1e300, number * 1e-300, number + 1, int(number) if abs(number) < 1e9 else 0)
    )


def _by_structure(random: Random, body: bytes) -> bytes | None:
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return _text(random, mutate_tree(random, tree))


def _text(random: Random, tree: Any) -> bytes | None:
    try:
        text = json.dumps(
            tree, ensure_ascii=random.random() < 0.9, separators=random.choice(((",", ":"), (", ", ": ")))
        )
        written = text.encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return None
    if random.random() < 0.05:  # a key twice
        at = written.rfind(b"{")
        written = written[: at + 1] + b'"q":[1],"q":[1],' + written[at + 1 :]
    return written


def _by_layout(random: Random, body: bytes) -> bytes | None:
    """Of the binary form: its header, the document in it, its length, or the data."""
    length = int.from_bytes(body[:8], "little")
    try:
        header = json.loads(body[8 : 8 + length])
    except (ValueError, RecursionError, OverflowError, MemoryError):
        return None
    if not isinstance(header, dict):
        return None
    data = body[8 + length :]
    where = random.randrange(8)
    if where <= 1:
        header = mutate_tree(random, header)
    elif where <= 5:
        metadata = header.get("__metadata__")
        try:
            document = json.loads(metadata["argrad"])
        except (ValueError, RecursionError, KeyError, TypeError):
            return None
        metadata["argrad"] = json.dumps(mutate_tree(random, document))
    elif where == 6:
        data = random.choice((data[:-8], data + data[:8], data[8:], b"", data[::-1], b"\xff" * len(data)))
    text = _text(random, header)
    if text is None:
        return None
    text += b" " * random.choice((0, 1, 7, -len(text) % 64))
    told = len(text) if where < 7 else random.choice((0, 1, len(text) - 1, len(text) + 8, 2**32, 2**63, 2**64 - 1))
    return told.to_bytes(8, "little") + text + data


def _by_bytes(random: Random, body: bytes, others: Callable[[], bytes]) -> bytes:
    at, change = random.randrange(len(body) + 1), random.randrange(7)
    span = random.choice((1, 1, 2, 8, 64))
    if change == 0:
        return body[:at]
    if change == 1:
        return body[:at] + body[at + span :]
    if change == 2:
        return body[:at] + random.choice(PIECES) + body[at:]
    if change == 3:
        return body[:at] + random.choice(PIECES) + body[at + span :]
    if change == 4:
        return body[:at] + body[max(0, at - span) :]
    if change == 5:
        other = others()
        return body[:at] + other[random.randrange(len(other) + 1) :]
    flipped = bytearray(body)
    if flipped:
        flipped[at % len(flipped)] ^= 1 << random.randrange(8)
    return bytes(flipped)

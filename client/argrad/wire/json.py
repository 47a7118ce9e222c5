"""Messages as plain JSON: tensors are nested lists in their places in the document.

Numbers are float64, but for those of `INTEGER_TENSORS`. JSON has no words for what is not finite: the strings
"Infinity", "-Infinity" and "NaN" stand for it, both ways. An empty list has no further sizes: a tensor of shape (0, 3)
travels as [] and arrives with shape (0,).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from torch import Tensor

from argrad.errors import ProblemError
from argrad.validation import field_name, in_words, validate
from argrad.wire.documents import check_tensor_name, parse_object
from argrad.wire.errors import TooLargeError
from argrad.wire.messages import M, Message, TensorMap

INTEGER_TENSORS = frozenset(
    {"report.iterations", *(f"problem.{name}_{part}" for name in "QGA" for part in ("indptr", "indices"))}
)
"""Tensors that hold counts or positions: int64, and only integers are read."""

_SCALAR_SECTION, _SCALAR_PARAMETER = "report.", ".entropy"
_NON_FINITE = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}
_MAX_RANK = 8
_OPENED = np.zeros(256, np.int8)
_OPENED[list(b"[{")], _OPENED[list(b"]}")] = 1, -1
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_DTYPES = (torch.float64, torch.float32, torch.int64)


@dataclass(frozen=True, kw_only=True)
class JsonLimits:
    """What a JSON body may cost; the binary form has no such limits.

    Args:
        max_bytes: Length of the body.
        max_brackets: Opening brackets and braces, each of which becomes an object of its own.
        max_numbers: Elements, counted by their commas.
        max_depth: Brackets and braces that are open at once, whether or not they stand in a string.
        numbers_setting: What sets `max_numbers`, for the message; empty where nothing does.
        depth_setting: The same for `max_depth`.
    """

    max_bytes: int = 2 << 20
    max_brackets: int = 200_000
    max_numbers: int = 500_000
    max_depth: int = 64
    numbers_setting: str = ""
    depth_setting: str = ""


DEFAULT_LIMITS = JsonLimits()


def read(model: type[M], body: bytes | bytearray | memoryview, limits: JsonLimits) -> tuple[M, TensorMap]:
    """Read a message.

    A section or a tensor that is null counts as absent.

    Raises:
        TooLargeError: the body is over a limit; nothing was parsed.
        UnreadableBodyError: it is not JSON, or an object has a key twice.
        ProblemError: a field is unknown, missing or wrong, or a tensor is not a nested list of numbers.
    """
    text = bytes(body) if isinstance(body, memoryview) else body
    _check_limits(text, limits)
    document = parse_object("body", text)
    tensors: TensorMap = {}
    for section, reserved in model.tensor_sections.items():
        members = document.pop(section, None)
        if members is None:
            continue
        if not isinstance(members, dict):
            raise ProblemError(section, in_words(members), "an object")
        for leaf, value in members.items():
            if leaf not in reserved and value is not None:
                name = f"{section}.{leaf}"
                check_tensor_name(model, name)
                tensors[name] = _to_tensor(name, value)
        if section in model.model_fields:
            document[section] = {leaf: value for leaf, value in members.items() if leaf in reserved}
    return validate(model, document), tensors


def write(message: Message, tensors: Mapping[str, Tensor]) -> bytes:
    """Write a message; what is None in the document is left out.

    Raises:
        ProblemError: a tensor has another dtype than float64, float32 or int64.
    """
    document = message.model_dump(mode="json", exclude_none=True)
    for name, tensor in tensors.items():
        section, _, leaf = name.partition(".")
        document.setdefault(section, {})[leaf] = _to_lists(name, tensor)
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def _check_limits(text: bytes | bytearray, limits: JsonLimits) -> None:
    if len(text) > limits.max_bytes:
        raise _too_large(f"{len(text)} bytes of JSON", limits.max_bytes)
    if (brackets := text.count(b"[") + text.count(b"{")) > limits.max_brackets:
        raise _too_large(f"{brackets} brackets in JSON", limits.max_brackets)
    if (commas := text.count(b",")) >= limits.max_numbers:
        raise _too_large(f"{commas + 1} elements in JSON", limits.max_numbers, limits.numbers_setting)
    if brackets > limits.max_depth and (depth := _depth(text)) > limits.max_depth:
        raise _too_large(f"{depth} nested brackets in JSON", limits.max_depth, limits.depth_setting)


def _depth(text: bytes | bytearray) -> int:
    """Most brackets and braces that are open at once."""
    brackets = np.frombuffer(text.translate(None, _NO_BRACKETS), np.uint8)
    return int(_OPENED[brackets].cumsum(dtype=np.int32).max())


def _too_large(found: str, limit: int, setting: str = "") -> TooLargeError:
    named = f" ({setting})" if setting else ""
    return TooLargeError("body", found, f"at most {limit}{named}: use the binary form")


def _to_tensor(name: str, value: object) -> Tensor:
    """Nested lists, or where a single problem has one number a bare number, as a tensor."""
    is_scalar = not isinstance(value, list)
    may_be_scalar = name.startswith(_SCALAR_SECTION) or name.endswith(_SCALAR_PARAMETER)
    if is_scalar and not (may_be_scalar and _is_number(value)):
        raise ProblemError(field_name(name), in_words(value), "a list of numbers")
    flat, shape = ([value], ()) if is_scalar else _flatten(field_name(name), value)
    kinds = set(map(type, flat))
    if name in INTEGER_TENSORS:
        return torch.from_numpy(_to_counts(name, flat, kinds)).view(shape)
    if not kinds <= {int, float}:
        flat = [_to_number(name, item, position, shape) for position, item in enumerate(flat)]
    return torch.from_numpy(np.array(flat, dtype=np.float64)).view(shape)


def _flatten(field: str, value: Any) -> tuple[list[Any], tuple[int, ...]]:
    """Open one level of brackets after the other, all of a level at once; every row must be as long as the first."""
    level: list[Any] = [value]
    shape: tuple[int, ...] = ()
    while True:
        size = len(level[0])
        for row, items in enumerate(level):
            if len(items) != size:
                wanted = f"{size}, as in the rows before it"
                raise ProblemError(field, f"a row of {len(items)} at {_position(row, shape)}", wanted)
        shape = (*shape, size)
        level = list(chain.from_iterable(level))
        kinds = set(map(type, level))
        if kinds != {list}:
            break
        if len(shape) == _MAX_RANK:
            raise ProblemError(field, f"lists nested more than {_MAX_RANK} deep", "at most that many dimensions")
    if list in kinds:
        odd = next(i for i, item in enumerate(level) if isinstance(item, list) != isinstance(level[0], list))
        found = "a list" if isinstance(level[odd], list) else in_words(level[odd])
        before = "a list" if isinstance(level[0], list) else "a number"
        raise ProblemError(field, f"{found} at {_position(odd, shape)}", f"{before}, as before it")
    return level, shape


def _to_counts(name: str, flat: list[Any], kinds: set[type]) -> NDArray[np.int64]:
    if not kinds <= {int}:
        odd = next(item for item in flat if type(item) is not int)
        raise ProblemError(name, in_words(odd), "integers")
    try:
        return np.array(flat, dtype=np.int64)
    except OverflowError:
        raise ProblemError(name, "an integer of more than 63 bits", "integers") from None


def _is_number(value: object) -> bool:
    return type(value) in (int, float) or (isinstance(value, str) and value in _NON_FINITE)


def _to_number(name: str, item: Any, position: int, shape: tuple[int, ...]) -> float:
    if not _is_number(item):
        where = f" at {_position(position, shape)}" if shape else ""
        wanted = 'numbers, or "Infinity", "-Infinity", "NaN"'
        raise ProblemError(field_name(name), f"{in_words(item)}{where}", wanted)
    return _NON_FINITE[item] if isinstance(item, str) else float(item)


def _position(position: int, shape: tuple[int, ...]) -> str:
    """Index of an element of the flattened lists."""
    index: list[int] = []
    for size in reversed(shape):
        position, remainder = divmod(position, size)
        index.append(remainder)
    return str(index[::-1])


def _to_lists(name: str, tensor: Tensor) -> Any:
    """What orjson writes: an array where all is finite, else lists with strings (orjson would write null)."""
    if tensor.dtype not in _DTYPES:
        raise ProblemError(name, f"dtype {tensor.dtype}", "torch.float64 or torch.float32")
    if tensor.dtype == torch.float32:
        tensor = tensor.double()  # the shortest text of a float32 is another float64
    array = tensor.detach().cpu().contiguous().numpy()
    if not np.isfinite(array).all():
        words = array.astype(object)
        words[np.isnan(array)] = "NaN"
        words[np.isposinf(array)] = "Infinity"
        words[np.isneginf(array)] = "-Infinity"
        return words.tolist()
    return array if array.ndim else array.item()

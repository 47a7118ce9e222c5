"""From bytes to a JSON object, and the places of tensors in it."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

import orjson

from argrad.errors import ProblemError
from argrad.validation import field_name, in_words
from argrad.wire.errors import UnreadableBodyError
from argrad.wire.messages import Message

_MAX_MEMBERS = 1000
_NOT_FINITE = re.compile(r"nan\b|inf(inity)?\b", re.IGNORECASE)
_SHORT = 4096
"""Characters in which there is no room for so many."""


def _complaint(error: orjson.JSONDecodeError) -> tuple[str, str]:
    """What was found, and what was wanted, of a text that is no JSON.

    Python's `json.dumps` writes NaN and Infinity as bare words, which JSON has not.
    """
    where = f"at line {error.lineno}, column {error.colno}"
    if word := _NOT_FINITE.match(error.doc, error.pos):
        sign = "-" if error.doc[: error.pos].endswith("-") else ""
        return f"{sign}{word[0]} {where}", 'JSON in UTF-8, where "NaN", "Infinity" and "-Infinity" stand in quotes'
    if "infinity" in error.msg:
        return f"a number beyond float64 {where}", 'numbers up to 1.8e308, or "Infinity", "-Infinity"'
    if "empty" in error.msg:
        return "nothing", "JSON in UTF-8"
    return f"{error.msg} {where}", "JSON in UTF-8"


def parse_object(where: str, text: bytes | bytearray | str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        where: What the text is, for the message: `body`, `header`.
        text: UTF-8.

    Raises:
        UnreadableBodyError: not JSON (with line and column), or a key appears twice in one object.
        ProblemError: JSON, but not an object, or one with far more members than any message has.
    """
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise UnreadableBodyError(where, *_complaint(error)) from None
    if not isinstance(document, dict):
        raise ProblemError(where, in_words(document), "a JSON object")
    # orjson keeps the last of two equal keys. Every member has a colon, so a repeated key leaves a colon too many;
    # so does a colon inside a string, and only then the slower parser looks.
    if _is_as_written(document, text):
        return document
    members = _members(document)
    if members > _MAX_MEMBERS:
        raise ProblemError(where, f"{members} members", f"at most {_MAX_MEMBERS}")
    if (text.count(":") if isinstance(text, str) else text.count(b":")) != members:
        parse_strictly(where, text)
    return document


def parse_strictly(where: str, text: bytes | bytearray | str) -> Any:
    """Parse JSON with the standard library: integers of any size, no repeated keys.

    Raises:
        UnreadableBodyError: not JSON, nested too deeply, or a key appears twice in one object.
    """
    try:
        return _STRICT.decode(text if isinstance(text, str) else str(text, "utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnreadableBodyError(where, str(error), "JSON in UTF-8 without repeated keys") from None


def parse_header(where: str, text: bytes) -> Any:
    """`parse_strictly`, quicker where it can be seen at once that no key is repeated.

    Every member has a colon. Those inside strings are counted too, which an escape could hide; without one, the number
    of colons is right exactly if no key stands twice.
    """
    if b"\\u" not in text:
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError:
            return parse_strictly(where, text)
        if _is_as_written(value, text) and isinstance(value, dict):
            return value
        if isinstance(value, dict) and text.count(b":") == _members(value) + _colons(value):
            return value
    return parse_strictly(where, text)


def _is_as_written(value: Any, text: bytes | bytearray | str) -> bool:
    """Whether short JSON is what orjson writes for its value, as headers of ours are: then no key stands twice."""
    if len(text) > _SHORT:
        return False
    try:
        written = orjson.dumps(value)
    except orjson.JSONEncodeError:  # nested more deeply than it writes
        return False
    return written == (text.encode() if isinstance(text, str) else text.rstrip(b" "))


def _colons(value: dict[str, Any]) -> int:
    """Colons inside the keys and strings of an object and of those in it."""
    count = 0
    for key, member in value.items():
        count += key.count(":")
        if isinstance(member, str):
            count += member.count(":")
        elif isinstance(member, dict):
            count += _colons(member)
        elif isinstance(member, list) and any(isinstance(item, str | dict | list) for item in member):
            return -1  # nothing that a header has: the slower parser reads it
    return count


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ValueError(f"the key {in_words(repeated)} twice in one object")
    return members


def _refuse_constant(name: str) -> None:
    raise ValueError(f"the bare word {name}")


_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


def _members(value: dict[str, Any]) -> int:
    return len(value) + sum(_members(member) for member in value.values() if isinstance(member, dict))


@lru_cache(maxsize=1024)
def check_tensor_name(model: type[Message], name: str) -> str | None:
    """Refuse a tensor that the message has no place for.

    Returns:
        The object of the document that it belongs to; None if that holds nothing but tensors.

    Raises:
        ProblemError: names the tensor, and the sections that hold tensors.
    """
    section, _, leaf = name.partition(".")
    reserved = model.tensor_sections.get(section)
    if reserved is None or not leaf or leaf in reserved or "." in leaf:
        wanted = " or ".join(f"{s}.<name>" for s in model.tensor_sections)
        raise ProblemError(field_name(name), "a tensor of that name", wanted)
    return section if section in model.model_fields else None

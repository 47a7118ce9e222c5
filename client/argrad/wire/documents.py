"""From bytes to a checked document, and from pydantic's complaints to ours."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, TypeVar, get_args

import orjson
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from argrad.errors import ProblemError
from argrad.wire.errors import UnreadableBodyError
from argrad.wire.messages import Message

M = TypeVar("M", bound=Message)

_MAX_MEMBERS = 1000
_BOUNDS = {"ge": ">=", "le": "<=", "gt": ">", "lt": "<"}
_WANTED_BY_ERROR = {"missing": "a value", "model_type": "an object", "dict_type": "an object"}


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
        found = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise UnreadableBodyError(where, found, "JSON in UTF-8") from None
    if not isinstance(document, dict):
        raise ProblemError(where, in_words(document), "a JSON object")
    # orjson keeps the last of two equal keys. Every member has a colon, so a repeated key leaves a colon too many;
    # so does a colon inside a string, and only then the slower parser looks.
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


def validate(model: type[M], document: dict[str, Any]) -> M:
    """Turn a parsed JSON object into a message.

    Raises:
        ProblemError: names the first field that is wrong; for an unknown one, lists those that are known.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    path, known = _resolve(model, first["loc"])
    field = ".".join(path)
    if first["type"] == "extra_forbidden":
        raise ProblemError(field, "an unknown field", known)
    found = "nothing" if first["type"] == "missing" else in_words(first["input"])
    wanted = _WANTED_BY_ERROR.get(first["type"], first["msg"].removeprefix("Input should be "))
    for bound, sign in _BOUNDS.items():
        if bound in first.get("ctx", {}):
            wanted = f"a number {sign} {first['ctx'][bound]}"
    raise ProblemError(field, found, wanted)


def _resolve(model: type[Message], location: Iterable[int | str]) -> tuple[list[str], str]:
    """Dotted path of a pydantic error without its union tags, and what is known at its last object."""
    path: list[str] = []
    inside: type[Message] | None = model
    known = _known(model)
    for part in location:
        if inside is None and isinstance(part, str) and path:
            break
        path.append(field_name(str(part)))
        if inside is not None:
            known = _known(inside)
            inside = _model_of(inside.model_fields.get(str(part)))
    return path, known


def _model_of(field: FieldInfo | None) -> type[Message] | None:
    candidates = () if field is None else (field.annotation, *get_args(field.annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Message)), None)


def _known(model: type[Message]) -> str:
    fields = f"one of {', '.join(model.model_fields)}"
    sections = ", ".join(f"{name}.*" for name in model.tensor_sections)
    return f"{fields}; or tensors {sections}" if sections else fields


def check_tensor_name(model: type[Message], name: str) -> None:
    """Refuse a tensor that the message has no place for.

    Raises:
        ProblemError: names the tensor, and the sections that hold tensors.
    """
    section, _, leaf = name.partition(".")
    reserved = model.tensor_sections.get(section)
    if reserved is None or not leaf or leaf in reserved or "." in leaf:
        wanted = " or ".join(f"{s}.<name>" for s in model.tensor_sections)
        raise ProblemError(field_name(name), "a tensor of that name", wanted)


def field_name(name: str) -> str:
    """A name that came with the body, as messages print it: printable and at most 80 characters."""
    shown = name if name.isprintable() else ascii(name)
    return shown if len(shown) <= 80 else f"{shown[:79]}…"


def in_words(value: object) -> str:
    """A parsed JSON value as messages print it: short, and in JSON's own words."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}…"

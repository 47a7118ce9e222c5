"""Pydantic's complaints in our words: the field, what was found, what was wanted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from argrad.errors import ProblemError

M = TypeVar("M", bound=BaseModel)

_BOUNDS = {"ge": ">=", "le": "<=", "gt": ">", "lt": "<"}
_WANTED_BY_ERROR = {"missing": "a value", "model_type": "an object", "dict_type": "an object"}


def validate(model: type[M], document: Mapping[str, Any], *, inside: str = "") -> M:
    """Turn a parsed JSON object into a model.

    Args:
        model: What it is to be.
        document: The object.
        inside: Where it stands, in front of the names of fields: `solver.options`.

    Raises:
        ProblemError: names the first field that is wrong; for an unknown one, lists those that are known.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    path, known = _resolve(model, first["loc"])
    field = ".".join([*filter(None, [inside]), *path])
    if first["type"] == "extra_forbidden":
        raise ProblemError(field, "an unknown field", known)
    found = "nothing" if first["type"] == "missing" else in_words(first["input"])
    wanted = _WANTED_BY_ERROR.get(first["type"], first["msg"].removeprefix("Input should be "))
    if first["type"] == "too_long":
        found, wanted = f"{len(first['input'])} entries", f"at most {first['ctx']['max_length']}"
    elif path[-1:] == ["options"] and first["type"] != "dict_type":
        wanted = "of each option a number, a string, a truth value or null"
    if first["type"] == "string_pattern_mismatch":
        wanted = f"text that matches {first['ctx']['pattern']}"
    for bound, sign in _BOUNDS.items():
        if bound in first.get("ctx", {}):
            wanted = f"a number {sign} {first['ctx'][bound]}"
    raise ProblemError(field, found, wanted)


def _resolve(model: type[BaseModel], location: Iterable[int | str]) -> tuple[list[str], str]:
    """Dotted path of a pydantic error without its union tags, and what is known at its last object."""
    path: list[str] = []
    inside: type[BaseModel] | None = model
    known = _known(model)
    for part in location:
        if inside is None and isinstance(part, str) and path:
            break
        path.append(field_name(str(part)))
        if inside is not None:
            known = _known(inside)
            inside = _model_of(inside.model_fields.get(str(part)))
    return path, known


def _model_of(field: FieldInfo | None) -> type[BaseModel] | None:
    candidates = () if field is None else (field.annotation, *get_args(field.annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _known(model: type[BaseModel]) -> str:
    fields = f"one of {', '.join(model.model_fields)}" if model.model_fields else "none: there are no options"
    sections = ", ".join(f"{name}.*" for name in getattr(model, "tensor_sections", ()))
    return f"{fields}; or tensors {sections}" if sections else fields


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

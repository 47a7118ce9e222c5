"""The engine on a machine that has torch and NumPy and nothing else of what argrad asks for.

Stand-ins, each only where the package itself is missing: for `jaxtyping`, whose annotations the engine never reads, and
for the little of `pydantic` that options need when nobody sends any: their defaults. The client's own package is
entered without its `__init__`, which would import HTTP.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar


def enter_checkout(root: Path) -> None:
    """Make `argrad.problems`, `argrad_service.engine` and `benchmarks` importable from a checkout."""
    for place in ("client", "service", "."):
        sys.path.insert(0, str(root / place))
    missing = [name for name in ("jaxtyping", "pydantic", "httpx", "orjson") if find_spec(name) is None]
    if "jaxtyping" in missing:
        sys.modules["jaxtyping"] = _jaxtyping()
    if "pydantic" in missing:
        sys.modules["pydantic"] = sys.modules["pydantic.fields"] = _Pydantic("pydantic")
    if missing:
        sys.modules["argrad"] = _without_init("argrad", [root / "client"])


def _jaxtyping() -> ModuleType:
    module = ModuleType("jaxtyping")
    annotation = type("Annotation", (), {"__class_getitem__": classmethod(lambda _, item: item[0])})
    for name in ("Float", "Int", "Bool", "Shaped"):
        setattr(module, name, annotation)
    return module


class _BaseModel:
    """The fields that were given, and the defaults of the rest."""

    model_fields: ClassVar[dict[str, Any]] = {}
    """None are declared: nothing is said of options that nobody gave."""

    def __init__(self, **given: Any) -> None:
        for name, value in given.items():
            setattr(self, name, value)

    @classmethod
    def model_validate(cls, given: dict[str, Any], **_: Any) -> _BaseModel:
        return cls(**given)


class _Anything:
    """Whatever is called on or taken from it is itself; as a decorator it changes nothing."""

    def __call__(self, *arguments: Any, **_: Any) -> Any:
        return arguments[0] if len(arguments) == 1 and callable(arguments[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, item: Any) -> Any:
        return self


class _Pydantic(ModuleType):
    BaseModel = _BaseModel
    ValidationError = type("ValidationError", (ValueError,), {})

    @staticmethod
    def Field(default: Any = None, **_: Any) -> Any:
        return default

    @staticmethod
    def ConfigDict(**given: Any) -> dict[str, Any]:
        return given

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


def _without_init(name: str, places: list[Path]) -> ModuleType:
    """A package whose modules can be imported though it was not executed itself."""
    spec = PathFinder.find_spec(name, [str(place) for place in places])
    assert spec is not None
    module = ModuleType(name)
    module.__path__ = list(spec.submodule_search_locations or [])
    module.__spec__ = spec
    return module

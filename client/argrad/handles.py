"""Objects by a word of their own, for operators inside compiled graphs, which take words but no objects."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, TypeVar

T = TypeVar("T")

_numbers = itertools.count()
_objects: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def new_handle(thing: Any) -> str:
    """A word by which `look_up` finds an object for as long as it lives; nobody else's in this process."""
    handle = str(next(_numbers))
    _objects[handle] = thing
    return handle


def look_up(handle: str, kind: type[T]) -> T:
    """The object of a handle.

    Raises:
        RuntimeError: it is gone, or the handle is another process's: graphs do not travel.
    """
    thing = _objects.get(handle)
    if not isinstance(thing, kind):
        raise RuntimeError(f"a compiled graph asks for a {kind.__name__} that is not there any more: compile it anew")
    return thing

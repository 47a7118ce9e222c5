"""What solves of problems with the same parameters keep for one another.

Which tensors are the same is decided by identity, never by value: whoever holds a `Prepared` hands the engine problems
made of the very tensors that it was made with, and does not change them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


class Prepared:
    """Results that depend on known tensors alone. May be used by several solves at once.

    Args:
        tensors: Those that are the same at every solve.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        # The tensors are held, so that no other can get the id of one of them.
        self._known = {id(tensor): tensor for tensor in tensors}
        self._given = {tensor.untyped_storage().data_ptr() for tensor in self._known.values()}
        self._kept: dict[tuple[Any, ...], Any] = {}

    def knows(self, sources: Sequence[Tensor]) -> bool:
        """Whether what depends on these tensors may be kept."""
        return all(id(source) in self._known for source in sources)

    def find(self, what: str, sources: Sequence[Tensor]) -> Any:
        """What was kept under that name for these tensors, or None."""
        return self._kept.get((what, *map(id, sources))) if self.knows(sources) else None

    def keep(self, what: str, sources: Sequence[Tensor], made: T) -> T:
        """Keep something made of these tensors, if they are known; a tensor is known from then on too.

        Returns:
            What is kept: of two solves that make it at once, the first's.
        """
        if not self.knows(sources):
            return made
        kept: T = self._kept.setdefault((what, *map(id, sources)), made)
        if isinstance(kept, Tensor):
            self._known[id(kept)] = kept
        return kept

    def close(self) -> None:
        """Let go of everything, and keep nothing from now on."""
        self._known, self._kept = {}, {}

    @property
    def nbytes(self) -> int:
        """Bytes held beyond the given tensors."""
        found: dict[int, int] = {}
        for made in list(self._kept.values()):
            for part in made if isinstance(made, tuple) else (made,):
                if isinstance(part, Tensor):
                    storage = part.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
                else:
                    found[id(part)] = part.nbytes
        return sum(nbytes for where, nbytes in found.items() if where not in self._given)


def kept(prepared: Prepared | None, what: str, sources: Sequence[Tensor], make: Callable[[], T]) -> T:
    """What was kept, or what `make` makes, which is kept from then on; without a `Prepared`, made each time."""
    if prepared is None:
        return make()
    found = prepared.find(what, sources)
    return prepared.keep(what, sources, make()) if found is None else found

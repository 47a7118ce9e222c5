"""Forward state: what a token stands for."""

from __future__ import annotations

from dataclasses import dataclass

from argrad.problems import Form
from argrad_service.engine.outcome import Outcome


@dataclass(frozen=True, eq=False)
class Kept:
    """What a state token stands for.

    Args:
        form: The problem in the caller's form, with the caller's tensors.
        forward: Its outcome, on the engine's device.
        versions: Of the tensors before the solve; an in-process caller may edit them in place.
    """

    form: Form
    forward: Outcome
    versions: tuple[int, ...]

    @property
    def is_current(self) -> bool:
        """Whether nobody edited the caller's tensors since the solve."""
        return self.versions == versions_of(self.form)

    @property
    def nbytes(self) -> int:
        """Bytes that keeping this costs."""
        counted = {t.untyped_storage().data_ptr() for t in self.forward.problem.parameters().values()}
        storages = [
            tensor.untyped_storage()
            for tensor in (*self.form.parameters.values(), *self.form.problem.parameters().values())
        ]
        ours = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return self.forward.nbytes + sum(nbytes for where, nbytes in ours.items() if where not in counted)


def versions_of(form: Form) -> tuple[int, ...]:
    """How often each of the caller's tensors was edited in place so far."""
    return tuple(t._version for t in form.parameters.values() if not t.is_inference())

"""Forward state: what a token stands for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from argrad.errors import ProblemError
from argrad.problems import Form, Solution
from argrad.wire.messages import SolverDocument
from argrad_service.engine.outcome import Outcome
from argrad_service.registered import Named


@dataclass(frozen=True, eq=False)
class Kept:
    """What a state token stands for.

    Args:
        form: The problem in the caller's form, with the caller's tensors.
        forward: Its outcome, on the engine's device.
        versions: Of the tensors before the solve; an in-process caller may edit them in place.
        registered: Digest of parameters that the caller named instead of sending them.
        known: Names of those.
    """

    form: Form
    forward: Outcome
    versions: tuple[int, ...]
    registered: str | None = None
    known: frozenset[str] = frozenset()

    @property
    def solution(self) -> Solution:
        """Canonical, on the engine's device."""
        return self.forward.solution

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


@dataclass(frozen=True, eq=False)
class Recalled:
    """What a token of another replica stands for: problem and solution, of which nothing is factored here yet.

    Args:
        form: The problem in the caller's form.
        solution: Canonical, on the device of the tensors.
        solver: How exactly it was solved.
        named: Parameters that the caller named instead of sending them.
    """

    form: Form
    solution: Solution
    solver: SolverDocument
    named: Named | None = None

    is_current = True
    """Nobody here could edit its tensors."""

    @property
    def nbytes(self) -> int:
        """Bytes that keeping this costs."""
        tensors = [*self.form.parameters.values(), *self.form.problem.parameters().values()]
        storages = [tensor.untyped_storage() for tensor in (*tensors, *self.solution.blocks().values())]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def versions_of(form: Form) -> tuple[int, ...]:
    """How often each of the caller's tensors was edited in place so far."""
    return tuple(t._version for t in form.parameters.values() if not t.is_inference())


def warm_start_at(kept: Kept | Recalled, form: Form) -> Solution:
    """The solution of a state as where a solve of another problem begins; problems that failed begin at 0.

    Args:
        kept: The state; that its tensors were edited since does not matter.
        form: The problem that is to be solved.

    Raises:
        ProblemError: the problem is of another form or other sizes.
    """
    found, wanted = ((type(f), f.batch_size, f.block_sizes) for f in (kept.form, form))
    if found != wanted:
        sizes = "a batch of {} with blocks of {}"
        raise ProblemError("warm_start.state", sizes.format(*found[1:]), sizes.format(*wanted[1:]))
    blocks = kept.form.solution(kept.solution)
    like = form.problem.q
    finite = {name: torch.nan_to_num(t, 0.0, 0.0, 0.0).to(like) for name, t in blocks.items() if name != "s"}
    return form.point(finite, section="warm_start")

"""Registered parameters: sent once, named by the digest of their content, merged into the problems of later calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from argrad.errors import ProblemError
from argrad.problems import Form, Solution
from argrad.problems.content import check_registrable, digest, dtype_name
from argrad.wire.messages import ProblemDocument, RegisteredReply, RegisterRequest, TensorDocument, TensorMap
from argrad_service.admission import Limits, Size, TooLarge
from argrad_service.engine import Prepared
from argrad_service.state import ProblemGone, ProblemStore


@dataclass(frozen=True, eq=False)
class Last:
    """A solution to begin at.

    Args:
        sizes: Of its problem.
        blocks: The caller's, of numbers that are finite; without the slack.
    """

    sizes: tuple[object, ...]
    blocks: dict[str, Tensor]


class Registration:
    """Parameters of a problem, checked, with what solving them leaves for the next time.

    Args:
        kind: Of the problem.
        tensors: By name, without `problem.`; nobody changes them.
    """

    def __init__(self, kind: Literal["qp", "qp_two_sided", "sparse_qp"], tensors: Mapping[str, Tensor]) -> None:
        self.kind, self.tensors = kind, tensors
        self.prepared = Prepared(tensors.values())
        self._last: Last | None = None
        self.counted = self.nbytes
        self._versions = [tensor._version for tensor in tensors.values()]

    @property
    def is_current(self) -> bool:
        """Whether nobody edited the tensors since; an in-process caller could."""
        return self._versions == [tensor._version for tensor in self.tensors.values()]

    @property
    def nbytes(self) -> int:
        """Bytes that keeping this costs."""
        last = {} if self._last is None else self._last.blocks
        return sum(tensor.nbytes for tensor in (*self.tensors.values(), *last.values())) + self.prepared.nbytes

    def start(self, form: Form) -> Solution | None:
        """The last solution that was remembered, if it is of a problem of these sizes."""
        last = self._last
        if last is None or last.sizes != _sizes(form):
            return None
        like = form.problem.q
        return form.point({name: tensor.to(like) for name, tensor in last.blocks.items()}, section="warm_start")

    def remember(self, form: Form, blocks: Mapping[str, Tensor]) -> None:
        """Let the next solve of problems of these sizes begin here; what failed begins at 0.

        Args:
            form: The problem that was solved.
            blocks: Of its solution, the caller's.
        """
        finite = {name: torch.nan_to_num(t, 0.0, 0.0, 0.0) for name, t in blocks.items() if name != "s"}
        self._last = Last(_sizes(form), finite)


@dataclass(frozen=True, eq=False)
class Named:
    """A registration as a call names it.

    Args:
        registration: What is registered.
        digest: Under which name.
        owner: By whom.
        store: Where.
    """

    registration: Registration
    digest: str
    owner: str
    store: ProblemStore

    @property
    def prepared(self) -> Prepared:
        """What solves leave for each other."""
        return self.registration.prepared

    def recount(self) -> None:
        """Tell the store what a solve has added; what it has no room for is given up."""
        registration = self.registration
        nbytes = registration.nbytes
        if nbytes == registration.counted:
            return
        registration.counted = nbytes
        if not self.store.resize(self.digest, registration, nbytes=nbytes, owner=self.owner):
            registration.prepared.close()


class Registrations:
    """Registers parameters, and completes calls that name them.

    Args:
        store: Keeps registrations.
        limits: Bounds on one problem.
    """

    def __init__(self, store: ProblemStore, limits: Limits) -> None:
        self._store, self._limits = store, limits

    def register(
        self, request: RegisterRequest, tensors: TensorMap, *, name: str, owner: str
    ) -> tuple[RegisteredReply, bool]:
        """Keep parameters under the digest of their content.

        Args:
            request: Their kind.
            tensors: `problem.*`, which nobody changes from now on.
            name: The digest, as the caller has computed it.
            owner: Who may name them.

        Returns:
            What is registered, and whether it was not before.

        Raises:
            ProblemError: a parameter cannot be one, or the digest is not theirs.
            TooLarge: a problem of that size can never be solved here, or does not fit into the store.
        """
        kind = request.problem.kind
        parameters = {key.removeprefix("problem."): tensor for key, tensor in tensors.items()}
        Size.of(parameters).check(self._limits)
        check_registrable(kind, parameters)
        found = digest(kind, parameters)
        for field, claimed in (("sha256", name), ("problem.registered", request.problem.registered)):
            if claimed not in (None, found):
                raise ProblemError(field, f"{claimed}", f"{found}, the digest of the body's parameters")
        try:
            return _describe(self._get(name, owner), name), False
        except ProblemGone:
            pass
        registration = Registration(kind, parameters)
        if not self._store.put(name, registration, nbytes=registration.nbytes, owner=owner):
            limit = f"at most {self._store.budget_bytes} bytes (ARGRAD_PROBLEM_BUDGET_BYTES)"
            raise TooLarge("parameters to register", f"{registration.nbytes} bytes", limit)
        return _describe(registration, name), True

    def describe(self, name: str, *, owner: str) -> RegisteredReply:
        """What is registered under a digest.

        Raises:
            ProblemGone: this owner has nothing there.
        """
        return _describe(self._get(name, owner), name)

    def delete(self, name: str, *, owner: str) -> None:
        """Forget what is registered under a digest; calls under way go on.

        Raises:
            ProblemGone: this owner has nothing there.
        """
        self._store.delete(name, owner=owner)

    def find(self, document: ProblemDocument, given: Mapping[str, Tensor], *, owner: str) -> Named | None:
        """The registration that a call names, if it names one.

        Args:
            document: `problem` of the call.
            given: The parameters that the call sends.
            owner: Whose call it is.

        Raises:
            ProblemGone: this owner has nothing there.
            ProblemError: it is of another kind, or has a parameter that is sent too.
        """
        if document.registered is None:
            return None
        registration = self._get(document.registered, owner)
        if document.kind != registration.kind:
            raise ProblemError("problem.kind", repr(document.kind), f"{registration.kind!r}, as it was registered")
        for name in given:
            if name in registration.tensors:
                raise ProblemError(f"problem.{name}", "a tensor, and one registered", "one of the two")
        return Named(registration, document.registered, owner, self._store)

    def _get(self, name: str, owner: str) -> Registration:
        registration: Registration = self._store.get(name, owner=owner)
        if not registration.is_current:
            self._store.delete(name, owner=owner)
            raise ProblemGone
        return registration


def _sizes(form: Form) -> tuple[object, ...]:
    return type(form), form.batch_size, tuple(form.block_sizes.items())


def _describe(registration: Registration, name: str) -> RegisteredReply:
    tensors = registration.tensors
    return RegisteredReply(
        kind=registration.kind,
        registered=name,
        nbytes=sum(tensor.nbytes for tensor in tensors.values()),
        tensors={
            key: TensorDocument(dtype=dtype_name(tensor), shape=list(tensor.shape)) for key, tensor in tensors.items()
        },
    )

"""Parameters that travel once: registered ones are named by their digest in every later call.

`Registry` rewrites exchanges: parameters that are registered memory leave the message, their digest enters it. What is
registered is a cache of the service's and never a condition of an answer: where it is gone, it is registered again and
the call repeated; where there is no room for it, the parameters are sent as if nothing had been registered.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from argrad.backend import Call
from argrad.errors import PayloadTooLargeError, ProblemError, ProblemGoneError
from argrad.operations import Exchange, Reply, less
from argrad.problems.content import check_registrable, digest_of, line_of
from argrad.wire.messages import ProblemDocument, RegisterRequest

Kind = Literal["qp", "qp_two_sided", "sparse_qp"]
Registering = Literal["auto", "explicit"]

FAILURES = (ProblemGoneError, PayloadTooLargeError)
"""What a driver of `Registry.steps` throws into it."""

AUTOMATIC_BYTES = 1 << 20
"""Parameters from this size are hashed at each call where the client registers by itself."""

_PREFIX = "problem."
_MAX_REMEMBERED = 32
"""Contents that are remembered: no more than what a service has room for, where parameters take turns."""

_TRIALS = 4
"""Calls in a row with new content in a parameter after which most are taken to bring new content too."""

_PERIOD = 16
"""Of those calls every so-manieth is looked at."""


class Registrar(Protocol):
    """A client, as a handle knows it."""

    @property
    def registry(self) -> Registry:
        """What it has registered."""
        ...


class Registered(Mapping[str, Tensor]):
    """Registered parameters by name, to be passed on as they are: `solve_qp(client, q=q, **registered)`.

    The tensors are copies of what was registered, and are not to be changed; one that was edited in place is sent like
    any other. They are recognised by their memory for as long as this object lives, which survives a fork and pickles
    together with its client.

    Args:
        client: Whose calls may name them.
        kind: Of the problem.
        tensors: Memory of their own.
        digest: Of their content.
    """

    def __init__(self, client: Registrar, kind: Kind, tensors: Mapping[str, Tensor], digest: str) -> None:
        self._client, self.kind, self.digest = client, kind, digest
        self._tensors = dict(tensors)
        self._versions = {name: tensor._version for name, tensor in self._tensors.items()}
        self.nbytes = sum(tensor.nbytes for tensor in self._tensors.values())
        client.registry.adopt(self)

    def has(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor is, unchanged, the parameter of that name."""
        own = self._tensors.get(name)
        return (
            own is not None
            and own.shape == tensor.shape
            and own.stride() == tensor.stride()
            and own.dtype == tensor.dtype
            and own.data_ptr() == tensor.data_ptr()
            and own._version == self._versions[name]
        )

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __copy__(self) -> Registered:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Registered:
        """Copies of a layer share what it has registered."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Registered, (self._client, self.kind, self._tensors, self.digest)

    def __repr__(self) -> str:
        return f"Registered({', '.join(self)}; {self.nbytes} bytes)"


@dataclass(frozen=True)
class Found:
    """What the message of a call may leave out: the digest of some parameters, and their names."""

    digest: str
    names: tuple[str, ...]


class Registry:
    """What one client has registered. Safe on any thread.

    Args:
        is_automatic: Whether large parameters that need no gradient are hashed at each call, and registered when they
            come a second time.
    """

    def __init__(self, *, is_automatic: bool) -> None:
        self._is_automatic = is_automatic
        self._lock = threading.Lock()
        self._handles: dict[int, weakref.ref[Registered]] = {}
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._news: dict[tuple[str, torch.Size], int] = {}
        self._refused: OrderedDict[str, None] = OrderedDict()

    def adopt(self, handle: Registered) -> None:
        """Recognise the memory of a handle for as long as it lives."""
        pointers = [tensor.data_ptr() for tensor in handle.values()]
        handles = self._handles

        def forget(dead: weakref.ref[Registered]) -> None:
            # Takes no lock: it may run in the middle of anything. Each step is one operation on a dict.
            for pointer in pointers:
                if handles.get(pointer) is dead:
                    handles.pop(pointer, None)

        reference = weakref.ref(handle, forget)
        handles.update(dict.fromkeys(pointers, reference))

    def trusted(self, parameters: Mapping[str, Tensor]) -> frozenset[str]:
        """Names of the parameters whose values were checked when they were registered."""
        if not self._handles:
            return frozenset()
        return frozenset(name for name, tensor in parameters.items() if self._handle_of(name, tensor) is not None)

    def steps(self, exchange: Exchange) -> Generator[Exchange, Reply, Reply]:
        """Carry out an exchange, with parameters that are registered left out."""
        found = self._find(exchange)
        if found is None:
            return (yield exchange)
        request: Any = exchange.request
        kind, sent = request.problem.kind, {_PREFIX + name for name in found.names}
        problem = ProblemDocument(kind=kind, registered=found.digest)
        rest = {name: tensor for name, tensor in exchange.tensors.items() if name not in sent}
        short = replace(exchange, request=request.model_copy(update={"problem": problem}), tensors=rest)
        began = time.monotonic()

        def left(part: Exchange) -> Exchange:
            return replace(part, call=less(exchange.call, time.monotonic() - began))

        try:
            return (yield short)
        except ProblemGoneError:
            pass
        whole = {name: exchange.tensors[name] for name in sorted(sent)}
        try:
            yield left(Exchange("register", RegisterRequest(problem=problem), whole, exchange.call))
        except PayloadTooLargeError:
            self._remember(self._refused, found.digest)
            return (yield left(_unregistered(exchange)))
        try:
            return (yield left(short))
        except ProblemGoneError:  # pushed out in between: there is too little room for what is registered there
            return (yield left(_unregistered(exchange)))

    def _find(self, exchange: Exchange) -> Found | None:
        if not (self._handles or self._is_automatic):
            return None
        document = getattr(exchange.request, "problem", None)
        if document is None or exchange.name == "register" or document.registered is not None:
            return None
        given = {
            name: tensor
            for key, tensor in exchange.tensors.items()
            if key.startswith(_PREFIX) and (name := key.removeprefix(_PREFIX)) not in exchange.learned
        }
        found = self._find_handle(document.kind, given)
        if found is None and self._is_automatic:
            found = self._find_content(document.kind, given)
        return None if found is None or found.digest in self._refused else found

    def _find_handle(self, kind: str, given: Mapping[str, Tensor]) -> Found | None:
        """The handle with the most bytes all of whose parameters are given."""
        handles = {
            id(handle): handle
            for name, tensor in given.items()
            if (handle := self._handle_of(name, tensor)) is not None and handle.kind == kind
        }
        whole = [
            handle
            for handle in handles.values()
            if all(name in given and self._handle_of(name, given[name]) is handle for name in handle)
        ]
        if not whole:
            return None
        largest = max(whole, key=lambda handle: handle.nbytes)
        return Found(largest.digest, tuple(largest))

    def _handle_of(self, name: str, tensor: Tensor) -> Registered | None:
        if tensor.layout != torch.strided or tensor.requires_grad:
            return None
        try:
            reference = self._handles.get(tensor.data_ptr())
        except RuntimeError:  # a tensor of torch.func, which has no memory of its own
            return None
        handle = None if reference is None else reference()
        return handle if handle is not None and handle.has(name, tensor) else None

    def _find_content(self, kind: str, given: Mapping[str, Tensor]) -> Found | None:
        """Large parameters whose very content was sent before."""
        lines: dict[str, str] = {}
        for name, tensor in given.items():
            if not _may_be_constant(tensor):
                continue
            place = (name, tensor.shape)
            news = self._news.get(place, 0)
            self._news[place] = news + 1
            if news >= _TRIALS and news % _PERIOD:
                continue
            line = line_of(name, tensor)
            if line in self._seen:
                lines[name] = line
                self._news[place] = 0
            self._remember(self._seen, line)
        return Found(digest_of(kind, lines), tuple(lines)) if lines else None

    def _remember(self, memory: OrderedDict[str, None], word: str) -> None:
        with self._lock:
            memory[word] = None
            memory.move_to_end(word)
            if len(memory) > _MAX_REMEMBERED:
                memory.popitem(last=False)
            if len(self._news) > _MAX_REMEMBERED:
                self._news.clear()


def _unregistered(exchange: Exchange) -> Exchange:
    """A call that sends all that it has, and so cannot begin at the last solution of what is registered."""
    start = getattr(exchange.request, "warm_start", None)
    if start is None or not start.registered:
        return exchange
    return replace(exchange, request=exchange.request.model_copy(update={"warm_start": None}))


def _may_be_constant(tensor: Tensor) -> bool:
    """Whether a parameter is worth hashing; one on a GPU would have to be copied for it."""
    is_plain = tensor.is_cpu and tensor.layout == torch.strided
    return is_plain and tensor.nbytes >= AUTOMATIC_BYTES and tensor.is_contiguous()


def own_copies(given: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Private, contiguous copies of parameters that are there, outside of autograd and of inference mode.

    Raises:
        ProblemError: one is not a dense tensor.
    """
    copies = {}
    for name, tensor in given.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise ProblemError(f"problem.{name}", type(tensor).__name__, "a torch.Tensor")
        if tensor.layout != torch.strided:
            raise ProblemError(f"problem.{name}", f"layout {tensor.layout}", "a dense tensor")
        with torch.inference_mode(False), torch.no_grad():
            copies[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return copies


def handle_for(client: Registrar, kind: Kind, given: Mapping[str, Tensor | None]) -> Registered:
    """A handle of parameters that are not sent yet: the first call that they are part of sends them.

    Raises:
        ProblemError: see `argrad.problems.content.check_registrable`.
    """
    tensors = own_copies(given)
    check_registrable(kind, tensors)
    lines = {name: line_of(name, tensor) for name, tensor in tensors.items()}
    return Registered(client, kind, tensors, digest_of(kind, lines))


def register(handle: Registered, call: Call) -> Generator[Exchange, Reply, Registered]:
    """PUT /v1/problems/{sha256}."""
    problem = ProblemDocument(kind=handle.kind, registered=handle.digest)
    tensors = {_PREFIX + name: tensor for name, tensor in handle.items()}
    yield Exchange("register", RegisterRequest(problem=problem), tensors, call)
    return handle

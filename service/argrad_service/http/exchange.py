"""The life of one call: bytes in, prepared, solved on another thread, bytes out."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

from argrad.wire import (
    JSON,
    ZSTD,
    JsonLimits,
    body_encoding,
    body_format,
    decode,
    reply_encoding,
    reply_format,
)
from argrad.wire.messages import Message as Document
from argrad.wire.messages import SolveReply, TensorMap
from argrad_service.engine.options import ShouldStop
from argrad_service.http.body import INLINE_BINARY_BYTES, INLINE_BYTES, Body, read_body
from argrad_service.http.compressed import read_compressed
from argrad_service.http.doors import Doors
from argrad_service.http.idempotency import HEADER, Once, check_key, fingerprint_of
from argrad_service.http.phases import Phases
from argrad_service.http.problems import BadRequest, BodyTooSlow
from argrad_service.http.record import Record
from argrad_service.http.replies import BufferedReply, write_reply
from argrad_service.operations import Operations
from argrad_service.scheduling import DeadlinePassed, Job, Overloaded, Pending, Scheduler, Share
from argrad_service.settings import Settings, variable
from argrad_service.sharing import Sharing
from argrad_service.solves import Solve
from argrad_service.state import StateGone
from argrad_service.together import Participant, pull_back_together, solve_together
from argrad_service.vjps import Vjp
from argrad_service.working import Reply, Run, Timings

MAX_RELEASED = 256
"""Most tokens in one Argrad-Release header."""

Asked = TypeVar("Asked", bound=Document)
AskedIn = TypeVar("AskedIn", bound=Document, contravariant=True)
ReplyOut = TypeVar("ReplyOut", bound=Document, covariant=True)
T = TypeVar("T")


class Prepare(Protocol[AskedIn, ReplyOut]):
    """First half of an operation, such as `Operations.prepare_solve`."""

    def __call__(self, request: AskedIn, tensors: TensorMap, *, owner: str, is_json: bool) -> Run[ReplyOut]:
        """Check a request; what it returns solves it."""
        ...


@dataclass(frozen=True)
class Exchange:
    """What every call passes through.

    Args:
        settings: Limits and times.
        operations: Release states.
        scheduler: Solves.
        pending: Counts calls and their bodies.
        codecs: Threads for large bodies.
        once: Serves calls that have an `Idempotency-Key`.
        phases: Counts calls by where they are.
        doors: Let them in.
        sharing: States and registrations of other replicas; None where there are no others.
    """

    settings: Settings
    operations: Operations
    scheduler: Scheduler
    pending: Pending
    codecs: ThreadPoolExecutor
    once: Once
    phases: Phases = field(default_factory=Phases)
    doors: Doors = field(default_factory=Doors)
    sharing: Sharing | None = None

    async def call(
        self, request: Request, model: type[Asked], prepare: Prepare[Asked, Reply], *, is_backward: bool
    ) -> Response:
        """Serve one call.

        Args:
            request: Its body is not read yet.
            model: Document that the body must hold.
            prepare: First half of the operation.
            is_backward: Whether it goes before forwards in the queue.

        Raises:
            Exception: whatever `http.problems.KINDS` lists.
        """
        headers, record = request.headers, Record.of(request.scope)
        deadline = time.monotonic() + self._timeout_s(headers)
        source = body_format(headers.get("content-type"))
        target = reply_format(headers.get("accept"), default=source)
        encoding = reply_encoding(headers.get("accept-encoding"))
        owner, key = record.owner, headers.get(HEADER)
        if key is not None:
            check_key(key)
        self._release(headers, owner)
        with self._counted() as reserve:
            with self.phases.of("read"):
                body = await self._read(request, source, deadline, reserve)
            record.stages_ms["read"] = record.elapsed_ms
            record.request_bytes = len(body)

            forms = (source, target, encoding)
            serve = functools.partial(
                self._serve,
                request,
                model,
                prepare,
                body,
                forms,
                deadline=deadline,
                is_backward=is_backward,
                owner=owner,
            )
            if key is None:
                return await serve()
            path = request.scope["path"]
            same = await self._stage(record, "decode", len(body), lambda: fingerprint_of(path, forms, body))
            return await self.once.serve(key, owner, same, serve)

    async def _serve(
        self,
        request: Request,
        model: type[Asked],
        prepare: Prepare[Asked, Reply],
        body: Body,
        forms: tuple[str, str, str],
        *,
        deadline: float,
        is_backward: bool,
        owner: str,
    ) -> BufferedReply:
        """Serve a call whose body is here; `forms` are its format, the reply's, and the reply's encoding."""
        record, sharing, (source, target, encoding) = Record.of(request.scope), self.sharing, forms

        def read() -> tuple[Asked, TensorMap]:
            return decode(model, body, source, limits=self._json_limits)

        def prepared(document: Asked, tensors: TensorMap) -> Run[Reply]:
            return prepare(document, tensors, owner=owner, is_json=target == JSON)

        here = INLINE_BYTES if source == JSON else INLINE_BINARY_BYTES
        if sharing is None:
            run = await self._stage(record, "decode", len(body), lambda: prepared(*read()), here)
            reply, tensors = await self._run(run, deadline, record, request.receive, is_backward=is_backward)
        else:
            asked, given = await self._stage(record, "decode", len(body), read, here)
            await self._bring(sharing, asked, owner, record)
            run = await self._stage(record, "decode", len(body), lambda: prepared(asked, given), here)
            reply, tensors = await self._run(run, deadline, record, request.receive, is_backward=is_backward)
            sharing.publish(asked, reply, owner)
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        here = INLINE_BYTES if target == JSON or encoding == ZSTD else INLINE_BINARY_BYTES
        written = await self._stage(
            record, "encode", nbytes, lambda: write_reply(reply, tensors, target, encoding), here
        )
        _note_outcome(record, reply, tensors)
        record.reply_bytes = written.nbytes
        return written

    async def _bring(self, sharing: Sharing, document: Document, owner: str, record: Record) -> None:
        """Get what the call names and another replica has."""
        missing = sharing.missing(document, owner)
        if missing:
            began = record.starts["recall"] = time.perf_counter()
            await sharing.bring(missing, owner)
            record.stages_ms["recall"] = 1e3 * (time.perf_counter() - began)

    async def _run(
        self, run: Run[Reply], deadline: float, record: Record, receive: Receive, *, is_backward: bool
    ) -> tuple[Reply, TensorMap]:
        """Have a prepared call solved, when its turn comes."""
        timings = dict(record.stages_ms)

        def work(job: Job[tuple[Reply, TensorMap]]) -> tuple[Reply, TensorMap]:
            timings["queue"] = 1e3 * job.queued_s
            return run(job.should_stop, timings)

        share = _share(run, timings)
        record.starts["queue"] = time.perf_counter()
        job = self.scheduler.submit(work, deadline=deadline, is_backward=is_backward, share=share)
        result = await self.scheduler.result(job, lambda: _gone(receive))
        record.stages_ms.update(timings)
        return result

    async def receive(
        self, request: Request, model: type[Asked], work: Callable[[Asked, TensorMap], T]
    ) -> tuple[T, str]:
        """Read a body, and do what takes no solver with it.

        Args:
            request: Its body is not read yet.
            model: Document that the body must hold.
            work: What is to be done; on a thread of its own if the body is large.

        Returns:
            What came of it, and the format in which to answer.

        Raises:
            Exception: whatever `http.problems.KINDS` lists.
        """
        headers, record = request.headers, Record.of(request.scope)
        deadline = time.monotonic() + self._timeout_s(headers)
        source = body_format(headers.get("content-type"))
        target = reply_format(headers.get("accept"), default=source)
        self._release(headers, record.owner)
        with self._counted() as reserve:
            with self.phases.of("read"):
                body = await self._read(request, source, deadline, reserve)
            record.stages_ms["read"] = record.elapsed_ms
            record.request_bytes = len(body)

            def worked() -> T:
                return work(*decode(model, body, source, limits=self._json_limits))

            return await self._stage(record, "decode", len(body), worked), target

    async def forget(self, token: str, owner: str) -> None:
        """Free a state here, and for the other replicas.

        Raises:
            StateGone: it was in neither place.
        """
        was_shared = self.sharing is not None and await self.sharing.delete_state(token, owner)
        try:
            self.operations.release(token, owner=owner)
        except StateGone:
            if not was_shared:
                raise

    @property
    def _json_limits(self) -> JsonLimits:
        nbytes = int(self.settings.max_json_bytes)
        return JsonLimits(
            max_bytes=nbytes,
            max_brackets=nbytes // 10,
            max_numbers=self.settings.max_json_numbers,
            max_depth=self.settings.max_json_depth,
            numbers_setting="ARGRAD_MAX_JSON_NUMBERS",
            depth_setting="ARGRAD_MAX_JSON_DEPTH",
        )

    def _timeout_s(self, headers: Headers) -> float:
        text = headers.get("argrad-timeout-ms")
        if text is None:
            return self.settings.timeout_s
        try:
            asked = float(text)
        except ValueError:
            asked = math.nan
        if not 0 < asked < math.inf:
            raise BadRequest("Argrad-Timeout-Ms", repr(text[:40]), "milliseconds, more than 0")
        return min(1e-3 * asked, self.settings.timeout_s)

    def _release(self, headers: Headers, owner: str) -> None:
        """Free the states that the client's finalisers let go of; whether they were still there does not matter."""
        text = headers.get("argrad-release")
        if text is None:
            return
        tokens = [token.strip() for token in text.split(",")]
        if len(tokens) > MAX_RELEASED:
            raise BadRequest("Argrad-Release", f"{len(tokens)} tokens", f"at most {MAX_RELEASED}")
        for token in tokens:
            with contextlib.suppress(StateGone):
                self.operations.release(token, owner=owner)
            if self.sharing is not None:
                self.sharing.release(token, owner)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[Callable[[int], None]]:
        """Count the call, and its body as far as it is in memory, for as long as this is open."""
        task = self.doors.enter()
        if not self.pending.enter():
            self.doors.leave(task)
            message = f"{self.pending.calls} calls are in the house, the limit (ARGRAD_MAX_PENDING)"
            raise Overloaded(message, self.scheduler.retry_after_s())
        held = 0

        def reserve(nbytes: int) -> None:
            nonlocal held
            if not self.pending.grow(nbytes):
                message = f"{self.pending.nbytes} bytes of bodies are in memory (ARGRAD_MAX_PENDING_BYTES)"
                raise Overloaded(message, self.scheduler.retry_after_s())
            held += nbytes

        try:
            yield reserve
        except asyncio.CancelledError:
            self.doors.check_cancelled(task)
            raise
        finally:
            self.pending.leave(held)
            self.doors.leave(task)

    async def _read(self, request: Request, source: str, deadline: float, reserve: Callable[[int], None]) -> Body:
        settings, headers = self.settings, request.headers
        encoding = body_encoding(headers.get("content-encoding"))
        is_json = source == JSON and settings.max_json_bytes < settings.max_body_bytes
        name, advice = ("max_json_bytes", "; the binary form may be larger") if is_json else ("max_body_bytes", "")
        max_bytes = int(getattr(settings, name))
        limit = f"at most {max_bytes} bytes ({variable(name)}{advice})"
        left_s = deadline - time.monotonic()
        length, receive = headers.get("content-length"), request.receive
        try:
            async with asyncio.timeout(min(settings.body_timeout_s, left_s)):
                if encoding == ZSTD:
                    return await read_compressed(
                        receive, length, max_bytes=max_bytes, limit=limit, reserve=reserve, in_thread=self._in_thread
                    )
                return await read_body(receive, length, max_bytes=max_bytes, limit=limit, reserve=reserve)
        except TimeoutError:
            if left_s < settings.body_timeout_s:
                raise DeadlinePassed("the deadline passed before the body was complete") from None
            message = f"the body was not complete after {settings.body_timeout_s:g} s (ARGRAD_BODY_TIMEOUT_S)"
            raise BodyTooSlow(message) from None

    async def _stage(
        self, record: Record, name: str, nbytes: int, work: Callable[[], T], here: int = INLINE_BYTES
    ) -> T:
        """Time some work, done here up to so many bytes, else on a thread of its own."""
        began = time.perf_counter()
        record.starts.setdefault(name, began)
        with self.phases.of(name):
            result = work() if nbytes <= here else await self._in_thread(work)
        record.stages_ms[name] = record.stages_ms.get(name, 0.0) + 1e3 * (time.perf_counter() - began)
        return result

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.codecs, work)


def _share(run: Run[Reply], timings: Timings) -> Share[tuple[Reply, TensorMap]] | None:
    """How a call may be done together with others'."""
    if not isinstance(run, Solve | Vjp) or run.lot is None or run.lot.key is None:
        return None
    lot, item = run.lot, (run, timings)
    return Share(key=lot.key, flops=lot.flops, nbytes=lot.nbytes, item=item, together=_together)


def _together(jobs: Sequence[Job[Any]], should_stop: ShouldStop) -> list[Any]:
    """Do several calls as one batch; those whose callers left meanwhile have lost their `share`."""
    shares = [job.share for job in jobs]
    participants: list[Participant[Any]] = []
    for job, share in zip(jobs, shares, strict=True):
        if share is not None:
            asked, timings = share.item
            timings["queue"] = 1e3 * job.queued_s
            participants.append(Participant(asked=asked, timings=timings, has_left=job.should_stop))
    if not participants:
        return [None] * len(jobs)
    work = solve_together if isinstance(participants[0].asked, Solve) else pull_back_together
    answers = iter(work(participants, should_stop))
    return [None if share is None else next(answers) for share in shares]


async def _gone(receive: Receive) -> None:
    """Return once the caller's connection is broken; the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _note_outcome(record: Record, reply: Document, tensors: TensorMap) -> None:
    """What came of the problems of a solve."""
    if not isinstance(reply, SolveReply):
        return
    statuses = [reply.status] if isinstance(reply.status, str) else reply.status
    record.problems = Counter(statuses)
    record.solver, record.iterations = reply.report.solver, tensors.get("report.iterations")

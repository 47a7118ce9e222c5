"""PUT, GET and DELETE of /v1/problems/{sha256}: no solver is involved."""

from __future__ import annotations

import re

from starlette.requests import Request
from starlette.responses import Response

from argrad.errors import ProblemError
from argrad.wire import JSON, encode, reply_format
from argrad.wire.messages import ProblemDocument, RegisteredReply, RegisterRequest, SolveRequest, TensorMap
from argrad_service.http.exchange import Exchange
from argrad_service.http.record import Record
from argrad_service.registered import Registrations
from argrad_service.state import ProblemGone

_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


class RegistrationCalls:
    """Serves the three calls.

    Args:
        exchange: Reads bodies, under its limits.
        registrations: Keeps parameters.
    """

    def __init__(self, exchange: Exchange, registrations: Registrations) -> None:
        self._exchange, self._registrations = exchange, registrations

    async def put(self, request: Request) -> Response:
        """Register; 201 if it was not registered before, else 200."""
        name, owner = _name(request), Record.of(request.scope).owner

        def register(document: RegisterRequest, tensors: TensorMap) -> tuple[RegisteredReply, bool]:
            return self._registrations.register(document, tensors, name=name, owner=owner)

        (reply, is_new), target = await self._exchange.receive(request, RegisterRequest, register)
        if (sharing := self._exchange.sharing) is not None:
            await sharing.publish_problem(name, owner)
        return _answer(reply, target, 201 if is_new else 200)

    async def get(self, request: Request) -> Response:
        """Say what is registered."""
        target, name = reply_format(request.headers.get("accept"), default=JSON), _name(request)
        owner = Record.of(request.scope).owner
        if (sharing := self._exchange.sharing) is not None:
            named = SolveRequest(problem=ProblemDocument(registered=name))
            await sharing.bring(sharing.missing(named, owner), owner)
        return _answer(self._registrations.describe(name, owner=owner), target, 200)

    async def delete(self, request: Request) -> Response:
        """Forget what is registered."""
        name, sharing, owner = _name(request), self._exchange.sharing, Record.of(request.scope).owner
        was_shared = sharing is not None and await sharing.delete_problem(name, owner)
        try:
            self._registrations.delete(name, owner=owner)
        except ProblemGone:
            if not was_shared:
                raise
        return Response(status_code=204)


def _name(request: Request) -> str:
    name: str = request.path_params["sha256"]
    if not _DIGEST.fullmatch(name):
        raise ProblemError("sha256", repr(name[:80]), "64 hexadecimal digits, lower case")
    return name


def _answer(reply: RegisteredReply, target: str, status: int) -> Response:
    return Response(b"".join(encode(reply, {}, target)), status, media_type=target)

"""The three calls, without the framework's layers around them: a small solve costs less than its routing."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from argrad_service.http.problems import KINDS, answer

PATHS = ("/v1/solve", "/v1/vjp", "/v1/jvp")


class Calls:
    """ASGI application that serves POST to the paths above by the same functions as their documented routes.

    Args:
        app: Has the routes.
    """

    def __init__(self, app: FastAPI) -> None:
        found = {route.path: route for route in app.routes if isinstance(route, APIRoute)}
        self._routes = {path: found[path] for path in PATHS}
        self._known = tuple(KINDS)

    def serves(self, scope: Scope) -> bool:
        """Whether a request is one of these calls; every other takes the framework's way."""
        return scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in self._routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one call."""
        scope["route"] = route = self._routes[scope["path"]]
        request = Request(scope, receive)
        try:
            response = await route.endpoint(request)
        except self._known as error:
            response = await answer(request, error)
        await response(scope, receive, send)


class Service(FastAPI):
    """The application, with a lane of its own for the calls once there is one."""

    calls: Calls | None = None
    lane: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if self.lane is not None and self.calls is not None and self.calls.serves(scope):
            await self.lane(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

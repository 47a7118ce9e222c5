"""The routes; what they answer is documented where they are made."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from argrad.wire.messages import JvpRequest, SolveRequest, VjpRequest
from argrad_service.http import openapi
from argrad_service.http.exchange import Exchange
from argrad_service.http.health import Readiness
from argrad_service.http.metrics import Metrics
from argrad_service.http.pages import documentation
from argrad_service.http.record import Record
from argrad_service.http.registration import RegistrationCalls
from argrad_service.registered import Registrations

_JSON = "application/json"


class DirectRoute(APIRoute):
    """A route whose function takes the request and returns the response: FastAPI documents it and looks no further."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The function itself, without the search for parameters, dependencies and bodies that it has none of."""
        handler: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return handler

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """HEAD is GET whose reply has no body, which the server sees to; OpenAPI does not list it apart."""
        match, child = super().matches(scope)
        return (Match.FULL if match is Match.PARTIAL and self._is_head(scope) else match), child

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer HEAD as GET is answered."""
        if self._is_head(scope):
            await self.app(scope, receive, send)
        else:
            await super().handle(scope, receive, send)

    def _is_head(self, scope: Scope) -> bool:
        return scope["method"] == "HEAD" and "GET" in (self.methods or ())


def add_routes(
    app: FastAPI, exchange: Exchange, registrations: Registrations, readiness: Readiness, metrics: Metrics
) -> None:
    """Give an application every route of the service.

    Args:
        app: Has no routes of its own yet, but for its documentation.
        exchange: Serves the calls.
        registrations: Keeps the parameters that calls name.
        readiness: Answers the probe.
        metrics: Scraped.
    """
    app.router.route_class = DirectRoute
    operations = exchange.operations

    @app.post("/v1/solve", tags=["v1"], summary="Solve a batch, and differentiate it if asked", **openapi.SOLVE)
    async def solve(request: Request) -> Response:
        """Solve a batch of problems. With `upstream` in the body the reply has the gradients too."""
        return await exchange.call(request, SolveRequest, operations.prepare_solve, is_backward=False)

    @app.post("/v1/vjp", tags=["v1"], summary="Pull cotangents back to the parameters", **openapi.VJP)
    async def vjp(request: Request) -> Response:
        """Vector–Jacobian products, at a state that a solve left behind or at a point that the caller sends."""
        return await exchange.call(request, VjpRequest, operations.prepare_vjp, is_backward=True)

    @app.post("/v1/jvp", tags=["v1"], summary="Push tangents of parameters to the solution", **openapi.JVP)
    async def jvp(request: Request) -> Response:
        """Jacobian–vector products, at a state that a solve left behind or at a point that the caller sends."""
        return await exchange.call(request, JvpRequest, operations.prepare_jvp, is_backward=True)

    @app.delete("/v1/states/{token}", tags=["v1"], summary="Free forward state early", **openapi.DELETE_STATE)
    async def delete_state(request: Request) -> Response:
        """Forget a state. A token that names none is `state-gone`, as everywhere."""
        await exchange.forget(request.path_params["token"], Record.of(request.scope).owner)
        return Response(status_code=204)

    @app.get("/docs", include_in_schema=False)
    async def docs(_: Request) -> Response:
        return documentation(app.title)

    _add_problem_routes(app, RegistrationCalls(exchange, registrations))

    @app.get("/v1/solvers", tags=["v1"], summary="What can be solved and differentiated, and how", **openapi.SOLVERS)
    async def solvers(_: Request) -> Response:
        """Solvers, differentiation methods, which pairs exist, and their options."""
        return Response(orjson.dumps(operations.solvers()), media_type=_JSON)

    @app.get("/health/live", tags=["operation"], summary="Whether the process answers", **openapi.LIVE)
    async def live(_: Request) -> Response:
        """Answers at once, whatever is being solved."""
        return Response(b'{"status":"live"}', media_type=_JSON)

    @app.get("/health/ready", tags=["operation"], summary="Whether to send work", **openapi.READY)
    async def ready(request: Request) -> Response:
        """Ready once a first solve has gone through both paths; 503 before that and while stopping.

        Where keys are asked for, what was found (`checks`) is for those who have one.
        """
        report = readiness.report(is_detailed=Record.of(request.scope).is_trusted)
        return Response(orjson.dumps(report), media_type=_JSON)

    @app.get("/metrics", tags=["operation"], summary="Prometheus metrics", **openapi.METRICS)
    async def scrape(request: Request) -> Response:
        """Counters, gauges and histograms in Prometheus' text format; of all workers, where there are several."""
        metrics_of_all = getattr(request.app.state, "metrics_of_all", None)
        text = metrics.render() if metrics_of_all is None else await asyncio.to_thread(metrics_of_all)
        return Response(text, media_type="text/plain; version=0.0.4")


def _add_problem_routes(app: FastAPI, registered: RegistrationCalls) -> None:
    @app.put("/v1/problems/{sha256}", tags=["v1"], summary="Register parameters by content", **openapi.PUT_PROBLEM)
    async def put_problem(request: Request) -> Response:
        """Keep parameters that later calls name by their digest instead of sending them."""
        return await registered.put(request)

    @app.get("/v1/problems/{sha256}", tags=["v1"], summary="What is registered", **openapi.GET_PROBLEM)
    async def get_problem(request: Request) -> Response:
        """Names, dtypes and shapes of what is registered under a digest, without its numbers."""
        return await registered.get(request)

    @app.delete("/v1/problems/{sha256}", tags=["v1"], summary="Forget what is registered", **openapi.DELETE_PROBLEM)
    async def delete_problem(request: Request) -> Response:
        """Forget registered parameters early. Forward state that was solved with them stays."""
        return await registered.delete(request)

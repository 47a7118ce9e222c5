"""schemathesis over the whole of /openapi.json, links included: what comes back is what the document says."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import schemathesis
from anyio.from_thread import start_blocking_portal
from asgi_lifespan import LifespanManager
from fastapi import FastAPI
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema

from argrad_service.http.guard import OPEN
from tests.fuzz.calls import LIMITS, MOST_S
from tests.fuzz.keys import FOREIGN, KEY, KEYS
from tests.fuzz.tally import Tally
from tests.service.support import make_app

PHASES = ("examples", "coverage", "fuzzing", "stateful")
OWNER = {"Authorization": f"Bearer {KEY}"}
_VERDICTS = ["2xx", "3xx", "4xx", "501", "504"]
"""What a caller can bring about: 501 by asking for an extra that is not installed, 504 by a deadline."""


def fuzz_api(examples: int, seed: int, phases: Sequence[str] = PHASES, *, who: str | None = None) -> Tally:
    """Test every operation alone, and sequences of operations along the links, each with so many examples a phase.

    The bodies that the schema can describe are right in form and hardly ever in substance: its examples are what
    succeeds here, and `tests.fuzz.calls` what goes deeper.

    Args:
        examples: Of each phase and operation.
        seed: Of all chance.
        phases: Of schemathesis.
        who: For a service that asks for keys, who calls, of `keys.WHO`.
    """
    tally, reached = Tally("openapi" if who is None else f"openapi, {who}"), set[str]()
    key = {"key": KEY, "wrong key": FOREIGN}.get(who or "")
    sent = {} if key is None else {"Authorization": f"Bearer {key}"}
    app = make_app(**LIMITS, allowed_hosts=["testserver"], api_keys=KEYS if who else "")  # what schemathesis calls it
    config = SchemathesisConfig.from_dict(
        {
            "seed": seed,
            "headers": sent,
            "generation": {"max-examples": examples, "with-security-parameters": False},
            "phases": {phase: {"enabled": phase in phases} for phase in PHASES},
            "checks": {
                "not_a_server_error": {"expected-statuses": _VERDICTS},
                # Whether numbers fit one another no schema can say, so that some of what it calls right is refused.
                "positive_data_acceptance": {"enabled": False},
                "negative_data_rejection": {"enabled": False},
                "max_response_time": MOST_S,
            },
        }
    )
    with ExitStack() as stack:
        portal = stack.enter_context(start_blocking_portal())
        stack.enter_context(portal.wrap_async_context_manager(_living(app)))
        while app.state.readiness.phase == "starting":
            time.sleep(0.01)
        with tally.timed():
            schema = schemathesis.openapi.from_asgi("/openapi.json", app, config=config, headers=OWNER if who else {})
            for event in from_schema(schema).execute():
                _note(tally, event, reached, is_stranger=who not in (None, "key"))
    for phase in phases:
        if phase not in reached:
            tally.find(phase.encode(), f"the phase {phase} was not run to its end")
    return tally


@asynccontextmanager
async def _living(app: FastAPI) -> AsyncIterator[None]:
    async with LifespanManager(app, startup_timeout=60, shutdown_timeout=60):
        yield


def _note(tally: Tally, event: Any, reached: set[str], *, is_stranger: bool) -> None:
    if isinstance(event, events.FatalError):
        raise event.exception
    if isinstance(event, events.NonFatalError):
        tally.find(event.label.encode(), f"{event.label}: {event.value!r}")
    if isinstance(event, events.PhaseFinished) and event.status in ("success", "failure"):
        reached.add(event.phase.name.value.lower())
    if not isinstance(event, events.ScenarioFinished):
        return
    for case, interaction in event.recorder.interactions.items():
        tally.inputs += 1
        response = interaction.response
        status = "none" if response is None else str(response.status_code)
        tally.outcomes[status] += 1
        tally.behaviours.add((event.label, str(event.phase), status))
        if response is not None:
            tally.slowest_s = max(tally.slowest_s, response.elapsed)
            path = urlsplit(interaction.request.uri).path
            if is_stranger and response.status_code != 401 and path not in OPEN:
                words = f"{response.status_code} without a key"
                tally.find(f"{interaction.request.method} {interaction.request.uri}".encode(), words)
        for check in event.recorder.checks.get(case, []):
            if check.failure_info is not None:
                failure = check.failure_info
                tally.find(failure.code_sample.encode(), f"{event.label}, {check.name}: {failure.failure}")

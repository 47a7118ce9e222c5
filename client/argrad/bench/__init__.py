"""`argrad bench`: load on a service, in a closed or an open loop, and what its callers wait for."""

from __future__ import annotations

import asyncio
import functools

from argrad.bench.batches import scrape
from argrad.bench.load import measure
from argrad.bench.plan import Plan
from argrad.bench.result import ResultDocument, now, result_of
from argrad.bench.steps import Stepper

__all__ = ["Plan", "ResultDocument", "run"]


def run(plan: Plan, api_key: str | None = None) -> ResultDocument:
    """Load a service as planned, once a first step has gone through; Ctrl-C ends it early.

    Args:
        plan: The load.
        api_key: Sent as `Authorization: Bearer`.

    Raises:
        ArgradError: the first step failed.
    """
    began, stepper = now(), Stepper(plan, api_key)
    asyncio.run(stepper.try_one())
    return result_of(plan, measure(plan, stepper, functools.partial(scrape, plan.url, api_key)), began)

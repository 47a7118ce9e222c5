"""What a client tells of each exchange with whoever solves: for timings, and for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from argrad.operations import Exchange, Reply


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One exchange with whoever solves.

    Args:
        name: `solve`, `vjp` or `jvp`.
        elapsed_s: Seconds from handing the request over to having the reply, retries included.
        timings_ms: What each stage took where the problem was solved, in milliseconds.
    """

    name: str
    elapsed_s: float
    timings_ms: Mapping[str, float]


Observer = Callable[[Observation], None]


def observe(observer: Observer, exchange: Exchange, reply: Reply, elapsed_s: float) -> None:
    """Tell an observer of an exchange."""
    observer(Observation(name=exchange.name, elapsed_s=elapsed_s, timings_ms=getattr(reply[0], "timings_ms", {})))

"""What the service says of its batches: two looks at `/metrics`, and the difference."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import httpx

from argrad.transport.address import parse_address

_TIMEOUT_S = 5.0
_SIZES = re.compile(r"^argrad_batch_calls_(sum|count) (\S+)$", re.MULTILINE)
_RELEASED = re.compile(r'^argrad_batches_total\{reason="([^"]+)"\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Calls that were solved, together or alone.

    Args:
        calls: So many,
        count: in so many batches,
        released: which went for these reasons.
    """

    calls: float
    count: float
    released: Mapping[str, float]

    def since(self, before: Batches) -> Batches | None:
        """What came after an earlier look; None if the service started anew in between."""
        released = {reason: number - before.released.get(reason, 0.0) for reason, number in self.released.items()}
        calls, count = self.calls - before.calls, self.count - before.count
        if min(calls, count, *released.values()) < 0:
            return None
        return Batches(calls=calls, count=count, released=released)

    @property
    def mean_calls(self) -> float:
        """Calls of a batch; 0 if there was none."""
        return self.calls / self.count if self.count else 0.0


def scrape(url: str, api_key: str | None) -> Batches | None:
    """Ask a service for its batches; None if it has no metrics that can be read here."""
    address = parse_address(url)
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    transport = httpx.HTTPTransport(uds=address.uds)
    try:
        with httpx.Client(transport=transport, timeout=_TIMEOUT_S, trust_env=False) as client:
            reply = client.get(address.join("/metrics"), headers=headers)
    except httpx.HTTPError:
        return None
    return read(reply.text) if reply.status_code == 200 else None


def read(text: str) -> Batches | None:
    """The batches in a text of Prometheus metrics; None if it has none."""
    sizes = {end: float(number) for end, number in _SIZES.findall(text)}
    if len(sizes) < 2:
        return None
    released = {reason: float(number) for reason, number in _RELEASED.findall(text)}
    return Batches(calls=sizes["sum"], count=sizes["count"], released=released)

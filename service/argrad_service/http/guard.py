"""Who may call what, decided before a route is looked for: everything is denied that is not open, or has a key."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from starlette.types import Scope

from argrad_service.http.problems import Forbidden, RateLimited, Unauthorized
from argrad_service.http.record import Record
from argrad_service.keyring import Keyring
from argrad_service.settings import Settings
from argrad_service.state import RateCounter

OPEN = frozenset({"/health/live", "/health/ready"})
"""Answered to everybody; the second without what it has found, where keys are asked for."""

METRICS = "/metrics"
_MAX_REMEMBERED = 256
_LOOPBACK_NAMES = "localhost, a loopback address, or a name in ARGRAD_ALLOWED_HOSTS"

Headers = Mapping[bytes, bytes]
Refusal = Unauthorized | Forbidden


class Hosts:
    """Names by which the service may be addressed.

    A web page can point a name of its own at 127.0.0.1, and its browser then takes our replies for the page's own (DNS
    rebinding). It cannot change the Host header, which says that name.

    Args:
        allowed: Names besides localhost and loopback addresses, in lower case, without port.
    """

    def __init__(self, allowed: Collection[str]) -> None:
        self._allowed = frozenset(allowed)
        self._good: set[bytes] = set()

    def accepts(self, header: bytes) -> bool:
        """Whether a Host header names this service."""
        if header in self._good:
            return True
        name = _host_name(header)
        is_good = name in self._allowed or _is_loopback(name)
        if is_good and len(self._good) < _MAX_REMEMBERED:
            self._good.add(header)
        return is_good


class Guard:
    """Decides whether a request goes on, and whose it is.

    Args:
        keyring: Keys that are asked for; None asks for none.
        hosts: Names that the Host header may have; None lets every name through.
        origins: Web pages that may call, such as `https://example.org`.
        metrics_port: TCP port that has metrics and liveness and nothing else, and asks for no key.
        rates: Counts calls by owner.
        per_minute: Calls that an owner may make; 0 is no limit.
    """

    def __init__(
        self,
        *,
        keyring: Keyring | None = None,
        hosts: Hosts | None = None,
        origins: Collection[str] = (),
        metrics_port: int | None = None,
        rates: RateCounter | None = None,
        per_minute: float = 0.0,
    ) -> None:
        self._keyring, self._rates, self._per_minute = keyring, rates, per_minute
        self._hosts, self._metrics_port = hosts, metrics_port
        self._origins = frozenset(origin.encode() for origin in origins)

    def refusal(self, scope: Scope, headers: Headers, record: Record) -> Refusal | None:
        """Why a request goes no further; None where it does, and the record then says whose it is."""
        path = scope["path"]
        if self._hosts is not None and not self._hosts.accepts(headers.get(b"host", b"")):
            return Forbidden("Host", repr(headers.get(b"host", b"").decode("latin-1"))[:80], _LOOPBACK_NAMES)
        if self._metrics_port is not None and (scope.get("server") or (None, None))[1] == self._metrics_port:
            return None if path in (METRICS, *OPEN) else Forbidden("path", repr(path)[:80], f"{METRICS} on this port")
        if self._keyring is None:
            return self._foreign_page(scope, headers)
        owner = self._owner(headers)
        if owner is not None:
            record.owner = record.key = owner
            return None
        record.is_trusted = False
        if path in OPEN:
            return None
        return Unauthorized(is_given=b"authorization" in headers)

    @property
    def is_counting(self) -> bool:
        """Whether calls are counted against a limit."""
        return self._per_minute > 0 and self._rates is not None

    async def excess(self, scope: Scope, record: Record) -> RateLimited | None:
        """Count a call that may go on; why it may not, where its owner has made too many."""
        if self._rates is None or scope["path"] in OPEN or scope["path"] == METRICS:
            return None
        wait_s = await self._rates.take(record.owner, per_minute=self._per_minute)
        if wait_s <= 0:
            return None
        message = f"more than {self._per_minute:g} calls a minute (ARGRAD_RATE_LIMIT_PER_MINUTE)"
        return RateLimited(message, max(1, math.ceil(wait_s)))

    def _owner(self, headers: Headers) -> str | None:
        given = headers.get(b"authorization")
        if given is None or given[:7].lower() != b"bearer " or self._keyring is None:
            return None
        return self._keyring.owner_of(given[7:].strip())

    def _foreign_page(self, scope: Scope, headers: Headers) -> Forbidden | None:
        """Refuse what a page of another site sends: where no key is asked for, reaching the service is all it takes."""
        origin = headers.get(b"origin")
        if origin is None or origin in self._origins:
            return None
        if origin == scope["scheme"].encode() + b"://" + headers.get(b"host", b""):
            return None
        wanted = "none, the service's own, or one in ARGRAD_CORS_ORIGINS"
        return Forbidden("Origin", repr(origin.decode("latin-1"))[:80], wanted)


def make_guard(settings: Settings, keyring: Keyring | None, rates: RateCounter) -> Guard:
    """The guard that the settings ask for.

    A Host is asked for where browsers could be led here by a name that is not ours: on loopback without keys. A web
    page has no key, and no way to a unix socket.
    """
    hosts: Hosts | None = None
    is_exposed_to_pages = keyring is None and settings.is_loopback and settings.uds is None
    if is_exposed_to_pages or settings.allowed_hosts:
        hosts = Hosts([name.lower() for name in settings.allowed_hosts])
    return Guard(
        keyring=keyring,
        hosts=hosts,
        origins=settings.cors_origins,
        metrics_port=settings.metrics_port,
        rates=rates,
        per_minute=settings.rate_limit_per_minute,
    )


def _host_name(header: bytes) -> str:
    """Name or address in a Host header, without its port; empty where the header is none."""
    try:
        parts = urlsplit("//" + header.decode("ascii"))
        _ = parts.port  # raises where it is no number
    except ValueError:
        return ""
    is_bare = not (parts.path or parts.query or parts.fragment or "@" in parts.netloc)
    return (parts.hostname or "").rstrip(".") if is_bare else ""


def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):  # RFC 6761: never anything but loopback
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False

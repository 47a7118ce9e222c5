"""Which web pages' scripts may call (CORS): none, unless an operator names them. Errors stay problem documents."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from starlette.responses import Response

_METHODS = "GET, POST, PUT, DELETE"
_MAX_AGE_S = 600
_EXPOSED = b"X-Request-ID, Server-Timing, Retry-After"
_VARY = (b"vary", b"Origin")


class Cors:
    """Answers preflights, and lets pages of certain origins read replies; credentials of browsers are never asked for.

    Args:
        origins: Such as `https://example.org`; `*` is every page.
    """

    def __init__(self, origins: Collection[str]) -> None:
        self._origins = frozenset(origin.encode() for origin in origins)
        self._is_open = "*" in origins

    def headers(self, given: Mapping[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        """What a reply says beside its own headers."""
        if not self._origins:
            return []
        origin = given.get(b"origin")
        if origin is None or not self.allows(origin):
            return [_VARY]
        return [(b"access-control-allow-origin", origin), (b"access-control-expose-headers", _EXPOSED), _VARY]

    def allows(self, origin: bytes) -> bool:
        """Whether pages of an origin may call."""
        return self._is_open or origin in self._origins

    def preflight(self, method: str, given: Mapping[bytes, bytes]) -> Response | None:
        """Answer whether a page may send what it is about to; None where nothing of the kind is asked.

        A page that may not gets no answer here: its request goes on as any, and no reply says that it may.
        """
        if method != "OPTIONS" or b"access-control-request-method" not in given:
            return None
        if not self.allows(given.get(b"origin", b"")):
            return None
        headers = {
            "Access-Control-Allow-Methods": _METHODS,
            "Access-Control-Allow-Headers": given.get(b"access-control-request-headers", b"").decode("latin-1"),
            "Access-Control-Max-Age": str(_MAX_AGE_S),
        }
        return Response(status_code=204, headers={name: text for name, text in headers.items() if text})

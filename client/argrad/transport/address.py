"""Where a service listens: `http://host:port/prefix`, `https://…`, or `http+unix:///path/of/socket`."""

from __future__ import annotations

import ipaddress
import urllib.request
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

import httpx

from argrad.errors import ProblemError

UNIX_SCHEME = "http+unix"
_WANTED = "http://host:port, https://host:port, http+unix:///path/of/socket, or 'local'"


@dataclass(frozen=True, kw_only=True)
class Address:
    """A parsed service URL.

    Args:
        base: Scheme, host, port and path prefix, without a slash at the end.
        uds: Path of the unix socket, where it is one.
    """

    base: httpx.URL
    uds: str | None = None

    @property
    def is_loopback(self) -> bool:
        """Whether the service is on this machine, so that no proxy stands between."""
        host = self.base.host
        if self.uds is not None or host == "localhost":
            return True
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False

    @property
    def proxy(self) -> str | None:
        """Proxy that the environment names for this host (`HTTPS_PROXY`, `NO_PROXY`, …); None on loopback."""
        if self.is_loopback or urllib.request.proxy_bypass(self.base.host):
            return None
        proxies = urllib.request.getproxies()
        return proxies.get(self.base.scheme) or proxies.get("all")

    def join(self, path: str) -> httpx.URL:
        """URL of a route, such as `/v1/solve`."""
        prefix = self.base.raw_path.rstrip(b"/")
        return self.base.copy_with(raw_path=prefix + path.encode("ascii"))


def parse_address(url: str) -> Address:
    """Parse a service URL.

    Raises:
        ProblemError: the scheme is unknown, there is no host, or the URL has a query or credentials.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
        parsed = httpx.URL(url)
    except (ValueError, httpx.InvalidURL) as error:
        raise ProblemError("url", f"{url!r} ({error})", _WANTED) from None
    if parts.username or parts.password:
        raise ProblemError("url", "a user name or password", "api_key=… instead")
    if parts.query or parts.fragment:
        raise ProblemError("url", f"{url!r} with a query or a fragment", _WANTED)
    if parts.scheme == UNIX_SCHEME:
        if parts.netloc or len(parts.path) < 2:
            raise ProblemError("url", repr(url), "http+unix:/// and the absolute path of a socket")
        return Address(base=httpx.URL("http://localhost"), uds=unquote(parts.path))
    if parts.scheme not in ("http", "https") or not parsed.host:
        raise ProblemError("url", repr(url), _WANTED)
    if port == 0:
        raise ProblemError("url", f"{url!r} with port 0", _WANTED)
    return Address(base=parsed)

"""Where a service listens: `http://host:port/prefix`, `https://…`, or `http+unix:///path/of/socket`."""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import unquote, urlsplit

import httpx

from argrad.errors import ProblemError

UNIX_SCHEME = "http+unix"
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
"""Variables in which httpx looks for certificates, in its order."""
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

    @cached_property
    def proxy(self) -> str | None:
        """Proxy that the environment names for this host (`HTTPS_PROXY`, `NO_PROXY`, …); None on loopback.

        Raises:
            ProblemError: what it names is no proxy that HTTP can use.
        """
        if self.is_loopback or urllib.request.proxy_bypass(self.base.host):
            return None
        proxies = urllib.request.getproxies()
        named = proxies.get(self.base.scheme) or proxies.get("all")
        if named is None:
            return None
        url = named if "://" in named else f"http://{named}"  # as curl reads it
        try:
            parts = urlsplit(url)
            is_one = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
            httpx.URL(url)
        except (ValueError, httpx.InvalidURL):
            is_one = False
        if not is_one:
            shown = re.sub(r"[^/@]*@", "", named)  # no password
            wanted = "http://host:port or https://host:port, or the service's host in NO_PROXY"
            raise ProblemError("proxy", f"{shown!r} in the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY)", wanted)
        return url

    def tls(self) -> ssl.SSLContext | None:
        """How certificates are checked; None without TLS.

        Raises:
            ProblemError: the certificates that the environment names cannot be read.
        """
        if self.base.scheme != "https":
            return None
        try:
            return httpx.create_ssl_context()
        except OSError as error:
            given = (f"{name}={value}" for name in _CERTIFICATES if (value := os.environ.get(name)))
            raise ProblemError(next(given, "certificates"), str(error), "certificates in PEM") from None

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

"""What the synchronous and the async client are given alike: addresses, and choices."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from numbers import Integral
from typing import TypeVar, get_args

from pydantic import SecretStr

from argrad.backend import ENTRY_POINT_GROUP, Backend
from argrad.errors import MissingExtraError, ProblemError
from argrad.registered import Registering
from argrad.transport.calls import Compression, HttpOptions
from argrad.transport.retries import RetryPolicy

B = TypeVar("B")

LOCAL = "local"
DEFAULT_TIMEOUT_S = 300.0


def addresses_of(target: str | Sequence[str]) -> tuple[str, ...]:
    """Addresses as they were given: one, several with commas between, or a sequence.

    Raises:
        ProblemError: there is none, one is given twice, or `local` is one of several.
    """
    parts = target.split(",") if isinstance(target, str) else target
    for part in parts:
        if not isinstance(part, str):
            raise ProblemError("url", type(part).__name__, "an address, or a sequence of addresses")
    urls = tuple(part.strip() for part in parts)
    if not urls or not all(urls):
        raise ProblemError("url", repr(target), "an address, or several with commas between")
    if len({url.rstrip("/") for url in urls}) < len(urls):
        raise ProblemError("url", repr(target), "each address once")
    if len(urls) > 1 and LOCAL in urls:
        raise ProblemError("url", repr(target), "'local' alone, or addresses of services")
    return urls


def http_options(
    urls: Sequence[str], api_key: str | None, retries: int | None, compression: Compression | None
) -> HttpOptions:
    """How a service is called, from a client's arguments.

    Raises:
        ProblemError: the API key or the number of retries cannot be one.
        MissingExtraError: what compresses is not installed.
    """
    if retries is not None and (isinstance(retries, bool) or not isinstance(retries, Integral) or retries < 0):
        raise ProblemError("retries", str(retries), "0 or more, or None for as many as the deadline allows")
    return HttpOptions(
        urls=urls,
        api_key=None if api_key is None else SecretStr(api_key),
        policy=RetryPolicy(retries=retries),
        compression=compression,
    )


def check_backend(target: B) -> B:
    """A backend that was given in place of an address, if it is one.

    Raises:
        ProblemError: it is something else, such as None, or another client.
    """
    is_client = hasattr(target, "registry")  # it has methods of the same names, with other arguments
    if is_client or not callable(getattr(target, "solve", None)):
        raise ProblemError("url", type(target).__name__, "an address, a sequence of addresses, 'local', or a backend")
    return target


def check_registering(value: str) -> None:
    """Refuse a way of registering that there is not.

    Raises:
        ProblemError: with the ways that there are.
    """
    if value not in get_args(Registering):
        raise ProblemError("register", repr(value), f"one of {', '.join(get_args(Registering))}")


def check_compression(value: str | None) -> None:
    """Refuse a way of compressing that there is not.

    Raises:
        ProblemError: with the ways that there are.
    """
    if value is not None and value not in get_args(Compression):
        raise ProblemError("compression", repr(value), f"None or one of {', '.join(get_args(Compression))}")


def load_backend(name: str) -> Backend:
    """Make the backend that an installed package offers under that name.

    Raises:
        MissingExtraError: no package does, or packages that it needs are not installed.
    """
    missing = MissingExtraError(f"argrad.Client({name!r})", "service")
    for entry in entry_points(group=ENTRY_POINT_GROUP, name=name):
        try:
            backend: Backend = entry.load()()
        except ImportError as error:
            raise missing from error
        return backend
    raise missing

"""The client that is taken where none is given: of a configured address, of the environment's, or of this process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

from pydantic import SecretStr

from argrad.arguments import LOCAL
from argrad.client import Client

URL_VARIABLE = "ARGRAD_URL"
API_KEY_VARIABLE = "ARGRAD_API_KEY"


@dataclass
class _Configured:
    """What `configure` was told last."""

    url: str | None = None
    api_key: SecretStr | None = None


_CONFIGURED = _Configured()


def configure(*, url: str | None = None, api_key: str | None = None) -> None:
    """Say once for this process who solves where no client is given: for the drop-ins of `argrad.compat`.

    What is None falls back to the environment, `ARGRAD_URL` and `ARGRAD_API_KEY`, and without those to the engine in
    this process. Layers and functions that take a client are not touched.

    Args:
        url: Address as `argrad.Client` takes it: `http://host:port`, `http+unix:///path/of/socket`, or `local`.
        api_key: Sent as `Authorization: Bearer`.

    Raises:
        ProblemError: the address or the key cannot be one; nothing is changed then.
        MissingExtraError: `local`, and the engine's packages are not installed.
    """
    key = None if api_key is None else SecretStr(api_key)
    if url is not None:
        _client_of(url, key)
    _CONFIGURED.url, _CONFIGURED.api_key = url, key


def default_client(url: str | None = None) -> Client:
    """The client of an address, by default of the configured one; one client an address.

    Raises:
        ProblemError: see `configure`.
        MissingExtraError: see `configure`.
    """
    key = _CONFIGURED.api_key
    if key is None and (found := os.environ.get(API_KEY_VARIABLE)):
        key = SecretStr(found)
    return _client_of(url or _CONFIGURED.url or os.environ.get(URL_VARIABLE) or LOCAL, key)


@lru_cache(maxsize=16)
def _client_of(url: str, api_key: SecretStr | None) -> Client:
    return Client(url, api_key=None if api_key is None or url == LOCAL else api_key.get_secret_value())

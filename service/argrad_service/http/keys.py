"""The keys of a running service: read at its start, and again whenever their file has changed."""

from __future__ import annotations

import asyncio

from argrad_service.http.logs import Logger
from argrad_service.keyring import Keyring, KeysError
from argrad_service.settings import Settings, SettingsError

_PERIOD_S = 2.0


def make_keyring(settings: Settings) -> Keyring | None:
    """The keys that the settings name; None where they name none, and nobody is asked for one.

    Raises:
        SettingsError: an entry is wrong, or the file cannot be read.
    """
    if not settings.has_keys:
        return None
    try:
        return Keyring(settings.api_keys.get_secret_value(), settings.api_keys_file)
    except KeysError as error:
        raise SettingsError(str(error)) from None


async def follow_keys(keyring: Keyring, log: Logger) -> None:
    """Read the file again whenever it has changed."""
    while True:
        await asyncio.sleep(_PERIOD_S)
        if keyring.has_changed():
            reload_keys(keyring, log)


def reload_keys(keyring: Keyring, log: Logger) -> None:
    """Read the file again; where it is wrong or gone, the keys of before stay."""
    try:
        keyring.reload()
    except KeysError as error:
        log.error("keys not reloaded", reason=str(error))
    else:
        log.info("keys reloaded", names=keyring.names())

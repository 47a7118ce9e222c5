"""Who may call: API keys by the SHA-256 of what is sent, from the settings and from a file that is read again."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from dataclasses import dataclass
from pathlib import Path

from argrad.errors import ArgradError
from argrad.keys import NAME

PUBLIC = "public"
"""Whose everything is where nobody has a key."""

_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII | re.IGNORECASE)


class KeysError(ArgradError, ValueError):
    """API keys cannot be read; the message says where and what is wrong, and quotes nothing."""


@dataclass(frozen=True)
class _Entry:
    digest: bytes
    name: str


def parse_keys(text: str, source: str) -> dict[bytes, _Entry]:
    """Read entries `name:sha256`, separated by commas or line ends; what follows a # is a comment.

    One name may stand with several keys, while one of them takes the place of another.

    Args:
        text: To be read.
        source: Where it stands, for the message.

    Raises:
        KeysError: an entry is none, which may be a key that was put there by mistake: it is not quoted.
    """
    entries: dict[bytes, _Entry] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        for written in filter(None, (part.strip() for part in line.partition("#")[0].split(","))):
            name, _, digits = (part.strip() for part in written.partition(":"))
            where = f"{source}, line {number}"
            if not NAME.fullmatch(name) or not _DIGEST.fullmatch(digits):
                raise KeysError(f"{where}: found something else than name:sha256, as `argrad keys new NAME` prints it")
            if name == PUBLIC:
                raise KeysError(f"{where}: found the name {PUBLIC!r}, which is taken; call the key something else")
            digest = bytes.fromhex(digits)
            if entries.setdefault(digest, _Entry(digest, name)).name != name:
                raise KeysError(f"{where}: found one key with two names, {entries[digest].name} and {name}")
    return entries


class Keyring:
    """The keys of this moment. Event loop only.

    Args:
        given: Entries of the settings, which stay.
        file: Further entries, read now and by `reload`.

    Raises:
        KeysError: an entry is wrong, or the file cannot be read.
    """

    def __init__(self, given: str = "", file: Path | None = None) -> None:
        self._given = parse_keys(given, "ARGRAD_API_KEYS")
        self._file = file
        self._seen: tuple[int, ...] | None = None
        self._entries: dict[bytes, _Entry] = {}
        self.reload()

    def owner_of(self, key: bytes) -> str | None:
        """The name of a key; None where it is not known.

        What the time of the look-up tells is of the digest of what the caller sent, which leads to no other key; the
        comparison itself tells nothing.
        """
        digest = hashlib.sha256(key).digest()
        found = self._entries.get(digest)
        return found.name if found is not None and hmac.compare_digest(found.digest, digest) else None

    def names(self) -> list[str]:
        """Who has a key, each once."""
        return sorted({entry.name for entry in self._entries.values()})

    def has_changed(self) -> bool:
        """Whether the file is another than `reload` has seen."""
        return self._file is not None and self._look() != self._seen

    def reload(self) -> None:
        """Read the file again: keys that are not in it any more are revoked.

        Raises:
            KeysError: an entry is wrong, or the file cannot be read; the keys of before stay.
        """
        if self._file is None:
            self._entries = self._given
            return
        self._seen = self._look()
        try:
            text = self._file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise KeysError(f"{self._file} (ARGRAD_API_KEYS_FILE) cannot be read: {reason}") from None
        self._entries = self._given | parse_keys(text, str(self._file))

    def _look(self) -> tuple[int, ...] | None:
        try:
            status = os.stat(self._file) if self._file is not None else None
        except OSError:
            return None
        return None if status is None else (status.st_ino, status.st_mtime_ns, status.st_size)

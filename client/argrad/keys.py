"""API keys: 256 random bits, and the line by which a service knows one without having it."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from pathlib import Path

from argrad.errors import ProblemError

PREFIX = "argrad_"
"""Begins every key, so that scanners of repositories and logs find one that got there."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_WANTED_NAME = "at most 64 letters, digits and . _ -, a letter or digit first"
_BYTES = 32


def new_key() -> str:
    """A key that nobody can guess."""
    return PREFIX + secrets.token_urlsafe(_BYTES)


def stored_line(name: str, key: str) -> str:
    """What a service keeps of a key: `name:sha256`. The SHA-256 of 256 random bits leads back to nothing.

    Raises:
        ProblemError: nobody can be called that.
    """
    if not NAME.fullmatch(name):
        raise ProblemError("NAME", repr(name), _WANTED_NAME)
    return f"{name}:{hashlib.sha256(key.encode()).hexdigest()}"


def append_line(file: Path, line: str) -> None:
    """Add a line to a file of keys, in one write; a file that is not there is made for its owner alone.

    Raises:
        OSError: it cannot be written.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    with open(descriptor, "r+b", buffering=0) as opened:
        size = opened.seek(0, os.SEEK_END)
        if size:
            opened.seek(size - 1)
        is_broken_off = size > 0 and opened.read(1) != b"\n"
        opened.write(b"\n" * is_broken_off + line.encode() + b"\n")

"""Signed state tokens: 40 characters that nobody can guess, forge or use for another owner's state."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets

from argrad_service.state.store import StateGone

_ID_BYTES = 12
_MAC_BYTES = 18
TOKEN_LENGTH = 40  # (12 + 18) bytes in base64: a multiple of three, so there is no padding and one spelling only
_TOKEN = re.compile(r"[A-Za-z0-9_-]{40}", re.ASCII)
_DOMAIN = b"argrad state token 1\0"
_SEAL_DOMAIN = b"argrad shared record 1\0"
_SEAL_BYTES = 32


class TokenSigner:
    """Makes and checks tokens: a random id and an HMAC-SHA256 of the id and its owner, cut to 144 bits.

    Args:
        secret: Signing key; replicas that share it check one another's tokens.
    """

    def __init__(self, secret: str) -> None:
        self._key = secret.encode()

    def new(self, owner: str) -> str:
        """A token that was never given out before."""
        identifier = secrets.token_bytes(_ID_BYTES)
        return base64.urlsafe_b64encode(identifier + self._mac(identifier, owner)).decode("ascii")

    def check(self, token: str, owner: str) -> None:
        """Refuse a token that this key did not sign for this owner, in a time that tells nothing about it.

        Raises:
            StateGone: the token is foreign or forged.
        """
        # The decoder would skip characters outside the alphabet: two spellings of one token.
        if not _TOKEN.fullmatch(token):
            raise StateGone
        raw = base64.urlsafe_b64decode(token)
        if not hmac.compare_digest(raw[_ID_BYTES:], self._mac(raw[:_ID_BYTES], owner)):
            raise StateGone

    def _mac(self, identifier: bytes, owner: str) -> bytes:
        return hmac.digest(self._key, _DOMAIN + identifier + owner.encode(), hashlib.sha256)[:_MAC_BYTES]


class Seal:
    """Closes records that leave the process with an HMAC-SHA256 of their place and content, and opens them.

    Args:
        secret: That of the tokens; what another secret has closed is not opened.
    """

    def __init__(self, secret: str) -> None:
        self._key = secret.encode()

    def close(self, place: bytes, record: bytes) -> bytes:
        """The record behind its seal."""
        return self._mac(place, record) + record

    def open(self, place: bytes, sealed: bytes) -> bytes | None:
        """The record, or None where it is not exactly what was closed for that place."""
        mac, record = sealed[:_SEAL_BYTES], sealed[_SEAL_BYTES:]
        return record if hmac.compare_digest(mac, self._mac(place, record)) else None

    def _mac(self, place: bytes, record: bytes) -> bytes:
        # The place's length first: no two pairs are the same bytes.
        mac = hmac.new(self._key, _SEAL_DOMAIN + len(place).to_bytes(4, "little") + place, hashlib.sha256)
        mac.update(record)
        return mac.digest()

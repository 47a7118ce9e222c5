"""What the headers of a body mean: its format, and how it is encoded (RFC 9110, 8.3, 8.4, 12.5.1 and 12.5.3)."""

from __future__ import annotations

from functools import lru_cache

from argrad.wire.errors import NotAcceptableError, UnsupportedMediaTypeError

JSON = "application/json"
SAFETENSORS = "application/x-safetensors"
FORMATS = (SAFETENSORS, JSON)
_WANTED = " or ".join(FORMATS)
IDENTITY = "identity"
ZSTD = "zstd"


@lru_cache(maxsize=128)
def body_format(content_type: str | None) -> str:
    """Read a Content-Type header.

    Returns:
        `JSON` or `SAFETENSORS`.

    Raises:
        UnsupportedMediaTypeError: the header is missing, or names another type or a charset other than UTF-8.
    """
    if content_type is None or not content_type.strip():
        raise UnsupportedMediaTypeError("Content-Type", "no such header", _WANTED)
    media_type, parameters = _parse(content_type)
    charset = parameters.get("charset", "utf-8").lower()
    if media_type not in FORMATS or charset not in ("utf-8", "utf8", "us-ascii"):
        raise UnsupportedMediaTypeError("Content-Type", repr(content_type), _WANTED)
    return media_type


@lru_cache(maxsize=128)
def reply_format(accept: str | None, *, default: str) -> str:
    """Choose the format of a reply.

    Args:
        accept: The Accept header; None, or one that likes both formats equally, leaves the choice to `default`.
        default: `JSON` or `SAFETENSORS`; for a reply, the format of the request.

    Returns:
        `JSON` or `SAFETENSORS`, whichever the header weighs more.

    Raises:
        NotAcceptableError: the header excludes both, or a weight in it is not a number from 0 to 1.
    """
    if accept is None or not accept.strip():
        return default
    weights: dict[str, float] = {}
    for part in filter(str.strip, accept.split(",")):
        media_range, parameters = _parse(part)
        weights[media_range] = _weight(accept, parameters.get("q", "1"))
    # A range that says more about a type overrules one that says less, whatever their weights.
    quality = {
        name: next((weights[key] for key in (name, "application/*", "*/*") if key in weights), 0.0) for name in FORMATS
    }
    best = max(FORMATS, key=lambda name: (quality[name], name == default))
    if quality[best] <= 0.0:
        raise NotAcceptableError("Accept", repr(accept), _WANTED)
    return best


def body_encoding(content_encoding: str | None) -> str:
    """Read a Content-Encoding header.

    Returns:
        `IDENTITY` or `ZSTD`.

    Raises:
        UnsupportedMediaTypeError: the header names another encoding, or several.
    """
    encoding = IDENTITY if content_encoding is None else content_encoding.strip().lower()
    if encoding not in (IDENTITY, ZSTD):
        raise UnsupportedMediaTypeError("Content-Encoding", repr(encoding[:40]), f"{IDENTITY} or {ZSTD}")
    return encoding


@lru_cache(maxsize=128)
def reply_encoding(accept_encoding: str | None) -> str:
    """Choose how a reply is encoded: compressed only for a caller who names zstd; `*` is not enough.

    Args:
        accept_encoding: The Accept-Encoding header.

    Returns:
        `IDENTITY` or `ZSTD`.

    Raises:
        NotAcceptableError: the weight of zstd is not a number from 0 to 1.
    """
    for part in (accept_encoding or "").split(","):
        name, parameters = _parse(part)
        if name == ZSTD and _weight(part.strip(), parameters.get("q", "1"), "Accept-Encoding") > 0.0:
            return ZSTD
    return IDENTITY


def _parse(header: str) -> tuple[str, dict[str, str]]:
    media_type, *parts = (part.strip() for part in header.split(";"))
    pairs = (part.partition("=") for part in parts)
    return media_type.lower(), {key.strip().lower(): value.strip().strip('"') for key, _, value in pairs}


def _weight(accept: str, text: str, header: str = "Accept") -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0.0 <= weight <= 1.0:
        raise NotAcceptableError(header, repr(accept), "weights q from 0 to 1")
    return weight

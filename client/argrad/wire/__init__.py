"""The protocol of client and service: documents, tensors, and the two ways to write them."""

from argrad.wire.codec import decode, encode, encoded_size
from argrad.wire.errors import (
    NotAcceptableError,
    TooLargeError,
    UnreadableBodyError,
    UnsupportedMediaTypeError,
    WireError,
)
from argrad.wire.json import JsonLimits
from argrad.wire.negotiation import FORMATS, JSON, SAFETENSORS, body_format, reply_format
from argrad.wire.safetensors import MAX_HEADER_BYTES

__all__ = [
    "FORMATS",
    "JSON",
    "MAX_HEADER_BYTES",
    "SAFETENSORS",
    "JsonLimits",
    "NotAcceptableError",
    "TooLargeError",
    "UnreadableBodyError",
    "UnsupportedMediaTypeError",
    "WireError",
    "body_format",
    "decode",
    "encode",
    "encoded_size",
    "reply_format",
]

"""The protocol of client and service: documents, tensors, and the two ways to write them."""

from argrad.wire.codec import decode, encode, encoded_size
from argrad.wire.compression import LEAST_BYTES, Decompression, compress, decompress, load_zstd
from argrad.wire.errors import (
    NotAcceptableError,
    TooLargeError,
    UnreadableBodyError,
    UnsupportedMediaTypeError,
    WireError,
)
from argrad.wire.json import JsonLimits
from argrad.wire.negotiation import (
    FORMATS,
    IDENTITY,
    JSON,
    SAFETENSORS,
    ZSTD,
    body_encoding,
    body_format,
    reply_encoding,
    reply_format,
)
from argrad.wire.safetensors import MAX_HEADER_BYTES

__all__ = [
    "FORMATS",
    "IDENTITY",
    "JSON",
    "LEAST_BYTES",
    "MAX_HEADER_BYTES",
    "SAFETENSORS",
    "ZSTD",
    "Decompression",
    "JsonLimits",
    "NotAcceptableError",
    "TooLargeError",
    "UnreadableBodyError",
    "UnsupportedMediaTypeError",
    "WireError",
    "body_encoding",
    "body_format",
    "compress",
    "decode",
    "decompress",
    "encode",
    "encoded_size",
    "load_zstd",
    "reply_encoding",
    "reply_format",
]

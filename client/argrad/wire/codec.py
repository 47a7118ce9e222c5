"""Messages to bytes and back, in whichever format a content type names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

from torch import Tensor

from argrad.validation import validate
from argrad.wire import json, safetensors
from argrad.wire.documents import check_tensor_name, parse_object
from argrad.wire.errors import UnreadableBodyError
from argrad.wire.messages import M, Message, TensorMap
from argrad.wire.negotiation import JSON, body_format

_DOCUMENT = "argrad"

_REMEMBERED = 128
"""Headers of messages that recur."""


def encode(message: Message, tensors: Mapping[str, Tensor], content_type: str) -> list[bytes | memoryview]:
    """Write a message.

    Args:
        message: The document.
        tensors: Its tensors, by dotted name.
        content_type: `JSON` or `SAFETENSORS`.

    Returns:
        Buffers whose concatenation is the body. In the binary form they view the tensors, which must not be changed
        before they are sent; only tensors that are not contiguous, or on a GPU, are copied.

    Raises:
        ProblemError: a tensor's name or dtype has no place in the message.
        UnsupportedMediaTypeError: `content_type` is neither.
    """
    for name in tensors:
        check_tensor_name(type(message), name)
    if body_format(content_type) == JSON:
        return [json.write(message, tensors)]
    return safetensors.write({_DOCUMENT: message.model_dump_json(exclude_none=True)}, tensors)


def decode(
    model: type[M],
    body: bytes | bytearray | memoryview,
    content_type: str | None,
    *,
    limits: json.JsonLimits = json.DEFAULT_LIMITS,
    max_header_bytes: int = safetensors.MAX_HEADER_BYTES,
) -> tuple[M, TensorMap]:
    """Read a message.

    Args:
        model: The document that is expected.
        body: All of it. In the binary form the tensors are views of a body that can be written to (`bytearray`).
        content_type: The Content-Type header.
        limits: What a body in JSON may cost.
        max_header_bytes: Length of the header in the binary form; a reply's grows with the batch.

    Returns:
        The document, and its tensors by dotted name. In both forms a document that leaves out an object beside its
        tensors (`problem` without `kind`) counts as having it, empty.

    Raises:
        UnsupportedMediaTypeError: the content type is neither.
        UnreadableBodyError: the bytes are not what the content type says.
        TooLargeError: JSON over a limit.
        ProblemError: readable, but a field is unknown, missing or wrong.
    """
    if body_format(content_type) == JSON:
        return json.read(model, body, limits)
    text, start = safetensors.header_of(body, max_header_bytes)
    read = _read_header if model.recurs and len(text) <= safetensors.SHORT else _read_header.__wrapped__
    document, entries = read(model, text, len(body) - start)
    return document, safetensors.views_of(body, start, entries)


@lru_cache(maxsize=_REMEMBERED)
def _read_header(model: type[M], text: bytes, size: int) -> tuple[M, Mapping[str, safetensors.Entry]]:
    """Document and tensors that a header tells of, in front of so many bytes of data.

    A caller asks the same again and again with other numbers: a document is frozen, and one that was read is as good as
    one that is read anew.
    """
    metadata, entries = safetensors.outline_of(text, size)
    if _DOCUMENT not in metadata:
        wanted = "the JSON document of the message, as a string"
        raise UnreadableBodyError(f"__metadata__.{_DOCUMENT}", "nothing", wanted)
    document = parse_object(f"__metadata__.{_DOCUMENT}", metadata[_DOCUMENT])
    for name in entries:
        section = check_tensor_name(model, name)
        if section is not None and document.get(section) is None:
            document[section] = {}
    return validate(model, document), entries


def encoded_size(buffers: Iterable[bytes | memoryview]) -> int:
    """Length in bytes of the body that buffers make up: its Content-Length."""
    return sum(map(len, buffers))

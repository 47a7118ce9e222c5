"""The safetensors layout, checked and without copies.

    8 bytes         N, the length of the header, little-endian
    N bytes         JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {text: text}}
    the rest        the tensors' bytes, contiguous, C order, little-endian, without gaps

The header is padded with spaces so that the data begin at a multiple of 64, and wider dtypes come first: so every
tensor is aligned in a buffer that is. Files of the `safetensors` package are read, and it reads ours.

A caller sends the same layout again and again, with other numbers: what a header says of its tensors is remembered, as
it is written and as it was read, for short headers and not many.
Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import orjson
import torch
from torch import Tensor

from argrad.errors import ArgradError, ProblemError
from argrad.validation import field_name, in_words
from argrad.wire.documents import parse_header
from argrad.wire.errors import UnreadableBodyError

MAX_HEADER_BYTES = 1 << 20
"""Default cap on the header of a body that is read, document included."""

_ALIGNMENT = 64
_METADATA = "__metadata__"
_MAX_RANK = 8
_MAX_ELEMENTS = 1 << 53
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "I64": torch.int64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_WANTED_DTYPES = "F64 or F32 (I64 for counts)"

_REMEMBERED = 128
"""Layouts of short headers."""

SHORT = 4096
"""Bytes of a header up to which it is short,"""

_FEW = 40
"""and the tensors that one has room for."""

_OPENING = b'{"__metadata__":{"argrad":'
"""How headers of ours begin."""

Buffers = list[bytes | memoryview]
Entry = tuple[int, int, torch.dtype, tuple[int, ...]]  # begin, end, dtype, shape
Outline = tuple[str, torch.dtype, torch.Size]


def write(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Buffers:
    """Lay tensors out as a safetensors file.

    Args:
        metadata: Text by name, kept in the header.
        tensors: float64, float32 or int64. A tensor on another device, or one that is not contiguous, is copied to
            the host; any other is not copied, and must not be changed before the buffers are sent.

    Returns:
        Header, then one view a tensor that is not empty; the file is their concatenation.

    Raises:
        ProblemError: a tensor has another dtype.
    """
    outlines = tuple([(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()])
    names, rest = (_layout if len(outlines) <= _FEW else _layout.__wrapped__)(outlines)
    text = b'{"__metadata__":%b%b' % (orjson.dumps(metadata), rest)
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return [len(text).to_bytes(8, "little") + text, *[_bytes_of(tensors[name]) for name in names]]


@lru_cache(maxsize=_REMEMBERED)
def _layout(outlines: Sequence[Outline]) -> tuple[list[str], bytes]:
    """Names of the tensors that are not empty in the order of their data, and the header from behind its metadata."""
    header: dict[str, Any] = {}
    names, offset = [], 0
    for name, dtype, shape in sorted(outlines, key=lambda outline: -outline[1].itemsize):
        if dtype not in _NAMES:
            raise ProblemError(name, f"dtype {dtype}", "torch.float64 or torch.float32")
        end = offset + shape.numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": tuple(shape), "data_offsets": (offset, end)}
        if end > offset:
            names.append(name)
        offset = end
    return names, b"," + orjson.dumps(header)[1:] if header else b"}"


def _bytes_of(tensor: Tensor) -> memoryview:
    if tensor.requires_grad or not tensor.is_cpu or not tensor.is_contiguous():
        tensor = tensor.detach().cpu().contiguous()
    array: Any = tensor.numpy()
    return memoryview(array).cast("B")


def read(
    body: bytes | bytearray | memoryview, *, max_header_bytes: int = MAX_HEADER_BYTES
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read a safetensors file without copying its data.

    Args:
        body: The whole file. The tensors are views of it and keep it alive; a body that cannot be written to (`bytes`)
            is copied first, because torch would let its tensors be changed in place.
        max_header_bytes: A longer header is not parsed.

    Returns:
        Metadata, and the tensors by name.

    Raises:
        UnreadableBodyError: the body is truncated, or its header is too long, not JSON, or lies about the data.
        ProblemError: a tensor in half precision.
    """
    text, start = header_of(body, max_header_bytes)
    metadata, entries = outline_of(text, len(body) - start)
    return metadata, views_of(body, start, entries)


def header_of(body: bytes | bytearray | memoryview, max_header_bytes: int = MAX_HEADER_BYTES) -> tuple[bytes, int]:
    """The header of a file, not parsed yet, and where its data begin.

    Raises:
        UnreadableBodyError: the body is truncated, or its header is too long.
    """
    view = memoryview(body)
    if len(view) < 8:
        raise UnreadableBodyError("body", f"{len(view)} bytes", "at least the 8 bytes of the header's length")
    length = int.from_bytes(view[:8], "little")
    if length > max_header_bytes:
        raise UnreadableBodyError("header length", f"{length} bytes", f"at most {max_header_bytes}")
    start = 8 + length
    if start > len(view):
        raise UnreadableBodyError("body", f"{len(view)} bytes", f"at least {start}, as the header's length says")
    return bytes(view[8:start]), start


def outline_of(text: bytes, size: int) -> tuple[dict[str, str], Mapping[str, Entry]]:
    """What a header in front of so many bytes of data says: metadata, and where each tensor lies.

    Raises:
        UnreadableBodyError: it is not JSON, or lies about the data.
        ProblemError: a tensor in half precision.
    """
    known = _known(text, size) if len(text) <= SHORT else None
    if known is not None:
        return known
    header = _parsed(text)
    metadata = _check_metadata(header.pop(_METADATA, {}))
    return metadata, _checked(header, size)


def views_of(body: bytes | bytearray | memoryview, start: int, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """The tensors of a file whose data begin at `start`, as views of it, or of a copy where it cannot be written to."""
    data = bytearray(body) if memoryview(body).readonly else body
    return {name: _view(data, start, entry) for name, entry in entries.items()}


def _known(text: bytes, size: int) -> tuple[dict[str, str], Mapping[str, Entry]] | None:
    """What a header of ours says, quicker where its tensors are as before; None of any other header.

    The metadata of ours is one string of JSON; behind it the header is the same for all messages of one layout.
    """
    end = text.find(b'"},"', len(_OPENING))
    if end < 0 or not text.startswith(_OPENING) or text[end - 1 : end] == b"\\":
        return None
    try:
        document = orjson.loads(text[len(_OPENING) : end + 1])
        entries = _entries(text[end + 3 :], size)
    except (orjson.JSONDecodeError, ArgradError):
        return None  # whoever reads the whole header says what is wrong with it
    return ({"argrad": document}, entries) if isinstance(document, str) else None


@lru_cache(maxsize=_REMEMBERED)
def _entries(members: bytes, size: int) -> Mapping[str, Entry]:
    """What the members of a header behind its metadata say, the brace that ends it included."""
    header = _parsed(b"{" + members)
    if _METADATA in header:
        raise UnreadableBodyError("header", "the metadata twice", "once")
    return _checked(header, size)


def _parsed(text: bytes) -> dict[str, Any]:
    header = parse_header("header", text)
    if not isinstance(header, dict):
        raise UnreadableBodyError("header", in_words(header), "a JSON object")
    return header


def _checked(header: Mapping[str, Any], size: int) -> dict[str, Entry]:
    """Entries of a header in front of so many bytes of data."""
    entries = {name: _check_entry(name, entry) for name, entry in header.items()}
    _check_coverage(entries, size)
    return entries


def _check_metadata(metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise UnreadableBodyError(_METADATA, in_words(metadata), "an object of strings")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise UnreadableBodyError(f"{_METADATA}.{field_name(key)}", in_words(value), "a string")
    return metadata


def _check_entry(name: str, entry: object) -> Entry:
    """One line of the header, checked by itself: its dtype and shape need exactly the bytes of its offsets."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        found = f"the members {', '.join(map(field_name, entry))}" if isinstance(entry, dict) else in_words(entry)
        raise UnreadableBodyError(field_name(name), found, "an object of dtype, shape and data_offsets")
    dtype = _check_dtype(name, entry["dtype"])
    shape, offsets = entry["shape"], entry["data_offsets"]
    elements = _count(shape)
    if elements is None:
        wanted = f"at most {_MAX_RANK} integers that are not negative, and at most {_MAX_ELEMENTS} elements"
        raise UnreadableBodyError(field_name(name), f"shape {_numbers(shape)}", wanted)
    begin, end = offsets if isinstance(offsets, list) and len(offsets) == 2 else (None, None)
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
        wanted = "[begin, end] with 0 <= begin <= end"
        raise UnreadableBodyError(field_name(name), f"data_offsets {_numbers(offsets)}", wanted)
    if end - begin != elements * dtype.itemsize:
        found = f"data_offsets {_numbers(offsets)}"
        wanted = f"{elements * dtype.itemsize} bytes, as dtype {_NAMES[dtype]} and shape {_numbers(shape)} need"
        raise UnreadableBodyError(field_name(name), found, wanted)
    return begin, end, dtype, tuple(shape)


def _check_dtype(name: str, dtype: object) -> torch.dtype:
    if isinstance(dtype, str) and dtype in _DTYPES:
        return _DTYPES[dtype]
    if dtype in ("F16", "BF16"):
        raise ProblemError(field_name(name), f"dtype {dtype}", f"{_WANTED_DTYPES}; half precision is refused")
    raise UnreadableBodyError(field_name(name), f"dtype {in_words(dtype)}", _WANTED_DTYPES)


def _count(shape: object) -> int | None:
    """Number of elements; None where these are not sizes, or so many that 64 bits could overflow."""
    if not isinstance(shape, list) or len(shape) > _MAX_RANK:
        return None
    product = nonzero = 1
    for size in shape:
        if type(size) is not int or size < 0:
            return None
        product *= size
        nonzero *= size or 1
    return product if nonzero <= _MAX_ELEMENTS else None


def _numbers(value: object) -> str:
    """A list of the header as messages print it."""
    if not isinstance(value, list):
        return in_words(value)
    return f"[{', '.join(map(in_words, value[:_MAX_RANK]))}{', …' if len(value) > _MAX_RANK else ''}]"


def _check_coverage(entries: Mapping[str, Entry], size: int) -> None:
    """The tensors in the order of their offsets must cover the data exactly: no overlap, no gap, nothing beyond."""
    expected = 0
    for begin, end, name in sorted((begin, end, name) for name, (begin, end, _, _) in entries.items()):
        if begin != expected:
            found = f"{'an overlap' if begin < expected else 'a gap'} at data_offsets [{begin}, {end}]"
            wanted = f"data_offsets [{expected}, …], where the tensor before it ends"
            raise UnreadableBodyError(field_name(name), found, wanted)
        if end > size:
            wanted = f"an end within the {size} bytes of data"
            raise UnreadableBodyError(field_name(name), f"data_offsets [{begin}, {end}]", wanted)
        expected = end
    if expected != size:
        raise UnreadableBodyError("body", f"{size} bytes of data", f"{expected}, as the header's tensors cover")


def _view(data: bytes | bytearray | memoryview, start: int, entry: Entry) -> Tensor:
    begin, end, dtype, shape = entry
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    tensor = torch.frombuffer(data, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=start + begin)
    if tensor.data_ptr() % dtype.itemsize:
        # Another writer's layout: a copy of its own is aligned, which vectorised kernels rely on.
        tensor = torch.frombuffer(bytearray(memoryview(data)[start + begin : start + end]), dtype=dtype)
    return tensor if len(shape) == 1 else tensor.view(shape)

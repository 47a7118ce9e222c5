"""Bodies compressed with zstd: one frame (RFC 8878), read piece by piece under a cap that its header cannot lift.

A body is exactly one frame: what follows its end is refused, be it another frame, a skippable one or garbage. A frame
may ask for a window of 8 MiB, the most that HTTP allows (RFC 9659), and for no dictionary.

The package is the standard library's `compression.zstd` (PEP 784), or its backport before Python 3.14.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from argrad.errors import MissingExtraError
from argrad.wire.errors import TooLargeError, UnreadableBodyError

LEAST_BYTES = 16 * 1024
"""A shorter body is sent as it is: it fits into the first flight of packets (RFC 6928), so that nothing is gained in
round trips, and much of what compressing it costs is the start."""

_LEVEL = 1  # on numbers, higher levels cost more time than they save bytes: docs/api.md has the measurement
_MAX_WINDOW_LOG = 23
_PIECE_BYTES = 256 * 1024
_MOST_RATIO = 128 * 1024 // 4
"""A block holds at most 128 KiB, and takes at least 3 bytes of header and one of content (RFC 8878, 3.1.1.2)."""
_WANTED = "one whole frame of zstd, without a dictionary, with a window of at most 8 MiB"


@functools.cache
def load_zstd() -> Any:
    """The module that compresses.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError as error:
        raise MissingExtraError("compression with zstd", "zstd") from error
    return zstd


def compress(buffers: Sequence[bytes | memoryview], size: int) -> list[bytes]:
    """Compress a body.

    Args:
        buffers: Their concatenation is the body.
        size: Its length in bytes, which the frame's header will say.

    Returns:
        Buffers whose concatenation is one frame, with a checksum.

    Raises:
        MissingExtraError: zstd is not installed.
    """
    zstd = load_zstd()
    parameter = zstd.CompressionParameter
    compressor = zstd.ZstdCompressor(options={parameter.compression_level: _LEVEL, parameter.checksum_flag: 1})
    compressor.set_pledged_input_size(size)
    pieces = []
    for buffer in buffers:
        view = memoryview(buffer)
        pieces += [compressor.compress(view[at : at + _PIECE_BYTES]) for at in range(0, len(view), _PIECE_BYTES)]
    return [*filter(None, pieces), compressor.flush()]


class Decompression:
    """A body that is decompressed as it arrives.

    `feed` takes what arrived; `step` is called until the body `is_hungry` again; `finish` is the end. No step
    decompresses more than it was told to, and none beyond the cap, whatever the frame's header says.

    Args:
        max_bytes: Cap on the body, decompressed.
        limit: What the cap is called, for the message.

    Raises:
        MissingExtraError: zstd is not installed.
    """

    def __init__(self, max_bytes: int, limit: str) -> None:
        self._zstd = load_zstd()
        options = {self._zstd.DecompressionParameter.window_log_max: _MAX_WINDOW_LOG}
        self._decoder = self._zstd.ZstdDecompressor(options=options)
        self._max_bytes, self._limit = max_bytes, limit
        self._claimed: int | None = None
        self._body: bytearray | memoryview | None = None
        self._fed: bytes | memoryview = b""
        self.filled = 0

    @property
    def held(self) -> int:
        """Bytes that the body takes in memory: all that its header announces, or what there is of it."""
        return self.filled if self._claimed is None else self._claimed

    @property
    def is_hungry(self) -> bool:
        """Whether everything that was fed has been decompressed."""
        return not self._fed and (self._decoder.needs_input or self._decoder.eof)

    def feed(self, data: bytes | memoryview) -> None:
        """Take the next compressed bytes; the first must hold the frame's header, which has 18 bytes at most.

        Raises:
            UnreadableBodyError: they are no frame, or follow its end.
            TooLargeError: the frame announces more than the cap.
        """
        if self._body is None:
            self._begin(data)
        if self._decoder.eof and data:
            self._refuse("bytes after the end of a frame of zstd")
        self._fed = data

    def step(self, most: int) -> None:
        """Decompress about so many bytes, or all that was fed; on one thread at a time.

        Raises:
            UnreadableBodyError: the frame is corrupt, or something follows it.
            TooLargeError: it holds more than the cap.
        """
        until = self.filled + most
        while not self.is_hungry and self.filled < until:
            fed, self._fed = self._fed, b""
            # One byte more than there is room for shows that there are more.
            room = (self._max_bytes if self._claimed is None else self._claimed) - self.filled
            try:
                piece = self._decoder.decompress(fed, min(_PIECE_BYTES, room + 1))
            except self._zstd.ZstdError:
                self._refuse("no frame of zstd, a corrupt one, or one that needs more memory")
            self._keep(piece, room)
            if self._decoder.eof and self._decoder.unused_data:
                self._refuse("bytes after the end of a frame of zstd")

    def finish(self) -> bytearray | memoryview:
        """The whole body, which can be written to.

        Raises:
            UnreadableBodyError: the frame is not complete.
        """
        if self._body is None or not self._decoder.eof:
            self._refuse(f"a frame of zstd that is cut off after {self.filled} bytes of its content")
        return self._body

    def _begin(self, data: bytes | memoryview) -> None:
        try:
            self._claimed = self._zstd.get_frame_info(data).decompressed_size
        except self._zstd.ZstdError:
            self._refuse(f"{len(data)} bytes that do not begin as a frame of zstd")
        if self._claimed is None:
            self._body = bytearray()
            return
        if self._claimed > self._max_bytes:
            raise TooLargeError("body", f"{self._claimed} bytes, decompressed", self._limit)
        # Not bytearray: that writes zeros to every page, for a size that may be a lie.
        self._body = np.empty(self._claimed, np.uint8).data

    def _keep(self, piece: bytes, room: int) -> None:
        if isinstance(self._body, bytearray):
            if len(piece) > room:
                raise TooLargeError("body", f"more than {self._max_bytes} bytes, decompressed", self._limit)
            self._body += piece
        elif self._body is not None:
            if len(piece) > room:
                self._refuse(f"more than the {self._claimed} bytes that a frame of zstd announces")
            self._body[self.filled : self.filled + len(piece)] = piece
        self.filled += len(piece)

    def _refuse(self, found: str) -> NoReturn:
        raise UnreadableBodyError("body", found, _WANTED)


def decompress(data: bytes | bytearray | memoryview) -> bytearray | memoryview:
    """Decompress a whole body under no cap but what its length allows.

    Raises:
        UnreadableBodyError: it is not one whole frame.
        TooLargeError: its header announces more than so many bytes can hold.
        MissingExtraError: zstd is not installed.
    """
    limit = f"at most {_MOST_RATIO} times its {len(data)} bytes"
    body, view = Decompression(_MOST_RATIO * len(data), limit), memoryview(data)
    for at in range(0, len(view), _PIECE_BYTES):
        body.feed(view[at : at + _PIECE_BYTES])
        while not body.is_hungry:
            body.step(_PIECE_BYTES)
    return body.finish()

"""zstd: one frame, a cap that its header cannot lift, and nothing after it."""

from __future__ import annotations

import contextlib
import random
import struct
import sys
import tracemalloc
from typing import Any

import pytest

from argrad.errors import MissingExtraError
from argrad.wire import Decompression, TooLargeError, UnreadableBodyError, compress, decompress, load_zstd
from argrad.wire.compression import _PIECE_BYTES

zstd = load_zstd()
SKIPPABLE = struct.pack("<II", 0x184D2A50, 4) + b"skip"


def frame(content: bytes, *, announced: bool = True, window_log: int | None = None) -> bytes:
    """A frame as another program may write it."""
    parameter = zstd.CompressionParameter
    options = {parameter.checksum_flag: 1} | ({} if window_log is None else {parameter.window_log: window_log})
    compressor = zstd.ZstdCompressor(options=options)
    if announced:
        compressor.set_pledged_input_size(len(content))
    return compressor.compress(content) + compressor.flush()


def bomb(nbytes: int, *, announced: int | None = None) -> bytes:
    """A frame of zeros in run-length blocks of 128 KiB, four bytes each, that may announce another size than it has."""
    descriptor = 0x00 if announced is None else 0xC0  # a window of 1 MiB, and a content size of eight bytes or none
    head = struct.pack("<IBB", 0xFD2FB528, descriptor, 10 << 3)
    blocks = nbytes // (128 * 1024)
    run = (128 * 1024) << 3 | 1 << 1
    text = head if announced is None else head + struct.pack("<Q", announced)
    return text + (struct.pack("<I", run)[:3] + b"\0") * (blocks - 1) + struct.pack("<I", run | 1)[:3] + b"\0"


def read(data: bytes, max_bytes: int, piece: int = 1000, step: int = 1 << 20) -> bytes:
    """Decompress, as a service does, from pieces of that size."""
    body = Decompression(max_bytes, f"at most {max_bytes} bytes")
    for at in range(0, max(len(data), 1), piece):
        body.feed(data[at : at + piece])
        while not body.is_hungry:
            body.step(step)
            assert body.held <= max_bytes
    return bytes(body.finish())


CONTENTS = {
    "empty": b"",
    "short": b"abc",
    "zeros": bytes(3_000_000),
    "noise": random.Random(0).randbytes(700_001),
    "mixed": bytes(100_000) + random.Random(1).randbytes(_PIECE_BYTES) + b"x" * 100_000,
}


@pytest.mark.parametrize("name", CONTENTS)
def test_what_is_compressed_comes_back(name: str) -> None:
    content = CONTENTS[name]
    half = len(content) // 2
    compressed = b"".join(compress([content[:half], memoryview(content)[half:], b""], len(content)))
    assert zstd.get_frame_info(compressed).decompressed_size == len(content)
    assert bytes(decompress(compressed)) == content
    assert read(compressed, len(content)) == content


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "unannounced"])
@pytest.mark.parametrize("piece", [18, 999, 1 << 30])
def test_frames_of_other_programs(announced: bool, piece: int) -> None:
    content = b"argrad " * 20_000
    assert read(frame(content, announced=announced), len(content), piece) == content


def test_what_comes_back_can_be_written_to() -> None:
    for announced in (True, False):
        body = decompress(frame(b"abc", announced=announced))
        body[:1] = b"x"
        assert bytes(body) == b"xbc"


@pytest.mark.parametrize("step", [1, 100_000, 1 << 30])
def test_a_step_decompresses_no_more_than_a_piece_beyond_what_it_is_told(step: int) -> None:
    body = Decompression(10_000_000, "at most 10000000 bytes")
    body.feed(bomb(8 << 20, announced=8 << 20))
    while not body.is_hungry:
        before = body.filled
        body.step(step)
        assert body.filled - before <= step + _PIECE_BYTES
    assert body.filled == 8 << 20


class TestBombs:
    @pytest.mark.parametrize("announced", [None, 200_000, 1 << 40, (1 << 63) - 1])
    def test_a_bomb_ends_at_the_cap_whatever_it_announces(self, announced: int | None) -> None:
        data = bomb(1 << 30, announced=announced)
        assert len(data) < 40_000
        tracemalloc.start()
        with pytest.raises((TooLargeError, UnreadableBodyError)) as caught:
            read(data, 4 << 20)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 12 << 20
        if announced == 200_000:
            assert isinstance(caught.value, UnreadableBodyError)
            assert "a corrupt one" in caught.value.found, "the library compares the two itself"
        else:
            assert caught.value.wanted == "at most 4194304 bytes"
            assert "bytes, decompressed" in caught.value.found

    def test_a_body_of_exactly_the_cap_is_no_bomb(self) -> None:
        for announced in (None, 4 << 20):
            assert read(bomb(4 << 20, announced=announced), 4 << 20) == bytes(4 << 20)
            with pytest.raises(TooLargeError):
                read(bomb(4 << 20, announced=announced), (4 << 20) - 1)

    def test_a_reply_cannot_announce_more_than_its_length_could_hold(self) -> None:
        with pytest.raises(TooLargeError, match="found 1099511627776 bytes, decompressed, wanted at most 32768 times"):
            decompress(bomb(1 << 20, announced=1 << 40))
        assert len(decompress(bomb(64 << 20))) == 64 << 20


class TestWrongFrames:
    @pytest.mark.parametrize("announced", [True, False], ids=["announced", "unannounced"])
    def test_every_truncation_is_seen(self, announced: bool) -> None:
        data = frame(b"a frame that is cut off " * 40, announced=announced)
        for end in range(len(data)):
            with pytest.raises(UnreadableBodyError, match=r"body: found .* wanted one whole frame of zstd"):
                read(data[:end], 10_000)

    def test_every_flipped_bit_is_seen_or_harmless(self) -> None:
        content = b"a frame with a checksum " * 10
        data = frame(content)
        for at in range(8 * len(data)):
            flipped = bytearray(data)
            flipped[at // 8] ^= 1 << at % 8
            with contextlib.suppress(UnreadableBodyError, TooLargeError):
                assert read(bytes(flipped), 10_000) == content

    @pytest.mark.parametrize("piece", [19, 1 << 30])
    @pytest.mark.parametrize("more", [b"\0", b"garbage", frame(b"another"), SKIPPABLE], ids=range(4))
    def test_nothing_may_follow_a_frame(self, more: bytes, piece: int) -> None:
        with pytest.raises(UnreadableBodyError, match="found bytes after the end of a frame of zstd"):
            read(frame(b"first " * 10) + more, 10_000, piece)

    def test_a_skippable_frame_is_no_body(self) -> None:
        with pytest.raises(UnreadableBodyError):
            read(SKIPPABLE + frame(b"abc"), 10_000)

    @pytest.mark.parametrize("data", [b"", b"\x28\xb5", b"x" * 100, b'{"problem": {"q": [1, 1], "Q": [[1, 0]]}}'])
    def test_no_frame(self, data: bytes) -> None:
        with pytest.raises(UnreadableBodyError, match=f"{len(data)} bytes that do not begin as a frame of zstd"):
            read(data, 10_000)

    @pytest.mark.parametrize(("log", "is_read"), [(23, True), (24, False), (27, False)])
    def test_the_window_is_bounded(self, log: int, is_read: bool) -> None:
        data = frame(bytes(17 << 20), announced=False, window_log=log)
        if is_read:
            assert len(read(data, 17 << 20)) == 17 << 20
        else:
            with pytest.raises(UnreadableBodyError, match=r"needs more memory, wanted .* window of at most 8 MiB"):
                read(data, 17 << 20)

    def test_a_dictionary_is_not_known_here(self) -> None:
        dictionary = zstd.train_dict([b"argrad %d solves %d problems" % (i, i * i) for i in range(500)], 2000)
        with pytest.raises(UnreadableBodyError, match="wanted one whole frame of zstd, without a dictionary"):
            read(zstd.compress(b"argrad 7 solves 49 problems", zstd_dict=dictionary), 10_000)


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    load_zstd.cache_clear()
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    package: Any = sys.modules.get("backports")
    monkeypatch.delattr(package, "zstd", raising=False)
    try:
        with pytest.raises(MissingExtraError, match=r"compression with zstd needs .* pip install 'argrad\[zstd\]'"):
            compress([b"abc"], 3)
    finally:
        load_zstd.cache_clear()

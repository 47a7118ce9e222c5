"""The safetensors codec against the package, against every way a header can lie, and against itself."""

from __future__ import annotations

import json
import struct

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from argrad.errors import ProblemError
from argrad.wire import safetensors as ours
from argrad.wire.errors import UnreadableBodyError

DTYPES = (np.float64, np.float32, np.int64)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda n: n != "__metadata__")


def arrays() -> st.SearchStrategy[np.ndarray]:
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    return st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, shapes))


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[k].dtype == v.dtype and found[k].shape == v.shape and found[k].numpy().tobytes() == v.numpy().tobytes()
        for k, v in wanted.items()
    )


def file(header: object, data: bytes = b"", *, pad: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * pad
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: object = (2,), offsets: object = (0, 16), dtype: object = "F64") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@given(st.dictionaries(NAMES, arrays(), max_size=5), st.dictionaries(NAMES, st.text(st.characters(codec="utf-8"))))
def test_round_trip_is_the_identity(given_arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    tensors = {name: torch.from_numpy(array) for name, array in given_arrays.items()}
    body = bytearray(b"".join(ours.write(metadata, tensors)))
    found_metadata, found = ours.read(body)
    assert found_metadata == metadata
    assert same(found, tensors)


@given(st.dictionaries(NAMES, arrays(), min_size=1, max_size=5))
def test_the_package_reads_what_we_write(given_arrays: dict[str, np.ndarray]) -> None:
    tensors = {name: torch.from_numpy(array) for name, array in given_arrays.items()}
    assert same(safetensors.torch.load(b"".join(ours.write({"argrad": "{}"}, tensors))), tensors)


@given(st.dictionaries(NAMES, arrays(), min_size=1, max_size=5))
def test_we_read_what_the_package_writes(given_arrays: dict[str, np.ndarray]) -> None:
    tensors = {name: torch.from_numpy(array) for name, array in given_arrays.items()}
    metadata, found = ours.read(bytearray(safetensors.torch.save(tensors, {"argrad": "{}"})))
    assert metadata == {"argrad": "{}"}
    assert same(found, tensors)


def test_data_begin_at_a_multiple_of_64_and_wide_dtypes_come_first() -> None:
    tensors = {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.float64), "c": torch.tensor(7)}
    body = bytearray(b"".join(ours.write({}, tensors)))
    assert (8 + struct.unpack("<Q", body[:8])[0]) % 64 == 0
    found = ours.read(body)[1]
    assert all(t.data_ptr() % t.element_size() == 0 for t in found.values())
    assert same(found, tensors)


def test_nothing_is_copied_either_way() -> None:
    tensor = torch.arange(6, dtype=torch.float64).view(2, 3)
    buffers = ours.write({}, {"x": tensor})
    tensor[0, 0] = 42.0
    assert np.frombuffer(buffers[1], dtype=np.float64)[0] == 42.0
    body = bytearray(b"".join(buffers))
    found = ours.read(body)[1]["x"]
    body[-8:] = struct.pack("<d", -1.5)
    assert found[1, 2] == -1.5


def test_a_tensor_that_is_not_contiguous_or_needs_a_gradient_is_written_by_value() -> None:
    tensor = torch.arange(6, dtype=torch.float64).view(2, 3).requires_grad_()
    body = b"".join(ours.write({}, {"t": tensor.T, "wide": tensor[:, :1].expand(2, 3)}))
    found = ours.read(body)[1]
    assert found["t"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert found["wide"].tolist() == [[0.0] * 3, [3.0] * 3]


def test_a_read_only_body_is_copied_so_that_its_tensors_may_be_changed() -> None:
    body = b"".join(ours.write({}, {"x": torch.zeros(2)}))
    for view in (body, memoryview(body)):
        found = ours.read(view)[1]["x"]  # warnings are errors
        found += 1
        assert ours.read(body)[1]["x"].tolist() == [0.0, 0.0]


def test_tensors_outlive_the_name_of_their_body() -> None:
    body = bytearray(b"".join(ours.write({}, {"x": torch.tensor([1.0, 2.0])})))
    found = ours.read(memoryview(body))[1]["x"]
    del body
    assert found.tolist() == [1.0, 2.0]


def test_another_writers_unaligned_tensors_are_copied_into_place() -> None:
    data = struct.pack("<f", 0.5) + struct.pack("<d", 2.5)
    header = {"a": entry((1,), (0, 4), "F32"), "b": entry((1,), (4, 12))}
    found = ours.read(bytearray(file(header, data)))[1]
    assert found["b"].data_ptr() % 8 == 0
    assert (found["a"].item(), found["b"].item()) == (0.5, 2.5)


LIES = {
    "no-length": (b"\x00" * 7, r"body: found 7 bytes, wanted at least the 8 bytes of the header's length"),
    "header-over-the-cap": (
        struct.pack("<Q", 2**20 + 1),
        r"header length: found 1048577 bytes, wanted at most 1048576",
    ),
    "huge-header": (b"\xff" * 64, r"header length: found 18446744073709551615 bytes"),
    "header-cut": (struct.pack("<Q", 90) + b"{}", r"body: found 10 bytes, wanted at least 98"),
    "data-cut": (
        file({"a": entry()}, b"x" * 15),
        r"a: found data_offsets \[0, 16\], wanted an end within the 15 bytes",
    ),
    "trailing-bytes": (file({"a": entry()}, b"x" * 17), r"body: found 17 bytes of data, wanted 16, as the header's"),
    "no-tensors-but-data": (file({}, b"x"), r"body: found 1 bytes of data, wanted 0"),
    "not-json": (file(b"{]"), r"header: found .*line 1 column 2.*wanted JSON"),
    "not-utf8": (file(b'{"\xff": 1}'), r"header: found .*utf-8.*wanted JSON in UTF-8"),
    "bare-nan": (file(b'{"a": NaN}'), r"header: found the bare word NaN"),
    "endless-integer": (file(b'{"a": ' + b"9" * 5000 + b"}"), r"header: found Exceeds the limit"),
    "nested": (file(b"[" * 100_000), r"header: found maximum recursion depth"),
    "a-list": (file([]), r"header: found a list of 0, wanted a JSON object"),
    "repeated-name": (
        file(b'{"a": {"dtype": "F64", "shape": [0], "data_offsets": [0, 0]}, "a": 1}'),
        r'header: found the key "a" twice in one object, wanted JSON in UTF-8 without repeated keys',
    ),
    "repeated-offsets": (
        file(b'{"a": {"dtype": "F64", "shape": [0], "data_offsets": [0, 0], "data_offsets": [0, 8]}}'),
        r'the key "data_offsets" twice',
    ),
    "entry-not-an-object": (file({"a": 3}), r"a: found 3, wanted an object of dtype, shape and data_offsets"),
    "entry-without-shape": (file({"a": {"dtype": "F64"}}), r"a: found the members dtype, wanted an object of dtype"),
    "entry-with-more": (file({"a": entry() | {"x": 1}}, b"x" * 16), r"a: found the members dtype, shape, data_off"),
    "metadata-not-an-object": (file({"__metadata__": 1}), r"__metadata__: found 1, wanted an object of strings"),
    "metadata-not-strings": (file({"__metadata__": {"k": 1}}), r"__metadata__\.k: found 1, wanted a string"),
    "unknown-dtype": (file({"a": entry(dtype="C64")}, b"x" * 16), r'a: found dtype "C64", wanted F64 or F32'),
    "dtype-not-text": (file({"a": entry(dtype=["F64"])}, b"x" * 16), r"a: found dtype a list of 1, wanted F64"),
    "negative-size": (file({"a": entry((-2,))}, b"x" * 16), r"a: found shape \[-2\], wanted at most 8 integers"),
    "fractional-size": (file({"a": entry((2.0,))}, b"x" * 16), r"a: found shape \[2\.0\], wanted"),
    "boolean-size": (file({"a": entry((True,), (0, 8))}, b"x" * 8), r"a: found shape \[true\], wanted"),
    "shape-not-a-list": (file({"a": entry(2)}, b"x" * 16), r"a: found shape 2, wanted"),
    "nine-dimensions": (file({"a": entry([1] * 9, (0, 8))}, b"x" * 8), r"shape \[1, 1, 1, 1, 1, 1, 1, 1, …\]"),
    "overflow": (file({"a": entry((2**32, 2**32), (0, 0))}), r"shape \[4294967296, 4294967296\], wanted at most"),
    "overflow-behind-zero": (file({"a": entry((0, 2**62, 2**62), (0, 0))}), r"and at most 9007199254740992 elements"),
    "negative-offset": (file({"a": entry((2,), (-16, 0))}, b"x" * 16), r"data_offsets \[-16, 0\], wanted \[begin"),
    "offsets-swapped": (file({"a": entry((2,), (16, 0))}, b"x" * 16), r"data_offsets \[16, 0\], wanted \[begin, end"),
    "one-offset": (file({"a": entry((2,), (16,))}, b"x" * 16), r"data_offsets \[16\], wanted \[begin, end\]"),
    "offsets-not-integers": (file({"a": entry((2,), (0, "16"))}, b"x" * 16), r'data_offsets \[0, "16"\], wanted'),
    "too-few-bytes": (file({"a": entry((3,))}, b"x" * 16), r"\[0, 16\], wanted 24 bytes, as dtype F64 and shape \[3\]"),
    "too-many-bytes": (file({"a": entry((1,))}, b"x" * 16), r"\[0, 16\], wanted 8 bytes, as dtype F64 and shape \[1\]"),
    "overrun": (file({"a": entry((2**40,), (0, 2**43))}, b"x" * 16), r"wanted an end within the 16 bytes of data"),
    "overlap": (
        file({"a": entry(), "b": entry((2,), (8, 24))}, b"x" * 24),
        r"b: found an overlap at data_offsets \[8, 24\], wanted data_offsets \[16, …\]",
    ),
    "metadata-twice": (
        file(b'{"__metadata__":{"argrad":"x"},"a":' + json.dumps(entry()).encode() + b',"__metadata__":{}}', bytes(16)),
        'header: found the key "__metadata__" twice in one object',
    ),
    "metadata-twice-and-escaped": (
        file(b'{"__metadata__":{"argrad":"x"},"\\u005f_metadata__":{"argrad":"y"}}'),
        'header: found the key "__metadata__" twice in one object',
    ),
    "same-span-twice": (
        file({"a": entry(), "b": entry()}, b"x" * 16),
        r"b: found an overlap at data_offsets \[0, 16\]",
    ),
    "gap": (
        file({"a": entry(), "b": entry((2,), (24, 40))}, b"x" * 40),
        r"b: found a gap at data_offsets \[24, 40\], wanted data_offsets \[16, …\]",
    ),
    "gap-in-front": (file({"a": entry((2,), (8, 24))}, b"x" * 24), r"a: found a gap at data_offsets \[8, 24\]"),
    "name-of-a-megabyte": (file({"x" * 10_000: 3}), r"^x{79}…: found 3, wanted"),
    "name-not-printable": (file({"a\n\ud800": 3}), r"^'a\\n\\ud800': found 3, wanted"),
}


@pytest.mark.parametrize(("body", "message"), LIES.values(), ids=LIES)
def test_a_header_that_lies_is_refused_by_name(body: bytes, message: str) -> None:
    with pytest.raises(UnreadableBodyError, match=message):
        ours.read(bytearray(body))


@given(st.text(st.characters(codec="utf-8")) | st.sampled_from(['"},"', '\\"},"', '{"a":"b"},"c', "\\", '"']))
def test_any_document_comes_back_whatever_layout_is_remembered(document: str) -> None:
    tensors = {"a": torch.arange(2.0), "b": torch.arange(3)}
    for _ in range(2):
        metadata, found = ours.read(bytearray(b"".join(ours.write({"argrad": document}, tensors))))
        assert metadata == {"argrad": document}
        assert same(found, tensors)


def test_a_layout_that_is_remembered_is_checked_against_each_body() -> None:
    body = b"".join(ours.write({"argrad": "{}"}, {"a": torch.arange(2.0)}))
    assert ours.read(bytearray(body))[1]["a"].tolist() == [0.0, 1.0]
    with pytest.raises(UnreadableBodyError, match="an end within the 7 bytes of data"):
        ours.read(bytearray(body[:-1]))
    with pytest.raises(UnreadableBodyError, match="body: found 9 bytes of data, wanted 8, as the header's"):
        ours.read(bytearray(body + b"x"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_readable_and_refused(dtype: torch.dtype) -> None:
    body = safetensors.torch.save({"problem.q": torch.ones(2, dtype=dtype)})
    with pytest.raises(
        ProblemError, match=r"problem\.q: found dtype B?F16, wanted F64 or F32 .* half precision is ref"
    ):
        ours.read(body)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bool, torch.complex128])
def test_other_dtypes_are_not_written(dtype: torch.dtype) -> None:
    with pytest.raises(
        ProblemError, match=rf"problem\.q: found dtype {dtype}, wanted torch\.float64 or torch\.float32"
    ):
        ours.write({}, {"problem.q": torch.ones(2, dtype=dtype)})


def test_the_header_cap_can_be_raised() -> None:
    body = b"".join(ours.write({"argrad": "x" * 2**20}, {}))
    assert ours.read(body, max_header_bytes=2**21)[0]["argrad"] == "x" * 2**20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_a_gpu_are_copied_to_the_host() -> None:
    tensor = torch.arange(6, dtype=torch.float64).view(2, 3)
    found = ours.read(b"".join(ours.write({}, {"x": tensor.cuda()})))[1]["x"]
    assert found.device.type == "cpu"
    assert torch.equal(found, tensor)

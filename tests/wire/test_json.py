"""The JSON codec: exact numbers, strings for what is not finite, and an answer to every malformed body."""

from __future__ import annotations

import json

import hypothesis.extra.numpy as hnp
import numpy as np
import orjson
import pytest
import torch
from hypothesis import given

from argrad.errors import ProblemError
from argrad.wire import JSON, JsonLimits, TooLargeError, UnreadableBodyError, decode, encode
from argrad.wire.messages import ReportDocument, SolveReply, SolveRequest, VjpRequest

REPLY = SolveReply(status="optimal", report=ReportDocument(solver="pdipm"))


def read(text: str | bytes, **options: object) -> tuple[SolveRequest, dict[str, torch.Tensor]]:
    body = text if isinstance(text, bytes) else text.encode()
    return decode(SolveRequest, body, JSON, **options)  # type: ignore[arg-type]


@given(hnp.arrays(np.float64, hnp.array_shapes(min_dims=1, max_dims=4, max_side=4)))
def test_float64_survives_bit_for_bit_with_nan_and_infinities(array: np.ndarray) -> None:
    body = b"".join(encode(SolveRequest(), {"problem.Q": torch.from_numpy(array)}, JSON))
    assert b"null" not in body
    found = read(body)[1]["problem.Q"].numpy()
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, array)
    np.testing.assert_array_equal(np.signbit(found)[~np.isnan(array)], np.signbit(array)[~np.isnan(array)])


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=2, max_side=4)))
def test_float32_arrives_as_the_same_number_in_float64(array: np.ndarray) -> None:
    found = read(b"".join(encode(SolveRequest(), {"problem.Q": torch.from_numpy(array)}, JSON)))[1]["problem.Q"]
    np.testing.assert_array_equal(found.numpy(), array.astype(np.float64))


@given(hnp.arrays(np.int64, hnp.array_shapes(min_dims=0, max_dims=2, max_side=4)))
def test_iterations_stay_int64(array: np.ndarray) -> None:
    body = b"".join(encode(REPLY, {"report.iterations": torch.from_numpy(array)}, JSON))
    found = decode(SolveReply, body, JSON)[1]["report.iterations"]
    assert found.dtype == torch.int64
    np.testing.assert_array_equal(found.numpy(), array)


def test_words_for_what_is_not_finite_and_scalars_in_a_report() -> None:
    tensors = {
        "solution.z": torch.tensor([[1.5, -torch.inf], [torch.inf, torch.nan]], dtype=torch.float64),
        "report.gap": torch.tensor(torch.inf, dtype=torch.float64),
        "report.iterations": torch.tensor(3),
    }
    body = encode(REPLY, tensors, JSON)[0]
    document = json.loads(bytes(body))
    assert document["solution"]["z"] == [[1.5, "-Infinity"], ["Infinity", "NaN"]]
    assert document["report"] == {"solver": "pdipm", "flags": [], "gap": "Infinity", "iterations": 3}
    reply, found = decode(SolveReply, body, JSON)
    assert reply == REPLY
    torch.testing.assert_close(found, tensors, rtol=0, atol=0, equal_nan=True)


def test_empty_lists_and_nulls() -> None:
    request, tensors = read('{"problem": {"Q": [[1]], "G": [], "A": [[], []], "b": null}, "upstream": null}')
    assert request == SolveRequest()
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "problem.Q": (1, 1),
        "problem.G": (0,),
        "problem.A": (2, 0),
    }
    body = encode(SolveRequest(), {"problem.G": torch.zeros(0, 3), "problem.A": torch.zeros(2, 0)}, JSON)[0]
    assert json.loads(bytes(body))["problem"] == {"kind": "qp", "G": [], "A": [[], []]}


def test_integers_are_read_as_float64_and_what_is_none_is_not_written() -> None:
    tensors = read('{"problem": {"q": [1, 2.5, 18446744073709551616]}}')[1]
    assert tensors["problem.q"].dtype == torch.float64
    assert tensors["problem.q"].tolist() == [1.0, 2.5, 2.0**64]
    assert "state" not in json.loads(bytes(encode(VjpRequest(), {}, JSON)[0]))
    assert "problem" not in json.loads(bytes(encode(VjpRequest(), {}, JSON)[0]))


def test_a_body_may_be_a_view() -> None:
    body = memoryview(bytearray(b'{"problem": {"q": [1]}}'))
    assert decode(SolveRequest, body, JSON)[1]["problem.q"].tolist() == [1.0]


TENSORS = {
    "boolean": ("[1, true]", r"found true at \[1\], wanted numbers"),
    "null": ("[[1, 2], [3, null]]", r"found null at \[1, 1\], wanted numbers, or \"Infinity\", \"-Infinity\", \"NaN\""),
    "string": ('[1, "2"]', r'found "2" at \[1\], wanted numbers'),
    "lower-case-nan": ('["nan"]', r'found "nan" at \[0\]'),
    "object": ('[{"a": 1}]', r"found an object at \[0\], wanted numbers"),
    "ragged": ("[[1, 2], [3]]", r"found a row of 1 at \[1\], wanted 2, as in the rows before it"),
    "ragged-deeper": ("[[[1], [2]], [[3], [4, 5]]]", r"found a row of 2 at \[1, 1\], wanted 1"),
    "ragged-empty": ("[[1], []]", r"found a row of 0 at \[1\], wanted 1"),
    "list-among-numbers": ("[[1, 2], [3, [4]]]", r"found a list at \[1, 1\], wanted a number, as before it"),
    "number-among-lists": ("[[1], 2]", r"found 2 at \[1\], wanted a list, as before it"),
    "too-deep": ("[" * 9 + "1" + "]" * 9, r"found lists nested more than 8 deep"),
    "bare-number": ("3", r"found 3, wanted a list of numbers"),
    "bare-string": ('"NaN"', r'found "NaN", wanted a list of numbers'),
    "bare-object": ("{}", r"found an object, wanted a list of numbers"),
}


@pytest.mark.parametrize(("text", "message"), TENSORS.values(), ids=TENSORS)
def test_what_is_not_a_nested_list_of_numbers(text: str, message: str) -> None:
    with pytest.raises(ProblemError, match=rf"^problem\.Q: {message}") as caught:
        read(f'{{"problem": {{"Q": {text}}}}}')
    assert caught.value.field == "problem.Q"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2.5]", "found 2.5, wanted integers"),
        ('"NaN"', 'found "NaN", wanted integers'),
        ("[true]", "found true, wanted integers"),
        ("[9223372036854775808]", "found an integer of more than 63 bits"),
    ],
)
def test_iterations_are_integers(text: str, message: str) -> None:
    body = f'{{"status": "optimal", "report": {{"solver": "x", "iterations": {text}}}}}'.encode()
    with pytest.raises(ProblemError, match=rf"^report\.iterations: {message}"):
        decode(SolveReply, body, JSON)


UNREADABLE = {
    "empty": (b"", r"body: found nothing, wanted JSON in UTF-8$"),
    "blank": (b" \n", r"body: found nothing, wanted JSON in UTF-8$"),
    "bare-nan": (
        b'{"problem": {"q": [1,\n NaN]}}',
        r'body: found NaN at line 2, column 2, wanted JSON in UTF-8, where "NaN", "Infinity" and "-Infinity" stand in',
    ),
    "bare-infinity": (b'{"problem": {"q": [-Infinity]}}', r"body: found -Infinity at line 1, column 21, wanted JSON"),
    "bare-inf": (b'{"problem": {"q": [inf]}}', r"body: found inf at line 1, column 20, wanted JSON"),
    "overflow": (
        b'{"problem": {"q": [-1e999]}}',
        r'body: found a number beyond float64 at line 1, column 20, wanted numbers up to 1.8e308, or "Infinity"',
    ),
    "cut": (b'{"problem": {"q": [1,', r"body: found .* at line 1, column \d+"),
    "second-line": (b'{\n"problem": }', r"body: found .* at line 2, column 12"),
    "not-utf8": (b'{"a": "\xff"}', r"body: found .*UTF-8"),
    "repeated-key": (b'{"problem": {"q": [1], "q": [2]}}', r'body: found the key "q" twice in one object'),
    "repeated-escaped": (b'{"state": 1, "st\\u0061te": 2}', r'body: found the key "state" twice'),
}


@pytest.mark.parametrize(("body", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_bodies_say_where(body: bytes, message: str) -> None:
    with pytest.raises(UnreadableBodyError, match=message):
        read(body)


def test_a_colon_in_a_string_is_no_repeated_key() -> None:
    assert decode(VjpRequest, b'{"state": "a:b:c"}', JSON)[0].state == "a:b:c"


WRONG = {
    "not-an-object": ("[1]", "body: found a list of 1, wanted a JSON object"),
    "unknown": ('{"problm": {}}', r"problm: found an unknown field, wanted one of .*solver, keep_state, .*; or t"),
    "unknown-lists-tensors": (
        '{"x": 1}',
        r"x: found an unknown field, wanted .*tensors problem\.\*, upstream\.\*, war",
    ),
    "unknown-inside": (
        '{"solver": {"nam": "x"}}',
        r"solver\.nam: found an unknown field, wanted one of name, tolerance, max_iterations, options$",
    ),
    "section-not-object": ('{"problem": 3}', "problem: found 3, wanted an object"),
    "kind": ('{"problem": {"kind": "lp"}}', r"problem\.kind: found \"lp\", wanted 'qp', 'qp_two_sided' or 'sparse_qp'"),
    "protocol": ('{"protocol": 2}', "protocol: found 2, wanted 1"),
    "tolerance-zero": (
        '{"solver": {"tolerance": 0}}',
        r"solver\.tolerance: found 0, wanted a number >= 1e-12",
    ),
    "iterations": (
        '{"solver": {"max_iterations": 1000000000}}',
        r"solver\.max_iterations: found 1000000000, wanted a number <= 10000",
    ),
    "text-for-number": ('{"solver": {"tolerance": "1e-8"}}', r'tolerance: found "1e-8", wanted a valid number'),
    "boolean-for-integer": (
        '{"solver": {"max_iterations": true}}',
        r"max_iterations: found true, wanted a valid integ",
    ),
    "object-missing": ('{"solver": "auto"}', 'solver: found "auto", wanted an object'),
    "wrt-not-list": ('{"wrt": "q"}', 'wrt: found "q", wanted a valid list'),
    "wrt-item": ('{"wrt": ["q", 1]}', r"wrt\.1: found 1, wanted a valid string"),
    "dotted-tensor": ('{"problem": {"a.b": [1]}}', r"problem\.a\.b: found a tensor of that name"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_readable_but_wrong_names_the_field(text: str, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        read(text)


def test_missing_fields_of_a_reply_are_named() -> None:
    with pytest.raises(ProblemError, match=r"^report: found nothing, wanted a value"):
        decode(SolveReply, b'{"status": "optimal"}', JSON)
    with pytest.raises(ProblemError, match=r"^report\.solver: found nothing, wanted a value"):
        decode(SolveReply, b'{"status": "optimal", "report": {"gap": 0}}', JSON)


def test_union_fields_are_named_without_pydantics_branches() -> None:
    with pytest.raises(ProblemError, match=r"^status: found 3, wanted a valid string"):
        decode(SolveReply, b'{"status": 3, "report": {"solver": "x"}}', JSON)


LIMITS = JsonLimits(max_bytes=200, max_brackets=6, max_numbers=10, max_depth=4)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b" " * 201, "body: found 201 bytes of JSON, wanted at most 200: use the binary form"),
        (b'{"problem": {"Q": [[],[],[],[]]}}', "found 7 brackets in JSON, wanted at most 6: use the binary form"),
        (b'{"problem": {"Q": [[[]]]}}', "found 5 nested brackets in JSON, wanted at most 4: use the binary form"),
        (b'{"problem": {"q": [0,0,0,0,0,0,0,0,0,0,0]}}', "found 11 elements in JSON, wanted at most 10: use the"),
    ],
    ids=["bytes", "brackets", "depth", "numbers"],
)
def test_limits_are_counted_before_anything_is_parsed(
    body: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orjson, "loads", lambda _: pytest.fail("parsed"))
    with pytest.raises(TooLargeError, match=message):
        read(body, limits=LIMITS)


def test_what_is_within_the_limits_passes() -> None:
    assert read(b'{"problem": {"q": [0,0,0,0,0,0,0,0,0,0]}}', limits=LIMITS)[1]["problem.q"].shape == (10,)
    assert JsonLimits().max_bytes == 2 * 2**20


def test_thousands_of_unknown_fields_cost_one_answer() -> None:
    body = b"{" + b",".join(b'"%d":1' % i for i in range(5000)) + b"}"
    with pytest.raises(ProblemError, match="body: found 5000 members, wanted at most 1000"):
        read(body)

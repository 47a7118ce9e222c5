"""Messages through both codecs, and what only a message can get wrong."""

from __future__ import annotations

import contextlib
import pickle

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from argrad.errors import ArgradError, ProblemError
from argrad.wire import (
    FORMATS,
    JSON,
    SAFETENSORS,
    TooLargeError,
    UnreadableBodyError,
    UnsupportedMediaTypeError,
    decode,
    encode,
    encoded_size,
)
from argrad.wire.messages import (
    DifferentiationDocument,
    JvpReply,
    JvpRequest,
    Message,
    ProblemDocument,
    ReportDocument,
    SolverDocument,
    SolveReply,
    SolveRequest,
    VjpReply,
    VjpRequest,
    WarmStartDocument,
)


def full(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape) / 3


REPORT = ReportDocument(solver="pdipm", method="kkt", flags=[["degenerate"], []])
MESSAGES: dict[str, tuple[Message, dict[str, torch.Tensor]]] = {
    "solve": (
        SolveRequest(
            solver=SolverDocument(tolerance=1e-6), wrt=["q", "b"], keep_state=False, warm_start=WarmStartDocument()
        ),
        {"problem.Q": full(2, 2), "problem.q": full(3, 2), "upstream.z": full(3, 2), "warm_start.z": full(3, 2)},
    ),
    "solve-warm": (SolveRequest(warm_start=WarmStartDocument(state="token")), {"problem.q": full(3, 2)}),
    "solve-two-sided": (
        SolveRequest(problem=ProblemDocument(kind="qp_two_sided")),
        {"problem.P": full(2, 2), "problem.u": torch.tensor([torch.inf, 1.0], dtype=torch.float64)},
    ),
    "vjp-by-token": (VjpRequest(state="token"), {"upstream.z": full(2)}),
    "vjp-stateless": (VjpRequest(problem=ProblemDocument()), {"problem.q": full(2), "solution.z": full(2)}),
    "jvp": (JvpRequest(differentiation=DifferentiationDocument(method="kkt")), {"tangents.q": full(2)}),
    "solve-reply": (
        SolveReply(status=["optimal", "infeasible"], report=REPORT, timings_ms={"solve": 1.5}, state="a.b"),
        {"solution.z": full(2, 2), "report.iterations": torch.tensor([3, 4]), "report.gap": full(2)},
    ),
    "solve-reply-unbatched": (
        SolveReply(status="optimal", report=ReportDocument(solver="pdipm"), gradient_status="ok"),
        {"solution.z": full(2), "report.iterations": torch.tensor(3), "report.gap": full(1)[0], "adjoint.z": full(2)},
    ),
    "vjp-reply": (VjpReply(report=REPORT, gradient_status=["ok", "infeasible"]), {"gradients.Q": full(2, 2, 2)}),
    "jvp-reply": (JvpReply(report=REPORT), {"tangents.z": full(2, 2)}),
}


@pytest.mark.parametrize("content_type", FORMATS)
@pytest.mark.parametrize(("message", "tensors"), MESSAGES.values(), ids=MESSAGES)
def test_decode_undoes_encode(message: Message, tensors: dict[str, torch.Tensor], content_type: str) -> None:
    buffers = encode(message, tensors, content_type)
    body = bytearray(b"".join(buffers))
    assert encoded_size(buffers) == len(body)
    found_message, found = decode(type(message), body, content_type)
    assert found_message == message
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


@given(
    st.builds(
        SolveRequest,
        problem=st.builds(ProblemDocument, kind=st.sampled_from(["qp", "qp_two_sided"])),
        solver=st.builds(
            SolverDocument,
            name=st.text(st.characters(codec="utf-8"), max_size=10),
            tolerance=st.floats(1e-12, 1e-1),
            max_iterations=st.integers(1, 10_000),
        ),
        wrt=st.none() | st.lists(st.text(st.characters(codec="utf-8"), max_size=3), max_size=3),
        gradients=st.sampled_from(["full", "adjoint"]),
        keep_state=st.none() | st.booleans(),
    ),
    st.sampled_from(FORMATS),
)
def test_any_document_survives_either_codec(request: SolveRequest, content_type: str) -> None:
    assert decode(SolveRequest, b"".join(encode(request, {}, content_type)), content_type)[0] == request


def test_the_package_reads_a_whole_message() -> None:
    message, tensors = MESSAGES["solve"]
    found = safetensors.torch.load(b"".join(encode(message, tensors, SAFETENSORS)))
    assert found.keys() == tensors.keys()
    assert torch.equal(found["problem.q"], tensors["problem.q"])


def test_a_message_written_with_the_package_is_read() -> None:
    body = safetensors.torch.save({"problem.q": full(2)}, {"argrad": '{"solver": {"name": "pdipm"}}'})
    request, tensors = decode(SolveRequest, body, SAFETENSORS)
    assert request.solver.name == "pdipm"
    assert torch.equal(tensors["problem.q"], full(2))


def test_an_object_that_has_only_tensors_counts_as_there_in_both_forms() -> None:
    for body, content_type in (
        (b'{"problem": {"q": [1]}}', JSON),
        (safetensors.torch.save({"problem.q": full(1)}, {"argrad": "{}"}), SAFETENSORS),
    ):
        assert decode(VjpRequest, body, content_type)[0].problem == ProblemDocument()
    assert decode(VjpRequest, b"{}", JSON)[0].problem is None


@pytest.mark.parametrize(
    ("document", "error", "message"),
    [
        (None, UnreadableBodyError, r"__metadata__\.argrad: found nothing, wanted the JSON document"),
        ("{", UnreadableBodyError, r"__metadata__\.argrad: found .* at line 1, column 2"),
        ("[]", ProblemError, r"__metadata__\.argrad: found a list of 0, wanted a JSON object"),
        ('{"solver": {}, "solver": {}}', UnreadableBodyError, 'the key "solver" twice'),
        ('{"upstream": {"z": [1]}}', ProblemError, r"upstream: found an unknown field, wanted one of .*tensors prob"),
        ('{"problem": {"Q": [[1]]}}', ProblemError, r"problem\.Q: found an unknown field, wanted one of kind"),
        ('{"problem": 3}', ProblemError, "problem: found 3, wanted an object"),
    ],
)
def test_a_document_in_the_header_is_checked_like_any_other(
    document: str | None, error: type[ArgradError], message: str
) -> None:
    body = safetensors.torch.save({"problem.q": full(2)}, None if document is None else {"argrad": document})
    with pytest.raises(error, match=message):
        decode(SolveRequest, body, SAFETENSORS)


@pytest.mark.parametrize("name", ["q", "problems.q", "problem.", "problem.kind", "problem.a.b", ""])
def test_a_tensor_without_a_place_is_refused_both_ways(name: str) -> None:
    message = r"found a tensor of that name, wanted problem\.<name> or upstream\.<name> or warm_start\.<name>"
    for content_type in FORMATS:
        with pytest.raises(ProblemError, match=message):
            encode(SolveRequest(), {name: full(2)}, content_type)
    with pytest.raises(ProblemError, match=message):
        decode(SolveRequest, safetensors.torch.save({name: full(2)}, {"argrad": "{}"}), SAFETENSORS)


@pytest.mark.parametrize("content_type", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bool])
def test_dtypes_that_do_not_travel(content_type: str, dtype: torch.dtype) -> None:
    with pytest.raises(ProblemError, match=rf"problem\.q: found dtype {dtype}, wanted torch\.float64"):
        encode(SolveRequest(), {"problem.q": torch.ones(2, dtype=dtype)}, content_type)


@pytest.mark.parametrize("content_type", FORMATS)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 400))
def test_a_damaged_body_is_read_or_refused_and_nothing_else(
    content_type: str, damage: list[tuple[int, int]], cut: int
) -> None:
    body = bytearray(b"".join(encode(*MESSAGES["solve"], content_type)))
    for position, value in damage:
        body[position % len(body)] = value
    for damaged in (body, body[: len(body) - cut]):
        with contextlib.suppress(ArgradError):
            decode(SolveRequest, damaged, content_type)


@pytest.mark.parametrize("content_type", [None, "text/plain"])
def test_an_unknown_content_type(content_type: str | None) -> None:
    with pytest.raises(UnsupportedMediaTypeError, match="Content-Type"):
        decode(SolveRequest, b"{}", content_type)


@pytest.mark.parametrize("error", [UnreadableBodyError, TooLargeError, UnsupportedMediaTypeError])
def test_wire_errors_pickle_and_keep_their_parts(error: type[UnreadableBodyError]) -> None:
    again = pickle.loads(pickle.dumps(error("body", "x", "y")))
    assert (type(again), str(again)) == (error, "body: found x, wanted y")
    assert (again.field, again.found, again.wanted) == ("body", "x", "y")


def test_a_document_that_recurs_is_read_once_and_its_tensors_each_time() -> None:
    request = SolveRequest(solver=SolverDocument(name="pdipm", tolerance=1e-6))
    bodies = [encode(request, {"problem.q": torch.full((3,), value)}, SAFETENSORS) for value in (1.0, 2.0)]
    (first, ones), (second, twos) = (decode(SolveRequest, b"".join(body), SAFETENSORS) for body in bodies)
    assert first == second == request
    assert first is second
    assert ones["problem.q"].tolist() == [1.0] * 3
    assert twos["problem.q"].tolist() == [2.0] * 3


def test_a_header_that_recurs_is_checked_against_each_body_and_each_model() -> None:
    body = b"".join(encode(SolveRequest(), {"problem.q": torch.ones(2)}, SAFETENSORS))
    for _ in range(2):
        decode(SolveRequest, body, SAFETENSORS)
        with pytest.raises(UnreadableBodyError, match="an end within the 7 bytes of data"):
            decode(SolveRequest, body[:-1], SAFETENSORS)
        with pytest.raises(ProblemError, match="deterministic: found an unknown field"):
            decode(VjpRequest, body, SAFETENSORS)

"""Solutions and cotangents that travel in float32."""

from __future__ import annotations

import pytest
import torch

import argrad
from argrad import QP, Client, Options, ProblemError
from argrad.nn import QPLayer
from argrad.wire.messages import VjpRequest
from tests.client.support import D, Recorder, assert_close, draw

NARROW = Options(precision="float32")


class Dtypes(Recorder):
    """A recorder that keeps the dtypes of replies."""

    def __init__(self) -> None:
        super().__init__()
        self.replied: set[torch.dtype] = set()

    def _pass(self, name: str, *rest: object) -> object:
        reply, out = super()._pass(name, *rest)  # type: ignore[arg-type]
        self.replied |= {tensor.dtype for tensor in out.values() if tensor.is_floating_point()}
        return reply, out


def test_a_layer_in_float32_of_the_wire_has_seven_digits() -> None:
    recorder = Dtypes()
    client, given = Client(recorder), draw(0, batch=3)
    grads = []
    for precision in ("float32", "float64"):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
        z = QPLayer(client, precision=precision)(**leaves)  # type: ignore[arg-type]
        z.square().sum().backward()
        grads.append([z.detach(), *(leaf.grad for leaf in leaves.values())])
        if precision == "float32":
            assert recorder.replied == {torch.float32}
            sent = {name: tensor.dtype for *_, tensors, _ in recorder.exchanges for name, tensor in tensors.items()}
            assert sent == {f"problem.{name}": D for name in given} | {"upstream.z": torch.float32}
    for one, other in zip(*grads, strict=True):
        assert one is not None
        assert one.dtype == D
        assert_close(one, other, 1e-5)  # type: ignore[arg-type]
    assert (grads[0][0] != grads[1][0]).any()  # type: ignore[union-attr]


@pytest.mark.parametrize("lost", [False, True])
def test_calls(recorder: Recorder, recorded: Client, lost: bool) -> None:
    problem = QP(**draw(1, batch=2))
    upstream, tangents = {"z": torch.ones(2, 4, dtype=D)}, {"q": torch.ones(2, 4, dtype=D)}
    at, exact = recorded.solve(problem, options=NARROW), recorded.solve(problem)
    if lost:
        recorder.forget_states()
    assert at.solution["z"].dtype == D
    for name, tensor in (recorded.vjp(exact, upstream).gradients or {}).items():
        assert_close((recorded.vjp(at, upstream, options=NARROW).gradients or {})[name], tensor, 1e-5)
    moved = recorded.jvp(at, tangents, options=NARROW).tangents
    assert_close(moved["z"], recorded.jvp(exact, tangents).tangents["z"], 1e-5)
    together = recorded.solve(problem, options=NARROW, upstream=upstream)
    assert_close((together.gradients or {})["q"], (recorded.vjp(exact, upstream).gradients or {})["q"], 1e-5)


def test_narrow_cotangents_have_to_be_announced(recorder: Recorder) -> None:
    client = Client(recorder)
    at = client.solve(QP(**draw(1, batch=2)))
    with pytest.raises(ProblemError, match=r"upstream\.z: found .*float32"):
        client._backend.vjp(
            VjpRequest(state=at.state), {"upstream.z": torch.ones(2, 4)}, argrad.backend.Call(timeout_s=5.0)
        )


def test_other_precisions_are_refused() -> None:
    with pytest.raises(ProblemError, match=r"precision.*float16.*'float64' or 'float32'"):
        Options(precision="float16")  # type: ignore[arg-type]

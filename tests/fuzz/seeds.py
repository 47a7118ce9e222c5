"""Valid messages of every kind, from which mutations begin."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from argrad.problems.content import digest
from argrad.wire import JSON, SAFETENSORS, encode
from argrad.wire.messages import (
    DifferentiationDocument,
    JvpReply,
    JvpRequest,
    Message,
    ProblemDocument,
    RegisteredReply,
    RegisterRequest,
    ReportDocument,
    SolverDocument,
    SolveReply,
    SolveRequest,
    TensorDocument,
    VjpReply,
    VjpRequest,
    WarmStartDocument,
)

FORMATS = (JSON, SAFETENSORS)
TOKEN = "dGhlIHN0YXRlIG9mIGEgc2VlZCwgbm8gb25lJ3M"


@dataclass(frozen=True)
class Seed:
    """A message that is right, as bytes.

    Args:
        model: What it is.
        content_type: In which format.
        body: Its bytes.
    """

    model: type[Message]
    content_type: str
    body: bytes


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Seeded normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(batch: int | None = None, n: int = 3, m: int = 4) -> dict[str, Tensor]:
    """A strictly convex problem whose origin is feasible."""
    root, lead = normal(n, n), () if batch is None else (batch,)
    return {
        "Q": root @ root.mT + torch.eye(n, dtype=torch.float64),
        "q": normal(*lead, n, seed=1),
        "G": normal(m, n, seed=2),
        "h": normal(*lead, m, seed=3).abs(),
        "A": normal(1, n, seed=4),
        "b": torch.zeros(1, dtype=torch.float64),
    }


def point(batch: int | None = None, n: int = 3, m: int = 4) -> dict[str, Tensor]:
    """Blocks of a solution, of nothing in particular."""
    lead = () if batch is None else (batch,)
    return {"z": normal(*lead, n), "nu": normal(*lead, 1), "lam": normal(*lead, m).abs(), "s": normal(*lead, m).abs()}


def sparse() -> dict[str, Tensor]:
    """A separable problem in CSR triplets."""

    def identity(name: str, sign: float) -> dict[str, Tensor]:
        return {
            f"{name}_indptr": torch.arange(4),
            f"{name}_indices": torch.arange(3),
            f"{name}_values": torch.full((3,), sign, dtype=torch.float64),
        }

    return {
        **identity("Q", 1.0),
        **identity("G", -1.0),
        "q": normal(3),
        "h": torch.zeros(3, dtype=torch.float64),
    }


def under(**sections: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of a message."""
    return {f"{section}.{name}": tensor for section, given in sections.items() for name, tensor in given.items()}


def requests() -> list[tuple[Message, dict[str, Tensor]]]:
    """Every way to use every call, once or more."""
    one, two = problem(), problem(2)
    bounds = {"q": normal(3), "lb": torch.full((3,), float("-inf")).double(), "ub": torch.ones(3).double()}
    two_sided = {"P": torch.eye(3).double(), "q": normal(3), "A": normal(2, 3), "l": -torch.ones(2).double()}
    two_sided["u"] = torch.tensor([1.0, float("inf")], dtype=torch.float64)
    softmax = {"q": normal(3), "A": torch.ones(1, 3).double(), "b": torch.ones(1).double()}
    softmax |= {"lb": torch.zeros(3).double(), "entropy": torch.tensor(0.5).double()}
    registered = ProblemDocument(registered=digest("qp", {name: one[name] for name in ("Q", "G", "h")}))
    upstream = {"z": normal(3)}
    kkt = DifferentiationDocument(method="bpqp")
    return [
        (SolveRequest(), under(problem=one)),
        (SolveRequest(wrt=["q", "Q"]), under(problem=two, upstream={"z": normal(2, 3), "lam": normal(2, 4)})),
        (SolveRequest(gradients="adjoint", keep_state=True), under(problem=one, upstream={"z": normal(5, 3)})),
        (SolveRequest(solver=SolverDocument(name="pdipm", tolerance=1e-6)), under(problem=bounds)),
        (SolveRequest(problem=ProblemDocument(kind="qp_two_sided"), deterministic=True), under(problem=two_sided)),
        (SolveRequest(problem=ProblemDocument(kind="sparse_qp")), under(problem=sparse())),
        (SolveRequest(precision="float32", failed_gradients="zero"), under(problem=softmax)),
        (SolveRequest(problem=registered), under(problem={"q": normal(3)})),
        (SolveRequest(warm_start=WarmStartDocument(state=TOKEN)), under(problem=one)),
        (
            SolveRequest(solver=SolverDocument(name="admm", options={"rho": 0.5})),
            under(problem=one, warm_start=point()),
        ),
        (VjpRequest(state=TOKEN), under(upstream=upstream)),
        (VjpRequest(gradients="adjoint", differentiation=kkt), under(problem=one, solution=point(), upstream=upstream)),
        (JvpRequest(state=TOKEN), under(tangents={"q": normal(3)})),
        (JvpRequest(), under(problem=two, solution=point(2), tangents={"q": normal(2, 3), "Q": normal(3, 3)})),
        (RegisterRequest(), under(problem={name: one[name] for name in ("Q", "G", "h")})),
        (RegisterRequest(problem=ProblemDocument(kind="qp_two_sided")), under(problem={"P": torch.eye(2).double()})),
    ]


def replies() -> list[tuple[Message, dict[str, Tensor]]]:
    """What the client reads."""
    numbers = dict.fromkeys(("primal_residual", "dual_residual", "gap", "objective"), torch.tensor(0.5).double())
    each = {name: value.expand(2) for name, value in numbers.items()} | {"iterations": torch.tensor([3, 4])}
    one = ReportDocument(solver="pivoting", method="kkt", flags=["degenerate"])
    two = ReportDocument(solver="pdipm", flags=[[], ["nonunique"]])
    entry = TensorDocument(dtype="F64", shape=[3, 3])
    gone = torch.tensor([float("nan"), 1.0, float("inf")], dtype=torch.float64)
    return [
        (
            SolveReply(status="optimal", report=one, state=TOKEN, gradient_status="ok", timings_ms={"solve": 1.5}),
            under(solution=point(), report=numbers, gradients={"q": gone}),
        ),
        (SolveReply(status=["optimal", "infeasible"], report=two), under(solution=point(2), report=each)),
        (VjpReply(report=one, gradient_status="ok"), under(adjoint={"z": normal(3)})),
        (JvpReply(report=two, gradient_status=["ok", "no_solution"]), under(tangents=point(2))),
        (RegisteredReply(kind="qp", registered="0" * 64, nbytes=72, tensors={"Q": entry}), {}),
    ]


@functools.cache
def seeds(*, of_replies: bool = False) -> tuple[Seed, ...]:
    """All of them in both formats."""
    return tuple(
        Seed(type(message), content_type, b"".join(encode(message, tensors, content_type)))
        for message, tensors in (replies() if of_replies else requests())
        for content_type in FORMATS
    )

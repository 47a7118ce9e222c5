"""The documents that travel between client and service (protocol 1), without their tensors.

A message is a pair: one of these documents, and a dict of tensors with dotted names
(`problem.Q`, `upstream.z`, `report.gap`). The codecs beside this file write the pair either as one
JSON document, with the tensors as nested lists in their places, or as a safetensors file whose
`__metadata__` holds the document. `tensor_sections` says, for each model, which objects of the
document hold tensors and which names in them do not.

Shapes, with B problems in the batch and k cotangents: every tensor of a reply has the batch
dimension exactly if some parameter of the problem has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

PROTOCOL: Final = 1
TensorMap = dict[str, Tensor]

Gradients = Literal["full", "adjoint"]
FailedGradients = Literal["nan", "zero"]
Precision = Literal["float64", "float32"]
"""In what the floats of a reply travel; with `float32`, cotangents and tangents may be sent so too."""

Section = Mapping[str, frozenset[str]]
_TENSORS_ONLY: frozenset[str] = frozenset()
_PROBLEM_FIELDS = frozenset({"kind", "registered"})

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 in hexadecimal, lower case: `argrad.problems.content` defines what of."""

OwnOptions = Annotated[dict[str, bool | int | float | str | None], Field(max_length=32)]
"""Options of one solver or one method, by name; the engine checks them."""


class Message(BaseModel):
    """What every document has: no unknown field, no silent conversion, a protocol number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    tensor_sections: ClassVar[Section] = {}
    recurs: ClassVar[bool] = False
    """Whether callers send the same document again and again, with other tensors."""


M = TypeVar("M", bound=Message)


class ProblemDocument(Message):
    """`problem`: its kind; the parameters travel as tensors beside it.

    `qp` takes Q q G h A b, the bounds lb ub and an entropy; `qp_two_sided` takes P q A l u. Without Q, or P, it is an
    LP. `sparse_qp` takes q h b, and each of Q G A as `_indptr`, `_indices` and `_values`, its CSR triplet.

    Args:
        kind: Form of the problem.
        registered: Digest of parameters that were registered; they join those that are sent.
    """

    kind: Literal["qp", "qp_two_sided", "sparse_qp"] = "qp"
    registered: Digest | None = None


class SolverDocument(Message):
    """`solver`: who solves, and how exactly.

    Args:
        name: A solver of `GET /v1/solvers`, or `auto`.
        tolerance: Bound on the scaled KKT residuals at which a problem counts as optimal.
        max_iterations: Bound on the iterations of one problem.
        options: The solver's own options, as `GET /v1/solvers` lists them; `auto` has none.
    """

    name: str = "auto"
    tolerance: Annotated[float, Field(ge=1e-12, le=1e-1)] = 1e-8
    max_iterations: Annotated[int, Field(ge=1, le=10_000)] = 100
    options: OwnOptions = Field(default_factory=dict)


class DifferentiationDocument(Message):
    """`differentiation`: the method that forms the adjoint.

    Args:
        method: A method of `GET /v1/solvers`, or `auto`.
        options: The method's own options, as `GET /v1/solvers` lists them; `auto` has none.
    """

    method: str = "auto"
    options: OwnOptions = Field(default_factory=dict)


class GradientOptions(Message):
    """What /v1/solve (with `upstream`) and /v1/vjp may say of the gradients.

    Args:
        wrt: Parameters whose gradients are wanted; by default every one that the problem has.
        gradients: `full` forms them on the server; `adjoint` returns `adjoint: {z, nu, mu}`, from
            which whoever holds the solution forms them by outer products.
        failed_gradients: What stands where a problem has no gradient. `nan` marks it, in the sum
            over a shared parameter too; `zero` leaves the problem out of the sum.
    """

    differentiation: DifferentiationDocument = Field(default_factory=DifferentiationDocument)
    wrt: Annotated[list[str], Field(fail_fast=True)] | None = None
    gradients: Gradients = "full"
    failed_gradients: FailedGradients = "nan"


class WarmStartDocument(Message):
    """`warm_start`: where the solver begins.

    Args:
        state: Token of an earlier solve of problems of these sizes; its solution needs not travel then.
        registered: At the last solution that was asked for in this way with the same registered parameters and sizes;
            at the solver's own choice if there is none.
    """

    state: str | None = None
    registered: bool = False


class SolveRequest(GradientOptions):
    """POST /v1/solve. Tensors: `problem.*`; optional `upstream.*` and `warm_start.*`.

    Args:
        keep_state: Whether a token comes back; by default without `upstream`.
        deterministic: Solve unpadded and alone: the same bits for the same call, whatever else is being solved.
        warm_start: State of an earlier solve to begin at, or the last one of the registered parameters; or tensors.
        precision: Of the floats of the reply; the problem is solved in float64 in either case.
    """

    tensor_sections: ClassVar[Section] = {
        "problem": _PROBLEM_FIELDS,
        "upstream": _TENSORS_ONLY,
        "warm_start": frozenset({"state", "registered"}),
    }
    recurs: ClassVar[bool] = True
    protocol: Literal[1] = PROTOCOL
    problem: ProblemDocument = ProblemDocument()
    solver: SolverDocument = Field(default_factory=SolverDocument)
    keep_state: bool | None = None
    deterministic: bool = False
    warm_start: WarmStartDocument | None = None
    precision: Precision = "float64"


class VjpRequest(GradientOptions):
    """POST /v1/vjp. Tensors: `upstream.*`; without `state`, `problem.*` and `solution.*` too."""

    tensor_sections: ClassVar[Section] = {
        "problem": _PROBLEM_FIELDS,
        "solution": _TENSORS_ONLY,
        "upstream": _TENSORS_ONLY,
    }
    protocol: Literal[1] = PROTOCOL
    state: str | None = None
    problem: ProblemDocument | None = None
    solver: SolverDocument = Field(default_factory=SolverDocument)
    precision: Precision = "float64"


class JvpRequest(Message):
    """POST /v1/jvp. Tensors: `tangents.*`; without `state`, `problem.*` and `solution.*` too."""

    tensor_sections: ClassVar[Section] = {
        "problem": _PROBLEM_FIELDS,
        "solution": _TENSORS_ONLY,
        "tangents": _TENSORS_ONLY,
    }
    protocol: Literal[1] = PROTOCOL
    state: str | None = None
    problem: ProblemDocument | None = None
    solver: SolverDocument = Field(default_factory=SolverDocument)
    differentiation: DifferentiationDocument = Field(default_factory=DifferentiationDocument)
    failed_gradients: FailedGradients = "nan"
    precision: Precision = "float64"


class RegisterRequest(Message):
    """PUT /v1/problems/{sha256}. Tensors: `problem.*`, some or all parameters of a problem.

    Args:
        problem: Kind of the problem; `registered` may repeat the digest.
    """

    tensor_sections: ClassVar[Section] = {"problem": _PROBLEM_FIELDS}
    protocol: Literal[1] = PROTOCOL
    problem: ProblemDocument = ProblemDocument()


class TensorDocument(Message):
    """What a registered tensor is like: dtype as the binary form spells it, and shape."""

    dtype: str
    shape: list[int]


class RegisteredReply(Message):
    """Reply of PUT and GET /v1/problems/{sha256}: what is registered, without its numbers.

    Args:
        kind: Form of the problem.
        registered: The digest.
        nbytes: Bytes of the tensors.
        tensors: By name, without `problem.`
    """

    protocol: Literal[1] = PROTOCOL
    kind: Literal["qp", "qp_two_sided", "sparse_qp"]
    registered: Digest
    nbytes: int
    tensors: dict[str, TensorDocument]


REPORT_NAMES = frozenset({"solver", "method", "method_options", "flags"})


class ReportDocument(Message):
    """`report`: how the answer came about.

    Tensors beside it, one number a problem: `iterations`, `primal_residual`, `dual_residual`, `gap`, `objective`, and
    what the solver or the method measured beyond those.

    Args:
        solver: Solver that ran.
        method: Differentiation method that ran; absent if none did.
        method_options: With which options it ran, defaults included; absent if it has none.
        flags: Of each problem: `degenerate`, `dependent`, `nonunique`, `regularised`, …
    """

    solver: str
    method: str | None = None
    method_options: OwnOptions | None = None
    flags: list[list[str]] | list[str] = Field(default_factory=list, union_mode="left_to_right")


class GradientReply(Message):
    """What a reply with gradients says of them; tensors `gradients.*` or `adjoint.*`.

    Args:
        gradient_status: Of each problem `ok`, or why it has no gradient.
    """

    gradient_status: str | list[str] | None = None


class SolveReply(GradientReply):
    """Reply of /v1/solve. Tensors: `solution.*`, `report.*`, and `gradients.*` or `adjoint.*`."""

    tensor_sections: ClassVar[Section] = {
        "solution": _TENSORS_ONLY,
        "report": REPORT_NAMES,
        "gradients": _TENSORS_ONLY,
        "adjoint": _TENSORS_ONLY,
    }
    protocol: Literal[1] = PROTOCOL
    status: str | list[str]
    report: ReportDocument
    state: str | None = None
    timings_ms: dict[str, float] = Field(default_factory=dict)


class VjpReply(GradientReply):
    """Reply of /v1/vjp. Tensors: `gradients.*` or `adjoint.*`, and `report.*`.

    By state token the report has only what the method measured: the rest was in the solve's.
    """

    tensor_sections: ClassVar[Section] = {
        "report": REPORT_NAMES,
        "gradients": _TENSORS_ONLY,
        "adjoint": _TENSORS_ONLY,
    }
    protocol: Literal[1] = PROTOCOL
    report: ReportDocument
    timings_ms: dict[str, float] = Field(default_factory=dict)


class JvpReply(GradientReply):
    """Reply of /v1/jvp. Tensors: `tangents.*`, tangents of the solution."""

    tensor_sections: ClassVar[Section] = {"report": REPORT_NAMES, "tangents": _TENSORS_ONLY}
    protocol: Literal[1] = PROTOCOL
    report: ReportDocument
    timings_ms: dict[str, float] = Field(default_factory=dict)

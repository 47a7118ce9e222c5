"""Worked examples of every call. They are true: a test replays each one and compares the replies.

Numbers are what the problems give by hand; only `state`, `iterations`, residuals and timings differ from run to run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

REGISTERED = "a1595c3d5bbce78ce2e50a896d75c9f9ff91db8f5912ecfd7ca6dde578b3c2b6"
"""Digest of Q, G and h of the batch below."""

STATE = "dGhlIHN0YXRlIG9mIGFuIGV4YW1wbGUsIG5vIG9u"
"""Stands for a token; the test puts a live one in its place."""


@dataclass(frozen=True)
class Example:
    """One call.

    Args:
        summary: What it shows.
        request: JSON body.
        reply: JSON body that it gets.
    """

    summary: str
    request: dict[str, Any]
    reply: dict[str, Any]


# min ½zᵀQz + qᵀz, z₁ + z₂ = 1, z ≥ 0. Inside, z₁ = ¼(1 + q₂ − q₁)·… : ∂z₁/∂q = (−¼, ¼), ∂z₁/∂b = ¼.
_SIMPLEX = {
    "kind": "qp",
    "Q": [[4.0, 1.0], [1.0, 2.0]],
    "q": [1.0, 1.0],
    "A": [[1.0, 1.0]],
    "b": [1.0],
    "G": [[-1.0, 0.0], [0.0, -1.0]],
    "h": [0.0, 0.0],
}
_SIMPLEX_POINT = {"z": [0.25, 0.75], "nu": [-2.75], "lam": [0.0, 0.0], "s": [0.25, 0.75]}
# min −2z₁ − z₂ over z₁ + z₂ = 3, z₁ ≤ 1, z₂ ≤ 3, z₁ ≥ −1. The vertex has z₁ = h₁ and z₂ = b − h₁.
_VERTEX = {
    "q": [-2.0, -1.0],
    "A": [[1.0, 1.0]],
    "b": [3.0],
    "G": [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]],
    "h": [1.0, 3.0, 1.0],
}
# Projection on z ≥ 0: z = max(−q, 0), λ = max(q, 0).
_PROJECTION = {
    "Q": [[1.0, 0.0], [0.0, 1.0]],
    "q": [[-1.0, 2.0], [-3.0, -0.5]],
    "G": [[-1.0, 0.0], [0.0, -1.0]],
    "h": [0.0, 0.0],
}


def _report(**more: Any) -> dict[str, Any]:
    return {"solver": "pivoting", "flags": [], "iterations": 6, "primal_residual": 0.0, "dual_residual": 0.0, **more}


def _batch_report(objective: list[float]) -> dict[str, Any]:
    zeros = [0.0] * len(objective)
    return {
        "solver": "pivoting",
        "flags": [[] for _ in objective],
        "iterations": [6] * len(objective),
        "primal_residual": zeros,
        "dual_residual": zeros,
        "gap": zeros,
        "objective": objective,
    }


SOLVE = {
    "with gradients": Example(
        "Solution and gradients in one round trip",
        {
            "problem": _SIMPLEX,
            "solver": {"name": "auto", "tolerance": 1e-8},
            "upstream": {"z": [1.0, 0.0]},
            "wrt": ["q", "b"],
            "gradients": "full",
        },
        {
            "protocol": 1,
            "status": "optimal",
            "solution": _SIMPLEX_POINT,
            "report": _report(method="kkt", gap=0.0, objective=1.875),
            "gradient_status": "ok",
            "gradients": {"q": [-0.25, 0.25], "b": [0.25]},
            "timings_ms": {"read": 0.1, "decode": 0.1, "queue": 0.1, "solve": 2.0, "differentiate": 0.5},
        },
    ),
    "batch": Example(
        "Two problems that share Q, G and h; their state is kept for a vjp",
        {"problem": _PROJECTION},
        {
            "protocol": 1,
            "status": ["optimal", "optimal"],
            "solution": {
                "z": [[1.0, 0.0], [3.0, 0.5]],
                "nu": [[], []],
                "lam": [[0.0, 2.0], [0.0, 0.0]],
                "s": [[1.0, 0.0], [3.0, 0.5]],
            },
            "report": _batch_report([-0.5, -4.625]),
            "state": STATE,
            "timings_ms": {"read": 0.1, "decode": 0.1, "queue": 0.1, "solve": 2.0},
        },
    ),
    "registered": Example(
        "One more problem with the same Q, G and h, registered before (PUT /v1/problems/{sha256})",
        {"problem": {"kind": "qp", "registered": REGISTERED, "q": [1.0, -1.0]}, "keep_state": False},
        {
            "protocol": 1,
            "status": "optimal",
            "solution": {"z": [0.0, 1.0], "nu": [], "lam": [1.0, 0.0], "s": [0.0, 1.0]},
            "report": {"solver": "pivoting", "flags": []},
            "timings_ms": {"read": 0.1, "decode": 0.1, "queue": 0.1, "solve": 2.0},
        },
    ),
    "linear program": Example(
        "A linear program: Q is absent. The vertex (1, 2) does not move with q; ∂b and ∂h are exact",
        {
            "problem": _VERTEX,
            "upstream": {"z": [1.0, 0.0]},
            "wrt": ["q", "b", "h"],
        },
        {
            "protocol": 1,
            "status": "optimal",
            "solution": {"z": [1.0, 2.0], "nu": [1.0], "lam": [1.0, 0.0, 0.0], "s": [0.0, 1.0, 2.0]},
            "report": {"solver": "pdipm", "method": "kkt", "flags": [], "gap": 0.0, "objective": -4.0},
            "gradient_status": "ok",
            "gradients": {"q": [0.0, 0.0], "b": [0.0], "h": [1.0, 0.0, 0.0]},
            "timings_ms": {"read": 0.1, "decode": 0.1, "queue": 0.1, "solve": 5.0, "differentiate": 0.5},
        },
    ),
    "entropy": Example(
        "An entropy τ Σ zᵢ log zᵢ, which implies z ≥ 0: softmax of −q, here of equal scores",
        {
            "problem": {"q": [0.0, 0.0], "A": [[1.0, 1.0]], "b": [1.0], "entropy": 1.0},
            "upstream": {"z": [1.0, 0.0]},
            "wrt": ["q", "entropy"],
        },
        {
            "protocol": 1,
            "status": "optimal",
            "solution": {"z": [0.5, 0.5], "nu": [-0.3068528194400547], "lam": [], "s": []},
            "report": {"solver": "pdipm", "method": "kkt", "flags": [], "gap": 0.0, "objective": -0.6931471805599453},
            "gradient_status": "ok",
            "gradients": {"q": [-0.25, 0.25], "entropy": 0.0},
            "timings_ms": {"read": 0.1, "decode": 0.1, "queue": 0.1, "solve": 5.0, "differentiate": 0.5},
        },
    ),
    "sparse": Example(
        "The first problem with sparse matrices: rows' ends, columns and values; gradients on the pattern",
        {
            "problem": {
                "kind": "sparse_qp",
                "Q_indptr": [0, 2, 4],
                "Q_indices": [0, 1, 0, 1],
                "Q_values": [4.0, 1.0, 1.0, 2.0],
                "q": [1.0, 1.0],
                "A_indptr": [0, 2],
                "A_indices": [0, 1],
                "A_values": [1.0, 1.0],
                "b": [1.0],
                "G_indptr": [0, 1, 2],
                "G_indices": [0, 1],
                "G_values": [-1.0, -1.0],
                "h": [0.0, 0.0],
            },
            "upstream": {"z": [1.0, 0.0]},
            "wrt": ["Q_values", "b"],
        },
        {
            "protocol": 1,
            "status": "optimal",
            "solution": _SIMPLEX_POINT,
            "report": {"solver": "clarabel", "method": "kkt", "flags": [], "gap": 0.0, "objective": 1.875},
            "gradient_status": "ok",
            "gradients": {"Q_values": [-0.0625, -0.0625, -0.0625, 0.1875], "b": [0.25]},
            "timings_ms": {"read": 0.1, "decode": 0.1, "queue": 0.1, "solve": 4.0, "differentiate": 0.9},
        },
    ),
    "infeasible": Example(
        "A verdict, not an error: z ≤ −1 and z ≥ 0",
        {
            "problem": {"Q": [[1.0]], "q": [0.0], "G": [[1.0], [-1.0]], "h": [-1.0, 0.0]},
            "keep_state": False,
        },
        {
            "protocol": 1,
            "status": "infeasible",
            "report": {"solver": "pivoting"},
            "timings_ms": {"read": 0.1, "decode": 0.1, "queue": 0.1, "solve": 2.0},
        },
    ),
}

REGISTER = Example(
    "Q, G and h of the batch above",
    {"problem": {"kind": "qp", **{name: _PROJECTION[name] for name in ("Q", "G", "h")}}},
    {
        "protocol": 1,
        "kind": "qp",
        "registered": REGISTERED,
        "nbytes": 80,
        "tensors": {
            "Q": {"dtype": "F64", "shape": [2, 2]},
            "G": {"dtype": "F64", "shape": [2, 2]},
            "h": {"dtype": "F64", "shape": [2]},
        },
    },
)

VJP = {
    "state": Example(
        "By the state of the batch above: two cotangents of z, gradients of q and of the shared h",
        {"state": STATE, "upstream": {"z": [[[1.0, 1.0], [1.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]]}, "wrt": ["q", "h"]},
        {
            "protocol": 1,
            "gradient_status": ["ok", "ok"],
            "gradients": {
                "q": [[[-1.0, 0.0], [-1.0, -1.0]], [[0.0, 0.0], [0.0, -1.0]]],
                "h": [[0.0, -1.0], [0.0, -1.0]],
            },
            "report": {"solver": "pivoting", "method": "kkt", "flags": [[], []]},
            "timings_ms": {"read": 0.1, "decode": 0.1, "queue": 0.1, "differentiate": 0.5},
        },
    ),
    "stateless": Example(
        "At a point that the caller sends, whoever solved the problem; the adjoint alone",
        {
            "problem": _SIMPLEX,
            "solution": _SIMPLEX_POINT,
            "upstream": {"z": [1.0, 0.0]},
            "gradients": "adjoint",
        },
        {
            "protocol": 1,
            "gradient_status": "ok",
            "adjoint": {"z": [-0.25, 0.25], "nu": [-0.25], "mu": [0.0, 0.0]},
            "report": {"method": "kkt", "flags": []},
            "timings_ms": {"read": 0.1, "decode": 0.1, "queue": 0.1, "differentiate": 0.5},
        },
    ),
}

JVP = {
    "stateless": Example(
        "How the solution moves with b",
        {"problem": _SIMPLEX, "solution": _SIMPLEX_POINT, "tangents": {"b": [1.0]}},
        {
            "protocol": 1,
            "gradient_status": "ok",
            "tangents": {"z": [0.25, 0.75], "nu": [-1.75], "lam": [0.0, 0.0], "s": [0.25, 0.75]},
            "report": {"method": "kkt", "flags": []},
            "timings_ms": {"read": 0.1, "decode": 0.1, "queue": 0.1, "differentiate": 0.5},
        },
    ),
}

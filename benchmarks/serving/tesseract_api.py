"""A QP as a Tesseract: what `tesseract-runtime serve` serves beside argrad's service.

The problem of two variables is solved in NumPy by trying its four active sets, which costs next to nothing. Batches
go to argrad's own engine: the solver is the same on both sides, and what differs is the way to it and back. As every
Tesseract it keeps nothing between `apply` and `vector_jacobian_product`, which therefore solves again.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from tesseract_core.runtime import Array, Differentiable, Float64

from argrad.problems import QP, gradients
from argrad_service import engine

_ENUMERATED = 2


class InputSchema(BaseModel):
    """½zᵀQz + qᵀz subject to Az = b, Gz ≤ h, each with a batch dimension; A and b may have no rows."""

    Q: Differentiable[Array[(None, None, None), Float64]]
    q: Differentiable[Array[(None, None), Float64]]
    G: Differentiable[Array[(None, None, None), Float64]]
    h: Differentiable[Array[(None, None), Float64]]
    A: Differentiable[Array[(None, None, None), Float64]]
    b: Differentiable[Array[(None, None), Float64]]


class OutputSchema(BaseModel):
    """The solutions."""

    z: Differentiable[Array[(None, None), Float64]]


def apply(inputs: InputSchema) -> OutputSchema:
    """Solve."""
    if inputs.q.shape[-1] <= _ENUMERATED:
        return OutputSchema(z=np.stack([_enumerate(inputs, k)[0] for k in range(len(inputs.q))]))
    return OutputSchema(z=engine.solve(_problem(inputs)).solution.z.numpy())


def vector_jacobian_product(
    inputs: InputSchema, vjp_inputs: set[str], vjp_outputs: set[str], cotangent_vector: dict[str, Any]
) -> dict[str, Any]:
    """Gradients of ⟨cotangent, z⟩."""
    del vjp_outputs
    g = np.asarray(cotangent_vector["z"])
    if inputs.q.shape[-1] <= _ENUMERATED:
        rows = [_gradients(inputs, k, g[k]) for k in range(len(g))]
        return {name: np.stack([row[name] for row in rows]) for name in vjp_inputs}
    outcome = engine.solve(_problem(inputs))
    adjoint = engine.vjp(outcome, {"z": torch.from_numpy(g)}).adjoint
    wanted = [name for name in vjp_inputs if getattr(inputs, name).size]
    found = gradients(outcome.solution, adjoint, wrt=wanted, batched=wanted)
    return {k: found[k].numpy() if k in found else np.zeros_like(getattr(inputs, k)) for k in vjp_inputs}


def _problem(inputs: InputSchema) -> QP:
    given = {name: np.ascontiguousarray(value) for name, value in vars(inputs).items() if value.size}
    return QP(**{name: torch.from_numpy(value) for name, value in given.items()})


def _enumerate(inputs: InputSchema, k: int) -> tuple[Any, Any, Any, Any]:
    """z, the multipliers of C = [A; G_active], C and the KKT matrix, for the active set that fits."""
    Q, q, G, h, A, b = (getattr(inputs, name)[k] for name in ("Q", "q", "G", "h", "A", "b"))
    n, p = len(q), len(b)
    for pattern in product((False, True), repeat=len(h)):
        active = np.array(pattern)
        C = np.concatenate([A, G[active]])
        matrix = np.block([[Q, C.T], [C, np.zeros((len(C), len(C)))]])
        if np.linalg.matrix_rank(matrix) < len(matrix):
            continue
        solved = np.linalg.solve(matrix, np.concatenate([-q, b, h[active]]))
        if (solved[n + p :] >= 0).all() and (G @ solved[:n] <= h + 1e-12).all():
            return solved[:n], solved[n:], active, matrix
    raise ValueError(f"problem {k} is infeasible")


def _gradients(inputs: InputSchema, k: int, g: Any) -> dict[str, Any]:
    n, p = inputs.q.shape[-1], inputs.b.shape[-1]
    z, y, active, matrix = _enumerate(inputs, k)
    adjoint = np.linalg.solve(matrix, np.concatenate([-g, np.zeros(len(y))]))
    d_z, mu, lam = adjoint[:n], np.zeros(len(active)), np.zeros(len(active))
    mu[active], lam[active] = adjoint[n + p :], y[p:]
    d_nu, nu = adjoint[n : n + p], y[:p]
    return {
        "Q": 0.5 * (np.outer(d_z, z) + np.outer(z, d_z)),
        "q": d_z,
        "G": np.outer(mu, z) + np.outer(lam, d_z),
        "h": -mu,
        "A": np.outer(d_nu, z) + np.outer(nu, d_z),
        "b": -d_nu,
    }

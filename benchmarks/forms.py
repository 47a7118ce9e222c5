"""Every workload as a QP in torch, differentiable in its own parameters: the form in which dense peers take it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.workloads import TV_CURVATURE, TV_WEIGHT, Kind


@dataclass(frozen=True, kw_only=True)
class Rows:
    """½zᵀQz + qᵀz subject to Az = b, Gz ≤ h; each part batched or shared by the batch, and Q never absent."""

    Q: Tensor
    q: Tensor
    G: Tensor
    h: Tensor
    A: Tensor | None = None
    b: Tensor | None = None


def as_qp(kind: Kind, given: Mapping[str, Tensor]) -> Rows:
    """The QP; for `tv` in (z, t), of which z comes first.

    Raises:
        ValueError: it is none.
    """
    if kind == "qp":
        return Rows(**given)
    if kind == "lp":
        n = given["q"].shape[-1]
        return Rows(Q=given["q"].new_zeros(*given["q"].shape[:-1], n, n), **given)
    if kind == "tv":
        return _total_variation(given["y"], given["D"])
    if kind == "sparsemax":
        return _sparsemax(given["y"], given["u"])
    raise ValueError(f"{kind} is not a QP")


def _total_variation(y: Tensor, D: Tensor) -> Rows:
    rows, points = D.shape
    eye = torch.eye(rows, dtype=D.dtype)
    diagonal = torch.cat([D.new_ones(points), D.new_full((rows,), TV_CURVATURE)])
    return Rows(
        Q=torch.diag(diagonal),
        q=torch.cat([-y, y.new_full((len(y), rows), TV_WEIGHT)], -1),
        G=torch.cat([torch.cat([D, -eye], 1), torch.cat([-D, -eye], 1)], 0),
        h=D.new_zeros(2 * rows),
    )


def _sparsemax(y: Tensor, u: Tensor) -> Rows:
    n = y.shape[-1]
    eye = torch.eye(n, dtype=y.dtype)
    return Rows(
        Q=(2.0 * eye).unsqueeze(0),
        q=-2.0 * y,
        G=torch.cat([eye, -eye]).unsqueeze(0),
        h=torch.cat([u, torch.zeros_like(u)], -1),
        A=y.new_ones(1, 1, n),
        b=y.new_ones(1, 1),
    )

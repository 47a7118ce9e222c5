"""How an answer is judged, and who is best."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants.base import Answer
from benchmarks.reference import Truth
from benchmarks.workloads import Workload

Z_TOLERANCE = 1e-6
"""Relative error in z beyond which an element counts as missed,"""

GRADIENT_TOLERANCE = 1e-5
"""and in the gradient;"""

PEER_GRADIENT_TOLERANCE = 1e-4
"""what is asked of a peer's gradient before it can be the best,"""

PEER_SHARE = 0.99
"""and on what share of the elements."""

FEWEST_TURNS = 3
"""Turns that are taken even if time is up."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How good an answer is; errors are relative, and NaN is as wrong as can be.

    An element is a problem of the batch; for the gradient of a shared parameter, which sums over the batch, there is
    one element only.

    Args:
        elements: Problems of the batch.
        z_worst: Largest ‖z − z*‖ / ‖z*‖.
        z_median: Its median.
        z_missed: Elements beyond 1e-6.
        gradient_elements: Elements of the gradient.
        gradient_worst: Largest ‖Δ_k‖ / √(Σ_j ‖ref_j‖²) over elements and parameters k, the sum over all parameters.
        gradient_median: Median over the elements of the largest over parameters.
        gradient_missed: Elements beyond 1e-5.
        gradient_rough: Elements beyond 1e-4.
        cosine: Mean over the elements of the cosine between the gradient, all parameters in one vector, and the exact
            one.
    """

    elements: int
    z_worst: float
    z_median: float
    z_missed: int
    gradient_elements: int
    gradient_worst: float
    gradient_median: float
    gradient_missed: int
    gradient_rough: int
    cosine: float


def judge(workload: Workload, answer: Answer, truth: Truth) -> Accuracy:
    """Compare an answer with the exact one.

    Raises:
        ValueError: the answer has not the shape of the exact one.
    """
    for name, exact in {"z": truth.z, **truth.gradients}.items():
        shape = (answer.z if name == "z" else answer.gradients[name]).shape
        if shape != exact.shape:
            raise ValueError(f"{name} has shape {tuple(shape)}, not {tuple(exact.shape)}")
    z_error = _known((answer.z - truth.z).norm(dim=-1) / truth.z.norm(dim=-1))
    found = {name: _flat(workload, name, answer.gradients[name]) for name in truth.gradients}
    exact_rows = {name: _flat(workload, name, gradient) for name, gradient in truth.gradients.items()}
    scale = torch.stack([row.square().sum(1) for row in exact_rows.values()]).sum(0).sqrt()
    errors = _known(torch.stack([(found[k] - exact_rows[k]).norm(dim=1) / scale for k in found]).amax(0))
    whole, exact_whole = torch.cat(list(found.values()), 1), torch.cat(list(exact_rows.values()), 1)
    cosine = (whole * exact_whole).sum(1) / (whole.norm(dim=1) * scale)
    return Accuracy(
        elements=len(z_error),
        z_worst=float(z_error.max()),
        z_median=float(z_error.median()),
        z_missed=int((z_error > Z_TOLERANCE).sum()),
        gradient_elements=len(errors),
        gradient_worst=float(errors.max()),
        gradient_median=float(errors.median()),
        gradient_missed=int((errors > GRADIENT_TOLERANCE).sum()),
        gradient_rough=int((errors > PEER_GRADIENT_TOLERANCE).sum()),
        cosine=float(cosine.nan_to_num(0.0).mean()),
    )


def _flat(workload: Workload, name: str, gradient: Tensor) -> Tensor:
    """`(elements, ·)`; of Q the symmetric part, for some fill one triangle and only this part means anything."""
    if name == "Q":
        gradient = 0.5 * (gradient + gradient.mT)
    is_shared = workload.kind == "tv" and name == "D"
    return gradient.reshape(1, -1) if is_shared else gradient.flatten(1)


def _known(error: Tensor) -> Tensor:
    return error.nan_to_num(nan=torch.inf)


def find_best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The fastest peer that is right on 99 % of the elements."""
    able = [row for row in rows if not row["is_ours"] and row["status"] == "ok" and is_right_enough(row)]
    return min(able, key=total_ms, default=None)


def is_right_enough(row: Mapping[str, Any]) -> bool:
    """Whether a peer's answers are good enough for its time to count."""
    z_share = 1 - row["z_missed"] / row["elements"]
    return bool(z_share >= PEER_SHARE and 1 - row["gradient_rough"] / row["gradient_elements"] >= PEER_SHARE)


def is_right(row: Mapping[str, Any]) -> bool:
    """Whether no element is missed: what is asked of us."""
    return bool(row["z_missed"] == 0 and row["gradient_missed"] == 0)


def total_ms(row: Mapping[str, Any]) -> float:
    """Forward and backward."""
    return float(row["forward_ms"] + row["backward_ms"])


def elapsed_ms(action: Callable[[], object]) -> float:
    """Milliseconds of wall clock that the call takes."""
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3

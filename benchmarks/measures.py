"""How an answer is judged, and how times are taken."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from argrad.problems import QP
from benchmarks.contestants import Answer, Contestant
from benchmarks.reference import Exact

FEWEST_TURNS = 3
"""Turns that are taken even if time is up."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How good an answer is, over the problems of a batch; every number is relative.

    Args:
        kkt_residual: Largest scaled KKT residual (see `kkt_residual`).
        z_worst: Largest ‖z − z*‖ / ‖z*‖.
        z_median: Its median.
        gradient_worst: Largest ‖Δ_k‖ / √(Σ_j ‖ref_j‖²) over problems and parameters k, the sum over all parameters.
        gradient_median: Median over the problems of the largest over parameters.
    """

    kkt_residual: float
    z_worst: float
    z_median: float
    gradient_worst: float
    gradient_median: float


@dataclass(frozen=True, kw_only=True)
class Times:
    """Medians in milliseconds over `repeats`; the first run is not counted."""

    forward_ms: float
    backward_ms: float
    repeats: int


def kkt_residual(problem: QP, z: Float[Tensor, "batch n"], lam: Float[Tensor, "batch m"]) -> Float[Tensor, " batch"]:
    """Largest of stationarity, infeasibility and complementarity, each scaled by the terms that it is made of.

    ‖Qz + q + Gᵀλ‖∞ / (1 + max(‖Qz‖∞, ‖q‖∞, ‖Gᵀλ‖∞)),  ‖min(λ, h − Gz)‖∞ / (1 + max(‖h‖∞, ‖Gz‖∞, ‖λ‖∞)).
    The second is zero exactly if λ ≥ 0, Gz ≤ h and λ∘(h − Gz) = 0.
    """
    assert problem.Q is not None
    assert problem.G is not None
    assert problem.h is not None
    terms = [(problem.Q @ z.unsqueeze(-1)).squeeze(-1), problem.q, (problem.G.mT @ lam.unsqueeze(-1)).squeeze(-1)]
    product = (problem.G @ z.unsqueeze(-1)).squeeze(-1)
    stationarity = _largest(sum(terms, torch.zeros_like(z))) / (1 + torch.stack([_largest(t) for t in terms]).amax(0))
    scale = 1 + torch.stack([_largest(t) for t in (problem.h, product, lam)]).amax(0)
    return torch.maximum(stationarity, _largest(torch.minimum(lam, problem.h - product)) / scale)


def judge(problem: QP, answer: Answer, exact: Exact) -> Accuracy:
    """Compare an answer with the exact one; NaN anywhere shows as NaN."""
    z_error = (answer.z - exact.z).norm(dim=-1) / exact.z.norm(dim=-1)
    scale = torch.stack([g.flatten(1).square().sum(1) for g in exact.gradients.values()]).sum(0).sqrt()
    found = dict(answer.gradients)
    found["Q"] = 0.5 * (found["Q"] + found["Q"].mT)  # some fill one triangle differently; only this part means anything
    errors = torch.stack([(found[k] - exact.gradients[k]).flatten(1).norm(dim=1) / scale for k in exact.gradients])
    gradient_error = errors.amax(0)
    return Accuracy(
        kkt_residual=float(kkt_residual(problem, answer.z, answer.lam).max()),
        z_worst=float(z_error.max()),
        z_median=float(z_error.median()),
        gradient_worst=float(gradient_error.max()),
        gradient_median=float(gradient_error.median()),
    )


def time_together(contestants: Sequence[Contestant], *, budget_s: float, most: int) -> dict[str, Times]:
    """Time forward and backward of prepared contestants, taking turns, so that a busy moment hits all alike.

    Args:
        contestants: Each already prepared.
        budget_s: Seconds for all together; at least three turns are taken.
        most: Largest number of turns.
    """
    forward: dict[str, list[float]] = {c.name: [] for c in contestants}
    backward: dict[str, list[float]] = {c.name: [] for c in contestants}
    for contestant in contestants:
        contestant.forward()
        contestant.backward()
    gc.collect()
    end = time.perf_counter() + budget_s
    turns = 0
    while turns < most and (turns < FEWEST_TURNS or time.perf_counter() < end):
        for contestant in contestants:
            forward[contestant.name].append(elapsed_ms(contestant.forward))
            backward[contestant.name].append(elapsed_ms(contestant.backward))
        turns += 1
    return {
        name: Times(forward_ms=median(forward[name]), backward_ms=median(backward[name]), repeats=turns)
        for name in forward
    }


def elapsed_ms(action: Callable[[], object]) -> float:
    """Milliseconds of wall clock that the call takes."""
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3


def record(times: Times, accuracy: Accuracy) -> dict[str, Any]:
    """Both as one object for the results file."""
    return {**asdict(times), **asdict(accuracy)}


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(-1)

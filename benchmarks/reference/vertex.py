"""Linear programs whose vertex the recipe chose."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.reference.truth import CHECKED_TO, Refined, Truth
from benchmarks.workloads import Workload


def exact(workload: Workload) -> Truth:
    """At a vertex the active rows C are square: Cz = d, Cᵀy = −q, and Cᵀδ = −g gives ∂d = −δ, ∂C = δzᵀ, ∂q = 0.

    Raises:
        ArithmeticError: the point that the recipe chose is not the unique solution.
    """
    names = ("q", "G", "h", "A", "b")
    q, G, h, A, b = (workload.parameters[name].numpy() for name in names)
    chosen, grad_z, p = workload.known["lam"].numpy() > 0, workload.grad_z.numpy(), b.shape[-1]
    z, delta, margin = np.zeros_like(q), np.zeros((len(q), p + h.shape[-1])), np.zeros(len(q))
    for k, active in enumerate(chosen):
        rows = np.concatenate([np.ones(p, dtype=bool), active])
        C, d = np.concatenate([A[k], G[k]])[rows], np.concatenate([b[k], h[k]])[rows]
        transposed = Refined(C.T)
        z[k], y = Refined(C).solve(d), transposed.solve(-q[k])
        delta[k][rows] = transposed.solve(-grad_z[k])
        slack = (h[k] - G[k] @ z[k])[~active]
        margin[k] = min(y[p:].min(), slack.min())
        missed = np.abs(z[k] - workload.known["z"][k].numpy()).max() / (1 + np.abs(z[k]).max())
        if not (margin[k] > 0 and missed <= CHECKED_TO):
            raise ArithmeticError(f"problem {k} is not solved by the vertex that was chosen for it")
    outer = delta[:, :, None] * z[:, None, :]
    found = {"G": outer[:, p:], "h": -delta[:, p:], "A": outer[:, :p], "b": -delta[:, :p]}
    return Truth(
        z=torch.from_numpy(z),
        gradients={name: torch.from_numpy(np.ascontiguousarray(found[name])) for name in workload.wrt},
        margin=torch.from_numpy(margin),
        active=torch.from_numpy(chosen.sum(-1).astype(np.float64)),
    )

"""Problems of every kind in every situation, drawn around a solution that is chosen first.

Numbers are multiples of a power of two, so that their products are exact in float32 too: a row that is weakly active or
given twice is so whatever the precision of the request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from argrad.problems import Flag, Status
from tests.grid.drafts import BATCH, Array, Draft, Drawn

ODD = 1
"""Which problem of the batch has no solution, in the situations that have such a one."""


def strong_rows(draft: Draft) -> int:
    """How many rows a regular problem has active: at a vertex as many as there are free variables."""
    free = draft.n - draft.p
    return {"qp": min(2, free), "lp": free, "entropy": min(2, free - 1)}[draft.kind]


def regular(kind: str, rng: np.random.Generator, is_shared: bool, dtype: torch.dtype) -> Drawn:
    draft = Draft(kind, rng, is_shared, n=5, p=1, m=6)
    draft.activate(strong_rows(draft))
    return draft.finish(dtype)


def weakly_active(kind: str, rng: np.random.Generator, is_shared: bool, dtype: torch.dtype) -> Drawn:
    """At the vertex of an LP one more row cannot be independent: there its multiplier is not unique."""
    draft = Draft(kind, rng, is_shared, n=5, p=1, m=6)
    draft.activate(strong_rows(draft))
    if kind == "entropy":
        draft.z = np.ones_like(draft.z)
    draft.append(draft.matrix(1, 5)[:, 0], s=0.0)
    if kind == "lp":
        flags = frozenset({Flag.DEGENERATE, Flag.DEPENDENT})
        return draft.finish(dtype, flags=flags, has_unique_multipliers=False)
    return draft.finish(dtype, flags=frozenset({Flag.DEGENERATE}))


def redundant_rows(kind: str, rng: np.random.Generator, is_shared: bool, dtype: torch.dtype) -> Drawn:
    """An active row is given again, twice as long."""
    draft = Draft(kind, rng, is_shared, n=5, p=1, m=6)
    draft.activate(strong_rows(draft))
    draft.append(2 * draft.G[:, 0], s=0.0)
    return draft.finish(dtype, flags=frozenset({Flag.DEGENERATE, Flag.DEPENDENT}), has_unique_multipliers=False)


def nearly_singular(kind: str, rng: np.random.Generator, is_shared: bool, dtype: torch.dtype) -> Drawn:
    """Q has two eigenvalues near 1e-5; elsewhere two active rows are nearly the same."""
    draft = Draft(kind, rng, is_shared, n=5, p=0 if kind == "qp" else 1, m=6)
    if kind == "qp":
        root = draft.matrix(3, 5)
        draft.Q = np.swapaxes(root, 1, 2) @ root + 2.0**-16 * np.eye(5)
        draft.activate(1)
    else:
        draft.G[:, 1] = draft.G[:, 0] + draft.G[:, 1] / 256
        draft.activate(strong_rows(draft))
    return draft.finish(dtype, condition=1e4)


def more_rows(kind: str, rng: np.random.Generator, is_shared: bool, dtype: torch.dtype) -> Drawn:
    draft = Draft(kind, rng, is_shared, n=4, p=0, m=14)
    draft.activate({"qp": 3, "lp": 4, "entropy": 3}[kind])
    return draft.finish(dtype)


def vertex(kind: str, rng: np.random.Generator, is_shared: bool, dtype: torch.dtype) -> Drawn:
    """As many active rows as variables."""
    draft = Draft(kind, rng, is_shared, n=4, p=0, m=7)
    draft.activate(4)
    return draft.finish(dtype)


def non_unique(kind: str, rng: np.random.Generator, is_shared: bool, dtype: torch.dtype) -> Drawn:
    """The solutions are a bounded edge, or a face of more dimensions where Q is singular on it."""
    draft = Draft(kind, rng, is_shared, n=4, p=1, m=2)
    if kind == "qp":
        root = draft.matrix(1, 4)
        draft.Q = np.swapaxes(root, 1, 2) @ root
        draft.activate(1)
    else:
        draft.activate(2)
    for sign in (1.0, -1.0):
        for row in sign * np.eye(4):
            draft.append(np.repeat(row[None], BATCH, axis=0), s=1.0)
    return draft.finish(dtype, flags=frozenset({Flag.NONUNIQUE}), is_unique=False)


def no_constraints(kind: str, rng: np.random.Generator, is_shared: bool, dtype: torch.dtype) -> Drawn:
    """An LP without constraints has costs of zero, and then every point is a solution, or is unbounded."""
    draft = Draft(kind, rng, is_shared, n=4, p=0, m=0)
    drawn = draft.finish(dtype)
    if kind != "lp":
        return drawn
    drawn.problem.q[ODD] = 1.0
    return replace(drawn, status=_odd(Status.UNBOUNDED), flags=frozenset({Flag.NONUNIQUE}), is_unique=False)


def equality_only(kind: str, rng: np.random.Generator, is_shared: bool, dtype: torch.dtype) -> Drawn:
    """An LP has as many equalities as variables."""
    return Draft(kind, rng, is_shared, n=4, p=4 if kind == "lp" else 2, m=0).finish(dtype)


def infeasible(kind: str, rng: np.random.Generator, is_shared: bool, dtype: torch.dtype) -> Drawn:
    draft = Draft(kind, rng, is_shared, n=5, p=1, m=6)
    draft.activate(strong_rows(draft))
    row = draft.matrix(1, 5)[:, 0]
    draft.append(row, s=1.0)
    draft.append(-row, s=1.0)
    drawn = draft.finish(dtype, status=_odd(Status.INFEASIBLE))
    drawn.problem.h[ODD, -1] -= 4.0
    return drawn


def unbounded(kind: str, rng: np.random.Generator, is_shared: bool, dtype: torch.dtype) -> Drawn:
    """The last variable stands alone and is bounded from below; in one problem its cost is negative."""
    draft = Draft(kind, rng, is_shared, n=5, p=1, m=6)
    draft.Q[:, -1] = draft.Q[:, :, -1] = draft.A[:, :, -1] = draft.G[:, :, -1] = 0.0
    draft.activate({"qp": 1, "lp": 3}[kind])
    draft.append(np.repeat(-np.eye(5)[-1:], BATCH, axis=0), s=0.0, lam=1.0)
    drawn = draft.finish(dtype, status=_odd(Status.UNBOUNDED))
    drawn.problem.q[ODD, -1] = -1.0
    return drawn


def _odd(status: Status) -> tuple[Status, ...]:
    return tuple(status if i == ODD else Status.OPTIMAL for i in range(BATCH))


SITUATIONS: dict[str, Callable[[str, np.random.Generator, bool, torch.dtype], Drawn]] = {
    "regular": regular,
    "weakly-active": weakly_active,
    "redundant-rows": redundant_rows,
    "nearly-singular": nearly_singular,
    "more-rows": more_rows,
    "vertex": vertex,
    "non-unique": non_unique,
    "no-constraints": no_constraints,
    "equality-only": equality_only,
    "infeasible": infeasible,
    "unbounded": unbounded,
}
"""By name: (kind, rng, whether matrices are shared, dtype) → batch."""

IMPOSSIBLE = {("entropy", "non-unique"), ("entropy", "unbounded")}
"""Kinds and situations that do not meet: an entropy is strictly convex and bounded from below."""

LEAST_SINGULAR_VALUE = 0.15
"""Of the active rows, relative to the largest, in situations that are meant to be well conditioned."""


def draw(kind: str, situation: str, *, is_shared: bool, dtype: torch.dtype, seed: int = 0) -> Drawn:
    """A batch of three; drawn again until its active rows are as independent as the situation says."""
    name = list(SITUATIONS).index(situation)
    for attempt in range(1000):
        rng = np.random.default_rng([seed, name, attempt])
        drawn = SITUATIONS[situation](kind, rng, is_shared, dtype)
        if _is_as_meant(drawn, situation):
            return drawn
    raise AssertionError(f"no {situation} {kind} was found")


def _is_as_meant(drawn: Drawn, situation: str) -> bool:
    problem = drawn.problem
    for i in drawn.solvable:
        rows = [m for m in (_of(problem.A, i, 3), _rows(drawn, i, weak=situation == "weakly-active")) if m is not None]
        C = np.concatenate(rows) if rows else np.zeros((0, problem.n))
        if len(C) == 0:
            continue
        is_over = situation == "weakly-active" and drawn.kind == "lp"
        values = np.linalg.svd(C[:-1] if is_over else C, compute_uv=False)
        least = 1e-4 if situation == "nearly-singular" and drawn.kind != "qp" else LEAST_SINGULAR_VALUE
        if len(C) > problem.n + is_over or values[-1] < least * values[0]:
            return False
        if np.linalg.norm(C, axis=1).min() < 0.5:
            return False
    return True


def _of(block: torch.Tensor | None, i: int, batched_ndim: int) -> Array | None:
    if block is None:
        return None
    return (block[i] if block.ndim == batched_ndim else block).double().numpy()


def _rows(drawn: Drawn, i: int, *, weak: bool) -> Array | None:
    G = _of(drawn.problem.G, i, 3)
    return None if G is None else G[drawn.active[i] | (drawn.weak[i] & weak)]

"""What a batch is drawn from: data by name, and the solution that they belong to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from argrad.problems import QP, Flag, Status

Array = np.ndarray

BATCH = 3


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A batch and what is known of it.

    Args:
        problem: As it is sent.
        kind: `qp`, `lp` or `entropy`.
        active: `(B, m)`, rows with a positive multiplier.
        weak: `(B, m)`, rows that hold with equality and have none.
        z, nu, lam: The solution, before float32 rounds the data.
        status: Wanted of each problem.
        flags: One of these is wanted of each problem that has a solution; none where there are none.
        is_unique: Whether z is unique.
        has_unique_multipliers: Whether ν and λ are unique.
        condition: How much larger errors may be than those of a well-conditioned problem.
    """

    problem: QP
    kind: str
    active: Array
    weak: Array
    z: Array
    nu: Array
    lam: Array
    status: tuple[Status, ...] = (Status.OPTIMAL,) * BATCH
    flags: frozenset[Flag] = frozenset()
    is_unique: bool = True
    has_unique_multipliers: bool = True
    condition: float = 1.0

    @property
    def solvable(self) -> list[int]:
        """Positions of the problems that have a solution."""
        return [i for i, status in enumerate(self.status) if status == Status.OPTIMAL]


class Draft:
    """What a situation is made of: data by name, always batched, and the solution they belong to."""

    def __init__(self, kind: str, rng: np.random.Generator, is_shared: bool, n: int, p: int, m: int) -> None:
        self.kind, self.rng, self.is_shared, self.n, self.p = kind, rng, is_shared, n, p
        self.Q = self.matrix(n, n)
        self.Q = np.swapaxes(self.Q, 1, 2) @ self.Q + 0.5 * np.eye(n)
        self.A, self.G = self.matrix(p, n), self.matrix(m, n)
        self.z, self.nu = self.numbers(BATCH, n), self.numbers(BATCH, p)
        self.tau = np.full(BATCH, 0.5) if is_shared else np.array([0.5, 1.0, 0.25])
        self.lam, self.s = np.zeros((BATCH, m)), self.positive(BATCH, m)
        if kind == "entropy":
            self.z = self.positive(BATCH, n)

    def numbers(self, *shape: int) -> Array:
        """Quarters between −2 and 2."""
        return self.rng.integers(-8, 9, shape) / 4

    def positive(self, *shape: int) -> Array:
        """Quarters between ¼ and 2."""
        return self.rng.integers(1, 9, shape) / 4

    def matrix(self, rows: int, columns: int) -> Array:
        """`(B, rows, columns)`, the same for the whole batch where matrices are shared."""
        if self.is_shared:
            return np.repeat(self.numbers(1, rows, columns), BATCH, axis=0)
        return self.numbers(BATCH, rows, columns)

    def activate(self, count: int) -> None:
        """Make the first rows active, with positive multipliers."""
        self.lam[:, :count] = self.positive(BATCH, count)
        self.s[:, :count] = 0.0

    def append(self, row: Array, s: float, lam: float = 0.0) -> None:
        """One more inequality: row `(B, n)`, and its slack and multiplier at the solution."""
        self.G = np.concatenate([self.G, row[:, None]], axis=1)
        self.s = np.concatenate([self.s, np.full((BATCH, 1), s)], axis=1)
        self.lam = np.concatenate([self.lam, np.full((BATCH, 1), lam)], axis=1)

    def gradient(self) -> Array:
        """−q that makes the point stationary."""
        right = times(np.swapaxes(self.A, 1, 2), self.nu) + times(np.swapaxes(self.G, 1, 2), self.lam)
        if self.kind == "qp":
            right = right + times(self.Q, self.z)
        if self.kind == "entropy":
            right = right + self.tau[:, None] * (1 + np.log(self.z))
            if self.has_quadratic:
                right = right + times(self.Q, self.z)
        return right

    @property
    def has_quadratic(self) -> bool:
        """Whether Q is there: problems with entropy have one where they are batched, none where they are shared."""
        return self.kind == "qp" or (self.kind == "entropy" and not self.is_shared)

    def finish(self, dtype: torch.dtype, **known: object) -> Drawn:
        """Data for which the point is the solution."""
        data = {"q": -self.gradient()}
        if self.has_quadratic:
            data["Q"] = self.Q
        if self.G.shape[1]:
            data |= {"G": self.G, "h": times(self.G, self.z) + self.s}
        if self.p:
            data |= {"A": self.A, "b": times(self.A, self.z)}
        if self.kind == "entropy":
            data["entropy"] = self.tau
        if self.is_shared:
            data |= {name: data[name][0] for name in ("Q", "G", "A", "entropy") if name in data}
        tensors = {name: torch.from_numpy(np.array(a, order="C")).to(dtype) for name, a in data.items()}
        return Drawn(
            problem=QP(**tensors),
            kind=self.kind,
            active=self.lam > 0,
            weak=(self.lam == 0) & (self.s == 0),
            z=self.z,
            nu=self.nu,
            lam=self.lam,
            **known,
        )


def times(matrix: Array, vector: Array) -> Array:
    """M x of each problem."""
    return np.einsum("bij,bj->bi", matrix, vector)

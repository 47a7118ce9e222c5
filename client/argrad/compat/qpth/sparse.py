"""qpth's `SpQPFunction`: QPs that share the patterns of their matrices, given by the values of the stored entries."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from argrad.client import Client
from argrad.compat.qpth.options import options_of, who_solves
from argrad.errors import ProblemError
from argrad.functional import solve_qp
from argrad.options import OnFailure, check_choices
from argrad.problems.shapes import shape_of

DENSE = 200
"""Variables up to which a batch of dense problems takes less time than one sparse problem after the other."""


class SpQPFunction:
    """argmin ½zᵀQz + pᵀz subject to Gz ≤ h, Az = b, of a batch of sparse problems, with qpth 0.0.18's call signature.

    In qpth it needs a GPU and an operation that torch does not have; here it runs wherever `QPFunction` does. Up to
    200 variables the batch is solved as one of dense matrices, beyond that each problem by itself as a sparse one.

    Args:
        Qi: `(2, ·)`, rows and columns of the stored entries of Q; both triangles. Entries that are named twice add up.
        Qsz: `(nz, nz)`.
        Gi: Likewise of G.
        Gsz: `(nineq, nz)`; no rows for no inequalities.
        Ai: Likewise of A.
        Asz: `(neq, nz)`; no rows for no equalities.
        eps: See `QPFunction`, as for the following.
        verbose: See there.
        notImprovedLim: See there.
        maxIter: See there.
        url: See there.
        on_failure: See there.
        timeout_s: See there.

    Raises:
        ProblemError: an index lies outside of its matrix, or an argument cannot have that value.
    """

    def __init__(
        self,
        Qi: Int[Tensor, "2 _"],
        Qsz: tuple[int, int],
        Gi: Int[Tensor, "2 _"],
        Gsz: tuple[int, int],
        Ai: Int[Tensor, "2 _"],
        Asz: tuple[int, int],
        eps: float = 1e-12,
        verbose: bool | int = 0,  # noqa: ARG002 - qpth's signature
        notImprovedLim: int = 3,  # noqa: ARG002 - qpth's signature
        maxIter: int = 20,
        *,
        url: str | Client | None = None,
        on_failure: OnFailure = "raise",
        timeout_s: float | None = None,
    ) -> None:
        check_choices(on_failure, "adjoint")
        self._patterns = {
            name: (_checked(name, indices, size), (int(size[0]), int(size[1])))
            for name, indices, size in (("Q", Qi, Qsz), ("G", Gi, Gsz), ("A", Ai, Asz))
        }
        self._options = options_of("auto", eps, maxIter)
        self._url, self._on_failure, self._timeout_s = url, on_failure, timeout_s

    def __call__(
        self,
        Qv: Float[Tensor, "*#batch _"],
        p: Float[Tensor, "*#batch nz"],
        Gv: Float[Tensor, "*#batch _"],
        h: Float[Tensor, "*#batch nineq"],
        Av: Float[Tensor, "*#batch _"],
        b: Float[Tensor, "*#batch neq"],
    ) -> Float[Tensor, "nBatch nz"]:
        """Solve; each argument with or without batch dimension, the values in the order of the indices.

        Returns:
            z, always with a batch dimension, differentiable in all six.

        Raises:
            ProblemError: values do not fit their indices, or a coefficient the others.
            SolveError: a problem has no solution.
            GradientError: in the backward pass, a problem has no gradient.
        """
        values, vectors = {"Q": Qv, "G": Gv, "A": Av}, {"q": p, "h": h, "b": b}
        for matrix, vector in (("G", "h"), ("A", "b")):
            if self._patterns[matrix][1][0] == 0:
                del values[matrix], vectors[vector]
        for name, given in values.items():
            stored = self._patterns[name][0].shape[1]
            if given.ndim not in (1, 2) or given.shape[-1] != stored:
                raise ProblemError(f"{name}v", f"shape {shape_of(given)}", f"({stored},) or (nBatch, {stored})")
        batch = next((len(t) for t in (*values.values(), *vectors.values()) if t.ndim == 2), None)
        if self._patterns["Q"][1][0] <= DENSE:
            z = self._solve({name: self._dense(name, given) for name, given in values.items()} | vectors)
            return z if batch is not None else z.unsqueeze(0)
        parts = [
            {name: t[i] if t.ndim == 2 else t for name, t in (values | vectors).items()} for i in range(batch or 1)
        ]
        return torch.stack(
            [self._solve(part | {name: self._sparse(name, part[name]) for name in values}) for part in parts]
        )

    def _solve(self, given: dict[str, Tensor]) -> Tensor:
        return solve_qp(
            who_solves(self._url),
            given["Q"],
            given["q"],
            *(given.get(name) for name in ("G", "h", "A", "b")),
            options=self._options,
            on_failure=self._on_failure,
            timeout_s=self._timeout_s,
        ).z

    def _dense(self, name: str, values: Tensor) -> Tensor:
        (row, column), (rows, columns) = self._patterns[name]
        flat = values.new_zeros(*values.shape[:-1], rows * columns)
        where = (row * columns + column).to(values.device)
        return flat.index_add(-1, where, values).reshape(*values.shape[:-1], rows, columns)

    def _sparse(self, name: str, values: Tensor) -> Tensor:
        indices, size = self._patterns[name]
        # The indices were checked once.
        return torch.sparse_coo_tensor(indices.to(values.device), values, size, check_invariants=False)


def _checked(name: str, indices: Tensor, size: tuple[int, int]) -> Tensor:
    if indices.numel() == 0:
        return indices.new_zeros(2, 0, dtype=torch.int64)
    if indices.ndim != 2 or indices.shape[0] != 2 or indices.is_floating_point():
        raise ProblemError(f"{name}i", f"shape {shape_of(indices)} of {indices.dtype}", "whole numbers (2, entries)")
    for axis, word in enumerate(("row", "column")):
        least, most = int(indices[axis].min()), int(indices[axis].max())
        if least < 0 or most >= size[axis]:
            found = f"{word} {least if least < 0 else most}"
            raise ProblemError(f"{name}i", found, f"{word}s from 0 to {size[axis] - 1}, as {name}sz says")
    return indices.detach().to(torch.int64)

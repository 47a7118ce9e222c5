"""What the layers below share that state a problem of their own as a QP; and the QP with bounds alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from argrad.functional import BoundedQPSolution, QPSolution, solve_qp
from argrad.nn.layer import ProblemLayer
from argrad.registered import Registered, handle_for

REGISTERED_BYTES = 16 * 1024
"""A layer registers the constants of its problem from this size on."""

_MOST_KEPT = 8
"""Sizes of input for which one layer keeps its constants."""

Answer = BoundedQPSolution | QPSolution
Size = Float[Tensor, "*#batch"] | float
"""A number for all problems, or one for each: a float, or a tensor `()` or `(B,)`."""


class QuadraticLayer(ProblemLayer):
    """A layer whose problem is a QP of its own making; arguments as `ProblemLayer` has them."""

    def _fixed(self, like: Tensor, what: Hashable, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Constants of the problem that nobody but this layer has: large ones are registered when they are first made.

        Args:
            like: Input of the layer, to whose size, dtype and device the constants belong.
            what: What else they depend on.
            make: Makes them.
        """
        if torch.compiler.is_compiling():
            return make()
        kept: dict[Hashable, Registered] = self.__dict__.setdefault("_kept", {})
        key = (what, like.shape[-1], like.dtype, like.device)
        handle = kept.get(key)
        if handle is not None:
            return handle
        made = make()
        if sum(tensor.nbytes for tensor in made.values()) < REGISTERED_BYTES:
            return made
        while len(kept) >= _MOST_KEPT:
            kept.pop(next(iter(kept)), None)
        handle = kept[key] = handle_for(self.client, "qp", made)
        return handle

    def __getstate__(self) -> dict[str, Any]:
        """Copies of a layer make their constants anew."""
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def _solve(
        self,
        Q: Tensor | None,
        q: Tensor,
        *,
        G: Tensor | None = None,
        h: Tensor | None = None,
        A: Tensor | None = None,
        b: Tensor | None = None,
        lb: Tensor | None = None,
        ub: Tensor | None = None,
        entropy: Tensor | float | None = None,
    ) -> Answer:
        return solve_qp(
            self.client,
            Q,
            q,
            G,
            h,
            A,
            b,
            lb=lb,
            ub=ub,
            entropy=entropy,
            options=self.options,
            on_failure=self.on_failure,
            gradients=self.gradients,
            timeout_s=self.timeout_s,
            warm_start=self.warm_start,
        )


class BoxQP(QuadraticLayer):
    """argmin ½zᵀQz + qᵀz subject to lb ≤ z ≤ ub; arguments as `ProblemLayer` has them.

    With `return_duals` it returns `BoundedQPSolution`.
    """

    def forward(
        self,
        Q: Float[Tensor, "*#batch n n"],
        q: Float[Tensor, "*#batch n"],
        lb: Float[Tensor, "*#batch n"] | None = None,
        ub: Float[Tensor, "*#batch n"] | None = None,
    ) -> Float[Tensor, "*batch n"] | Answer:
        """Solve; parameters and errors as in `argrad.solve_qp`.

        Returns:
            z `(B, n)`, or `(n,)` where nothing is batched; with `return_duals` all blocks of the solution.
        """
        solution = self._solve(Q, q, lb=lb, ub=ub)
        return solution if self.return_duals else solution.z


def identity(like: Tensor) -> Tensor:
    """The Q of a projection of vectors like that."""
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def column(value: Tensor | float, like: Tensor) -> Tensor:
    """A number, or one a problem, as a right-hand side of one row, `(1,)` or `(B, 1)`."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).unsqueeze(-1)


def ones(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Ones of a dtype and device: a plain tensor, under `vmap` too."""
    return torch.ones(shape, dtype=like.dtype, device=like.device)


def zeros(size: int, like: Tensor) -> Tensor:
    """Zeros, likewise."""
    return torch.zeros(size, dtype=like.dtype, device=like.device)

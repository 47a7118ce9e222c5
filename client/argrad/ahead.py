"""The derivative of a small problem, sent along with its solution: a training step is one exchange, not two.

The adjoint is linear in the cotangent g of the primal block, δ = Σᵢ gᵢ δ⁽ⁱ⁾ with δ⁽ⁱ⁾ that of the i-th unit vector.
Where these n adjoints are few numbers, they cost less than another exchange.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from argrad.options import Options
from argrad.problems import Form
from argrad.problems.form import Blocks
from argrad.results import OK, SolveResult

MOST_NUMBERS = 4096
"""Of unit cotangents and their adjoints. A step takes three quarters of what two exchanges take up to there; with three
times as many there is no difference any more."""

_METHODS = ("auto", "kkt")


@dataclass(frozen=True, eq=False)
class Ahead:
    """The adjoint of every cotangent of the primal block.

    Args:
        block: Name of the primal block: `z` or `x`.
        adjoints: Blocks of the adjoint by name, `(B, n, ·)`, or `(n, ·)` where nothing is batched.
        method: Differentiation method that formed them.
    """

    block: str
    adjoints: Blocks
    method: str | None

    def adjoint(self, cotangents: Mapping[str, Tensor]) -> Blocks | None:
        """The adjoint of some cotangents, `(B, n)` or `(k, B, n)`; None if these do not tell it.

        That is if another block has a cotangent, or if they belong to another batch than was solved.
        """
        if cotangents.keys() != {self.block}:
            return None
        g = cotangents[self.block].unsqueeze(-2)
        batch = self.adjoints[self.block].shape[:-2]
        if g.shape[-2 - len(batch) : -2] != batch:
            return None
        return {name: (g @ each).squeeze(-2) for name, each in self.adjoints.items()}


def cotangents_ahead(form: Form, options: Options) -> Blocks | None:
    """Unit cotangents of the primal block, `(n, B, n)` or `(n, n)`, to be sent with a solve.

    None where the derivative is better asked for once it is wanted: it is many numbers, or depends on more than the
    point and the cotangent.

    Args:
        form: The problem.
        options: Of the solve.
    """
    if options.method not in _METHODS or options.method_options or options.precision != "float64":
        return None
    sizes = form.block_sizes
    block, n = next(iter(sizes.items()))
    batch = form.batch_size
    if "entropy" in form.parameters or n * (n + sum(sizes.values())) * (batch or 1) > MOST_NUMBERS:
        return None
    units = torch.eye(n, dtype=form.problem.q.dtype, device=form.problem.q.device)
    return {block: units if batch is None else units.unsqueeze(1).expand(n, batch, n)}


def ahead_of(result: SolveResult) -> Ahead | None:
    """What a solve with `cotangents_ahead` brought; None where some problem has no solution or no gradient."""
    if result.adjoint is None or result.failed or any(status != OK for status in result.gradient_statuses):
        return None
    is_batched = result.problem.batch_size is not None
    adjoints = {name: t.movedim(0, 1).contiguous() if is_batched else t for name, t in result.adjoint.items()}
    return Ahead(block=next(iter(result.problem.block_sizes)), adjoints=adjoints, method=result.report.method)

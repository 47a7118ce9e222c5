"""How a dimension that vmap adds becomes part of a batch that can be sent.

Inside a vmap rule every tensor has its own shape plus, at `dim`, V copies, or no copies (`dim` None). Copies of a
problem join its batch, `(V, B, …) → (V·B, …)`, in this one order everywhere: a forward solve and its backward are
folded alike, so that the state of the one serves the other. Parameters that neither vmap nor the caller batched stay
shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

Dim = int | None


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Merges V copies of a batch of B problems into V·B problems.

    Args:
        size: V.
        batch: B, or None where the problem has no batch dimension of its own.
    """

    size: int
    batch: int | None

    def parameter(self, tensor: Tensor, dim: Dim, rank: int) -> Tensor:
        """A parameter whose own shape is `(…rank)` or `(B, …rank)`, as one of the merged problems."""
        if dim is None and tensor.ndim == rank:
            return tensor
        return self.expanded_parameter(tensor, dim, rank)

    def expanded_parameter(self, tensor: Tensor, dim: Dim, rank: int) -> Tensor:
        """The same, with a batch dimension even if it could be shared."""
        tensor = self._with_copies(tensor, dim)
        if self.batch is None:
            return tensor
        if tensor.ndim == rank + 1:
            tensor = tensor.unsqueeze(1).expand(self.size, self.batch, *tensor.shape[1:])
        return tensor.flatten(0, 1)

    def block(self, tensor: Tensor, dim: Dim) -> Tensor:
        """A block of a solution, `(n)` or `(B, n)`, as one of the merged problems."""
        tensor = self._with_copies(tensor, dim)
        return tensor if self.batch is None else tensor.flatten(0, 1)

    def cotangent(self, tensor: Tensor, dim: Dim) -> Tensor:
        """A cotangent of a block, which may have k in front: `(V, k, B, n) → (k, V·B, n)`."""
        tensor = self._with_copies(tensor, dim)
        if tensor.ndim > 1 + self.block_rank:
            tensor = tensor.movedim(0, 1)
        return tensor if self.batch is None else tensor.flatten(-3, -2)

    def split(self, tensor: Tensor) -> Tensor:
        """Undo `block` and `cotangent`: the copies come in front."""
        if self.batch is not None:
            tensor = tensor.reshape(*tensor.shape[:-2], self.size, self.batch, tensor.shape[-1])
        return tensor.movedim(-1 - self.block_rank, 0)

    @property
    def block_rank(self) -> int:
        """Dimensions of a block of the problem that was copied."""
        return 1 if self.batch is None else 2

    def _with_copies(self, tensor: Tensor, dim: Dim) -> Tensor:
        return tensor.expand(self.size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def own_batch(parameters: Sequence[Tensor], dims: Sequence[Dim], ranks: Sequence[int]) -> int | None:
    """B of the problem that was copied, or None where no parameter has a batch dimension of its own."""
    for tensor, dim, rank in zip(parameters, dims, ranks, strict=True):
        own = list(tensor.shape)
        if dim is not None:
            own.pop(dim)
        if len(own) > rank:
            return own[0]
    return None


def stacked(tensor: Tensor, dim: Dim, size: int, *, has_k: bool) -> Tensor:
    """V copies of a cotangent as V cotangents of one problem: `(V, …)`, or `(V·k, …)` where it has k already."""
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1) if has_k else tensor

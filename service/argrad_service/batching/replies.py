"""Tensors of the replies of a merged batch: formed once for all callers, then divided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from argrad.problems.qp import DIMENSIONS
from argrad.wire.messages import TensorMap
from argrad_service.batching.frames import SYMBOL, Frame

_SYMBOLS: Mapping[str, tuple[str, ...]] = {
    **{f"gradients.{name}": symbols for name, symbols in DIMENSIONS.items()},
    **{f"{section}.{name}": (symbol,) for section in ("solution", "adjoint") for name, symbol in SYMBOL.items()},
}
"""Sizes of a reply's tensors behind the batch dimension; `report.*` has none."""


def divide(
    tensors: TensorMap, counts: Sequence[int], frames: Sequence[Frame], is_single: Sequence[bool]
) -> list[TensorMap]:
    """Each caller's part of tensors `(…, B, ·)` of the batch, without padding; views.

    Args:
        tensors: By their names in the reply, of problems of kind `qp` without bounds.
        counts: Problems of each caller.
        frames: Their padding.
        is_single: Whose part has no batch dimension.
    """
    parts: list[TensorMap] = [{} for _ in counts]
    padded = [(part, frame) for part, frame in zip(parts, frames, strict=True) if not frame.is_tight]
    for name, tensor in tensors.items():
        symbols = _SYMBOLS.get(name, ())
        axis = tensor.ndim - len(symbols) - 1
        if all(is_single):
            own: Sequence[Tensor] = tensor.unbind(axis)
        else:
            own = tensor.split_with_sizes(list(counts), axis)
            own = [part.squeeze(axis) if single else part for part, single in zip(own, is_single, strict=True)]
        for part, values in zip(parts, own, strict=True):
            part[name] = values
        for part, frame in padded:
            part[name] = frame.trim_block(part[name], symbols)
    return parts

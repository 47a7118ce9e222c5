"""Up to which sizes a QP is small: solved by loops over problems side by side, on a way of its own.

Apart from the kernels, whose import takes a second and chooses where they are cached.
"""

from __future__ import annotations

MOST_VARIABLES = 12
"""Up to so many variables plain loops are faster than calls."""

MOST_ROWS = 48
"""And with up to so many rows their Gram matrix is cheaper than what it saves."""


def is_small(n: int, rows: int) -> bool:
    """Whether problems of n variables and so many rows, equalities and inequalities, are small."""
    return n <= MOST_VARIABLES and rows <= MOST_ROWS

"""Pairwise covering: few cases that contain every pair of values of two axes that occurs in any case."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations


def pairs(case: Sequence[object]) -> set[tuple[int, object, int, object]]:
    """The pairs of values in a case, each with its axes."""
    return {(i, case[i], j, case[j]) for i, j in combinations(range(len(case)), 2)}


def cover(cases: Sequence[Sequence[object]]) -> list[int]:
    """Positions of cases that cover every pair which some case contains.

    Greedy: the case with the most pairs that are still missing comes next, the first one of several; always the same
    for the same cases. Sets of pairs are bits of an integer.
    """
    number: dict[tuple[int, object, int, object], int] = {}
    masks = [sum(1 << number.setdefault(pair, len(number)) for pair in pairs(case)) for case in cases]
    missing = (1 << len(number)) - 1
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda i: ((masks[i] & missing).bit_count(), -i))
        chosen.append(best)
        missing &= ~masks[best]
    return chosen

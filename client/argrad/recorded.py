"""One forward solve, as its derivatives need to know it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from argrad.ahead import Ahead
from argrad.backend import Call, SolvedHere
from argrad.client import Client
from argrad.operations import Place
from argrad.options import OnFailure, Options
from argrad.problems import check_finite
from argrad.problems.form import Blocks
from argrad.problems.formed import DIMENSIONS_BY_KIND
from argrad.problems.sparse import Constants
from argrad.warm import WarmStart
from argrad.wire.messages import FailedGradients, Gradients

Kind = Literal["qp", "qp_two_sided", "sparse_qp"]

ADJOINT_NAMES = {"z": "z", "nu": "nu", "lam": "mu", "lam_lb": "mu_lb", "lam_ub": "mu_ub", "x": "x", "y": "y"}
"""Block of the adjoint that belongs to each block of a solution, and has its shape; the slack has none."""


def block_names(kind: Kind, names: Sequence[str]) -> tuple[str, ...]:
    """Blocks of a solution in order, where parameters of those names are given."""
    if kind == "qp_two_sided":
        return "x", "y"
    return "z", "nu", "lam", "s", *[f"lam_{name}" for name in ("lb", "ub") if name in names]


class State:
    """A forward state that the service keeps until no derivative can be asked for any more.

    Args:
        client: Tells the service, on its next call.
        token: Of the state.
    """

    def __init__(self, client: Client, token: str) -> None:
        self.token = token
        self._client, self._pid = client, os.getpid()

    def __del__(self) -> None:
        # A forked child holds copies of what its parent still needs.
        if self._pid == os.getpid():
            self._client.let_go(self.token)


@dataclass(eq=False, kw_only=True)
class Recorded:
    """One forward solve. All is settled before it but the last fields, which it and its derivatives set.

    Args:
        client: Who is asked, then and for derivatives.
        kind: Of the problem.
        names: Of the parameters that are given, in order.
        options: Solver and differentiation method.
        gradients: Who forms the gradients: the client, from an `adjoint`, or the service, in `full`.
        on_failure: What happens to problems without a solution or a gradient.
        call: Deadline, request id and affinity, the same for the derivatives.
        learned: Names of the parameters that need a gradient, or have a tangent; within an autograd Function they no
            longer say so.
        constants: Of a sparse problem, the matrices, where they are none of the parameters.
        start: Where the solver begins; gets the solution.
        fetches_ahead: Whether the derivative of a small problem is to come with its solution.
        ahead: The derivative, if it came.
        here: The solve itself, if it was made in this process without messages.
        state: What the service keeps, if it does.
        failed: Problems without a solution.
        batched: Parameters with a batch dimension, as they were sent.
        method: Differentiation method that the last derivative was formed by.
    """

    client: Client
    kind: Kind
    names: tuple[str, ...]
    options: Options
    gradients: Gradients
    on_failure: OnFailure
    call: Call
    learned: frozenset[str] = frozenset()
    constants: Constants | None = None
    start: WarmStart | None = None
    fetches_ahead: bool = False
    ahead: Ahead | None = None
    here: SolvedHere | None = None
    state: State | None = None
    failed: tuple[int, ...] = ()
    batched: frozenset[str] = frozenset()
    method: str | None = None
    blocks: tuple[str, ...] = field(init=False)
    ranks: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.blocks = block_names(self.kind, self.names)
        dimensions = DIMENSIONS_BY_KIND[self.kind]
        self.ranks = tuple(len(dimensions[name]) for name in self.names)

    @property
    def keep_state(self) -> bool:
        """Whether a derivative may be asked for."""
        return bool(self.learned)

    @property
    def adjoint_blocks(self) -> tuple[str, ...]:
        """Names of the adjoint's blocks, in order."""
        return tuple(ADJOINT_NAMES[name] for name in self.paired_blocks)

    @property
    def paired_blocks(self) -> tuple[str, ...]:
        """Blocks of the solution to which one of the adjoint belongs: all but the slack."""
        return tuple(name for name in self.blocks if name in ADJOINT_NAMES)

    @property
    def failed_gradients(self) -> FailedGradients:
        """What stands for a gradient that does not exist, in words."""
        return "zero" if self.on_failure == "zero_grad" else "nan"

    @property
    def filler(self) -> float:
        """What stands for a gradient that does not exist."""
        return 0.0 if self.on_failure == "zero_grad" else float("nan")

    def find_batched(self, parameters: Sequence[Tensor]) -> frozenset[str]:
        """Names of the parameters that have a batch dimension."""
        zipped = zip(self.names, parameters, self.ranks, strict=True)
        return frozenset(name for name, tensor, rank in zipped if tensor.ndim > rank)

    def place(self, parameters: Sequence[Tensor], solution: Blocks) -> Place:
        """Where derivatives are taken. The state stands for it only if it was solved in this shape."""
        is_same = self.find_batched(parameters) == self.batched
        given = dict(zip(self.names, parameters, strict=True))
        return Place(
            kind=self.kind,
            parameters=given if self.constants is None else self.constants.beside(given),
            solution=solution,
            learned=self.learned,
            state=self.state.token if self.state is not None and is_same else None,
            is_own=True,
        )

    def here_for(self, parameters: Sequence[Tensor]) -> SolvedHere | None:
        """The solve in this process, if it was of parameters in this shape."""
        return self.here if self.here is not None and self.find_batched(parameters) == self.batched else None

    def named_blocks(self, tensors: Sequence[Any]) -> dict[str, Any]:
        """Blocks of a solution, or what belongs to them, by name."""
        return dict(zip(self.blocks, tensors, strict=True))

    def off_slack(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What belongs to the blocks of a solution, without that of the slack: one for each block of the adjoint."""
        return [tensor for name, tensor in zip(self.blocks, tensors, strict=True) if name in ADJOINT_NAMES]

    def along_blocks(self, adjoint: Sequence[Tensor | None]) -> list[Tensor | None]:
        """What belongs to the blocks of the adjoint, in the order of those of a solution, the slack with None."""
        return self.in_blocks(dict(zip(self.paired_blocks, adjoint, strict=True)))

    def in_blocks(self, named: Mapping[str, Tensor | None]) -> list[Tensor | None]:
        """What belongs to some blocks of a solution, in order, the others with None."""
        return [named.get(name) for name in self.blocks]

    def unpack(self, operands: Sequence[Any], *sizes: int) -> list[Sequence[Any]]:
        """Cut operands into parameters, blocks of the solution, and further groups of the given sizes."""
        groups, start = [], 0
        for size in (len(self.names), len(self.blocks), *sizes):
            groups.append(operands[start : start + size])
            start += size
        return groups

    def unusable(self, parameters: Sequence[Tensor]) -> Tensor | None:
        """Mask `(B,)`, or `()` where nothing is batched, of the problems that failed; None if none did."""
        if not self.failed:
            return None
        batch = next((t.shape[0] for t, rank in zip(parameters, self.ranks, strict=True) if t.ndim > rank), None)
        mask = torch.zeros(batch or 1, dtype=torch.bool, device=parameters[0].device)
        mask[list(self.failed)] = True
        return mask if batch is not None else mask[0]


def fill_rows(blocks: Blocks, mask: Tensor | None, value: float) -> Blocks:
    """Blocks `(…, B, ·)` with the rows of some problems overwritten.

    Args:
        blocks: By name; not changed.
        mask: `(B,)`, or `()` where nothing is batched; None for no problem.
        value: What is written.
    """
    if mask is None:
        return blocks
    return {name: tensor.masked_fill(mask.unsqueeze(-1), value) for name, tensor in blocks.items()}


def after_failure(record: Recorded, parameters: Sequence[Tensor], blocks: Blocks) -> Blocks:
    """Rows of failed problems: NaN, or the last iterate with zeros for what is not finite in it."""
    mask = record.unusable(parameters)
    if mask is None or record.on_failure == "nan":
        return fill_rows(blocks, mask, float("nan"))
    rows = mask.unsqueeze(-1)
    return {name: tensor.masked_fill(rows & ~torch.isfinite(tensor), 0.0) for name, tensor in blocks.items()}


def check_cotangents(record: Recorded, cotangents: Blocks, mask: Tensor | None) -> Tensor | None:
    """Extend the mask of failed problems by those whose cotangents are not finite.

    Raises:
        ProblemError: a cotangent is not finite, and `on_failure` is `raise`.
    """
    for name, tensor in cotangents.items():
        if math.isfinite(tensor.sum().item()):
            continue
        if record.on_failure == "raise":
            check_finite(f"upstream.{name}", tensor)
            continue
        bad = ~torch.isfinite(tensor).all(dim=-1)
        has_k = bad.ndim > (1 if record.batched else 0)
        bad = bad.any(dim=0) if has_k else bad
        if bool(bad.any()):
            mask = bad if mask is None else mask | bad
    return mask

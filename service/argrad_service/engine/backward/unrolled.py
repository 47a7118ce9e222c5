"""`unrolled`: automatic differentiation of the solver's own iterations, all of them or the last few.

The forward iteration is repeated from its own start, with the number of iterations that it took for each problem or
another one, and reverse AD goes through it: through all iterations, or with `last = k` through the last k alone, which
takes the iterate before them as a constant. The iterations are differentiated in segments: each is computed anew from
its first iterate, differentiated, and dropped, so that no more than one segment's graph is held. With `last = k` memory
does not depend on the number of iterations at all.

AD runs to the vectors q, b, h; the adjoint is d_z = ∂q, d_ν = −∂b, μ = −∂h. ∂q, ∂b, ∂h are thus the exact derivatives
of the iterate (with k iterations: of the truncated graph). ∂Q, ∂G, ∂A are formed from the adjoint as everywhere, by
outer products with the solution; that is their AD derivative in the limit only, where the iterate is a fixed point.

Reference: Tan, Delong & Terekhov, Deep Inverse Optimization, CPAIOR 2019, sections 3 and 5. Deviations: segments; step
lengths, stages and restarts are constants; phase I is not differentiated. `admm` is repeated with constant penalties
and without restarts: it may need more iterations than the solver took.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol, cast

import torch
from pydantic import Field
from torch import Tensor

from argrad.problems import Flag
from argrad_service.engine.backward.adjoints import INACCURATE, Cotangents, read_cotangents
from argrad_service.engine.backward.inexact import adjoint_residual, conclude_inexact, distance
from argrad_service.engine.data import Data
from argrad_service.engine.forward.unrolling import State, Unrolling
from argrad_service.engine.options import OwnOptions, SolverOptions, Stopped
from argrad_service.engine.outcome import Backward, Forward

NAME = "unrolled"

GRAPH_BYTES = 2**28
"""What the graph of a segment may take, unless that of a single iteration takes more."""


class Options(OwnOptions):
    """Options of `unrolled`."""

    iterations: int | None = Field(default=None, ge=1, le=1_000_000)
    """Iterations that are repeated, single steps with `pgd` and `admm`; null for as many as the solver took."""

    last: int | None = Field(default=None, ge=1, le=1_000_000)
    """Of these the last ones that are differentiated; null for all of them."""

    segment: int | None = Field(default=None, ge=1, le=1_000_000)
    """Iterations whose graph is held at a time; null for the square root of their number. Fewer where their graph would
    take more than 256 MiB; more is not faster."""


class Unrollable(Protocol):
    """What a module of `forward` has that can be unrolled."""

    def unroll(self, data: Data, options: SolverOptions) -> Unrolling:
        """The solver's iteration, as autograd sees it."""
        ...


def vjp(forward: Forward, upstream: Mapping[str, Tensor], options: Options) -> Backward:
    """Pull cotangents back through the solver's iterations.

    Args:
        forward: Outcome of a solver that can be unrolled.
        upstream: Cotangents of `z`, `nu`, `lam`, `s`, each `(B, ·)` or `(k, B, ·)` with one k; absent means zero.
        options: How many iterations, and how many at a time.

    Returns:
        Adjoint, with the measures `unrolled_distance`, ‖z_N − z‖₂ from the last iterate to the solution in the reply,
        and `adjoint_residual`, by how much the adjoint misses the KKT system of the exact solution; above 1e-6 with
        the flag `truncated`. NaN in rows of problems that are not optimal.

    Raises:
        Stopped: the solve's `should_stop()` was true.
    """
    data, given = forward.data, read_cotangents(forward.data, upstream)
    d_z, d_y = given.g_z.new_full(given.g_z.shape, torch.nan), given.g_y.new_full(given.g_y.shape, torch.nan)
    z = torch.full_like(forward.solution.z, torch.nan)
    index = torch.nonzero(forward.factor.is_optimal).squeeze(-1)
    if len(index):
        part = replace(given, g_z=given.g_z[:, index], on_rows=given.g_y[:, index])
        counts = _counts(forward)[index]
        if options.iterations is not None:
            counts = torch.full_like(counts, options.iterations)
        d_z[:, index], d_y[:, index], z[index] = _differentiate(forward, data.select(index), counts, part, options)
    residual = adjoint_residual(forward, given, d_z, d_y)
    return conclude_inexact(
        forward,
        given,
        d_z,
        d_y,
        status={},
        flags={Flag.TRUNCATED: ~(residual <= INACCURATE)},
        method=NAME,
        measures={"unrolled_distance": distance(forward, z), "adjoint_residual": residual},
    )


def _counts(forward: Forward) -> Tensor:
    """Iterations to repeat, `(B,)`: a solver that counts in larger units has the measure `steps`."""
    counts = forward.measures.get("steps", forward.iterations)
    return counts.to(device=forward.data.q.device, dtype=torch.int64)


def _differentiate(
    forward: Forward, data: Data, counts: Tensor, given: Cotangents, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """d_z `(k, B, n)`, d_y `(k, B, p + m)` and the last iterate `(B, n)` of problems that are optimal."""
    module = cast("Unrollable", importlib.import_module(f"argrad_service.engine.forward.{forward.solver}"))
    unrolling = module.unroll(data, forward.options)
    taken = counts if options.last is None else counts.clamp(max=options.last)
    most = int(taken.amax())
    length = options.segment or max(1, math.isqrt(most))
    if length > 1:
        length = min(length, max(1, GRAPH_BYTES // _graph_bytes(unrolling, data)))

    def advance(data: Data, state: State, begin: int, end: int, limit: Tensor) -> State:
        """Iterations begin to end; a problem stands still once it has reached its limit."""
        for j in range(begin, end):
            if forward.options.should_stop():
                raise Stopped
            moves = limit > j
            moved = unrolling.step(data, state)
            state = tuple(
                torch.where(moves.reshape(-1, *[1] * (old.ndim - 1)), new, old)
                for old, new in zip(state, moved, strict=True)
            )
        return state

    with torch.no_grad():
        skipped = counts - taken
        state = advance(data, unrolling.start, 0, int(skipped.amax()), skipped)
        begins = range(0, most, length)
        states = []
        for begin in begins:
            states.append(state)
            state = advance(data, state, begin, min(begin + length, most), taken)
    z, pulled_state, pulled = _pull_result(unrolling, data, state, given)

    def pull_segment(begin: int, first: State, grads: list[State]) -> list[State]:
        q, d, leaves = _leaves(data, first)
        with torch.enable_grad():
            last = advance(replace(data, q=q, d=d), leaves, begin, min(begin + length, most), taken)
        return [_pull(last, each, (q, d, *leaves)) for each in grads]

    for begin in reversed(begins):
        found = pull_segment(begin, states.pop(), pulled_state)
        pulled = [(a + more[0], b + more[1]) for (a, b), more in zip(pulled, found, strict=True)]
        pulled_state = [more[2:] for more in found]
    return torch.stack([a for a, _ in pulled]), -torch.stack([b for _, b in pulled]), z


def _graph_bytes(unrolling: Unrolling, data: Data) -> int:
    """Bytes that autograd holds of one iteration; at least 1."""
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    q, d, leaves = _leaves(data, unrolling.start)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _moved = unrolling.step(replace(data, q=q, d=d), leaves)  # lives as long as what it holds is counted
    return max(1, sum(held.values()))


def _pull_result(
    unrolling: Unrolling, data: Data, state: State, given: Cotangents
) -> tuple[Tensor, list[State], list[tuple[Tensor, Tensor]]]:
    """The last iterate, and for each cotangent its pull-back to that state and, directly, to q and d."""
    q, d, leaves = _leaves(data, state)
    with torch.enable_grad():
        z, y = unrolling.result(replace(data, q=q, d=d), leaves)
    found = [_pull((z, y), (g_z, g_y), (q, d, *leaves)) for g_z, g_y in zip(given.g_z, given.g_y, strict=True)]
    return z.detach(), [more[2:] for more in found], [(more[0], more[1]) for more in found]


def _leaves(data: Data, state: State) -> tuple[Tensor, Tensor, State]:
    q, d = data.q.detach().clone().requires_grad_(), data.d.detach().clone().requires_grad_()
    return q, d, tuple(block.detach().clone().requires_grad_() for block in state)


def _pull(outputs: State, grads: State, inputs: State) -> State:
    """Pull-back of grads at outputs to every input, zero where an output does not depend on it."""
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(leaf) for leaf in inputs)
    found = torch.autograd.grad(
        [out for out, _ in pairs], inputs, [grad for _, grad in pairs], retain_graph=True, allow_unused=True
    )
    return tuple(torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(found, inputs, strict=True))

"""Solutions of optimisation problems as differentiable functions of their data."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from argrad.autograd import differentiable_solve
from argrad.client import Client
from argrad.compiled import solve_in_graph
from argrad.errors import ProblemError
from argrad.options import OnFailure, Options, check_choices
from argrad.problems.form import Blocks
from argrad.problems.sparse_tensors import is_sparse
from argrad.recorded import Kind
from argrad.sparse import differentiable_sparse_solve
from argrad.warm import WarmStart
from argrad.wire.messages import Gradients

_DEFAULTS = Options()
_ROWS = {"G": ("h",), "A": ("b", "l", "u")}


class QPSolution(NamedTuple):
    """Solution of ½zᵀQz + qᵀz subject to Az = b, Gz ≤ h; `(B, ·)`, without B where nothing is batched.

    Lagrangian ½zᵀQz + qᵀz + νᵀ(Az − b) + λᵀ(Gz − h): `nu` has either sign, `lam` and the slack `s = h − Gz` are
    nonnegative. Blocks of absent rows are empty.
    """

    z: Float[Tensor, "*batch n"]
    nu: Float[Tensor, "*batch p"]
    lam: Float[Tensor, "*batch m"]
    s: Float[Tensor, "*batch m"]


class BoundedQPSolution(NamedTuple):
    """`QPSolution` with bounds lb ≤ z ≤ ub, to which `lam_lb` and `lam_ub` ≥ 0 belong; empty where one is not given."""

    z: Float[Tensor, "*batch n"]
    nu: Float[Tensor, "*batch p"]
    lam: Float[Tensor, "*batch m"]
    s: Float[Tensor, "*batch m"]
    lam_lb: Float[Tensor, "*batch _"]
    lam_ub: Float[Tensor, "*batch _"]


class TwoSidedSolution(NamedTuple):
    """Solution of ½xᵀPx + qᵀx subject to l ≤ Ax ≤ u; `y` is positive at the upper bound, negative at the lower."""

    x: Float[Tensor, "*batch n"]
    y: Float[Tensor, "*batch m"]


def solve_qp(
    client: Client,
    Q: Float[Tensor, "*#batch n n"] | None,
    q: Float[Tensor, "*#batch n"],
    G: Float[Tensor, "*#batch m n"] | None = None,
    h: Float[Tensor, "*#batch m"] | None = None,
    A: Float[Tensor, "*#batch p n"] | None = None,
    b: Float[Tensor, "*#batch p"] | None = None,
    *,
    lb: Float[Tensor, "*#batch n"] | None = None,
    ub: Float[Tensor, "*#batch n"] | None = None,
    entropy: Float[Tensor, "*#batch"] | float | None = None,
    options: Options = _DEFAULTS,
    on_failure: OnFailure = "raise",
    gradients: Gradients = "adjoint",
    timeout_s: float | None = None,
    request_id: str | None = None,
    warm_start: WarmStart | None = None,
) -> QPSolution | BoundedQPSolution:
    """Solve minimise ½zᵀQz + qᵀz subject to Az = b, Gz ≤ h, lb ≤ z ≤ ub, differentiably in all of them.

    Each parameter is batched, with one dimension B in front, or shared by the batch, and then receives the sum of its
    gradients. Every block of the solution is differentiable, in reverse and in forward mode and under the transforms of
    `torch.func`, and its derivatives again, to any order, where the method is exact: with entropy, with sparse matrices
    or by a method that approximates a second derivative raises. `is_grads_batched=True` and `vectorize=True` of
    `torch.autograd` use an older vmap, which cannot see into this operation and raises: take `torch.func.jacrev`.

    Args:
        client: Who solves.
        Q: Read as its symmetric part, and so is its gradient; None in a linear program (see `solve_lp`).
            A single problem may have Q, G and A as sparse CSR or COO tensors: see docs/sparse.md.
        q: float64 or float32, as are all, on one device; half precision is refused.
        G: Rows of the inequalities.
        h: Their right-hand sides; +inf does not bind.
        A: Rows of the equalities.
        b: Their right-hand sides.
        lb: Lower bounds; −inf is none.
        ub: Upper bounds; +inf is none.
        entropy: τ > 0, `()` or `(B,)`, adds τ Σ zᵢ log zᵢ to the objective, which implies z ≥ 0: rows that say no more
            than that are left out, and their multipliers are 0.
        options: Solver, tolerance, differentiation method.
        on_failure: What happens to a problem without a solution, or without a gradient. `raise` raises at once. `nan`
            makes its rows of the solution NaN, and its gradient, also in the sum over a shared parameter. `zero_grad`
            lets its rows hold the last iterate (0 where that is not finite) and leaves it out of every gradient: for
            data-parallel training, where one process that raises would leave the others waiting. A row of the
            incoming gradient that is not finite counts like a failure under `nan` and `zero_grad`.
        gradients: `adjoint` sends O(n + m + p) numbers a problem back and forms the gradients here; `full` forms them
            where the problem is solved. Under vmap they are formed here.
        timeout_s: Seconds for the solve, and for each of its derivatives; by default the client's.
        request_id: Of the solve and of its derivatives, in the service's log; drawn at random by default.
        warm_start: Remembers the solution, and begins at the one that it remembers; not for sparse matrices.

    Returns:
        Solution and multipliers, in the dtype and on the device of the parameters.

    Raises:
        ProblemError: a parameter does not fit the others, or holds what is not finite; nothing was sent.
        SolveError: a problem has no solution, under `raise`.
        GradientError: in the backward pass, a problem has no gradient, under `raise`; or it was a second derivative
            that does not exist here.
    """
    given = {"Q": Q, "q": q, "G": G, "h": h, "A": A, "b": b, "lb": lb, "ub": ub, "entropy": _tau(entropy, q)}
    blocks = _solve(client, "qp", given, options, on_failure, gradients, timeout_s, request_id, warm_start)
    plain = QPSolution(*(blocks[name] for name in QPSolution._fields))
    if lb is None and ub is None:
        return plain
    empty = plain.z[..., :0]
    return BoundedQPSolution(*plain, blocks.get("lam_lb", empty), blocks.get("lam_ub", empty))


def solve_lp(
    client: Client,
    c: Float[Tensor, "*#batch n"],
    G: Float[Tensor, "*#batch m n"] | None = None,
    h: Float[Tensor, "*#batch m"] | None = None,
    A: Float[Tensor, "*#batch p n"] | None = None,
    b: Float[Tensor, "*#batch p"] | None = None,
    *,
    lb: Float[Tensor, "*#batch n"] | None = None,
    ub: Float[Tensor, "*#batch n"] | None = None,
    options: Options = _DEFAULTS,
    on_failure: OnFailure = "raise",
    gradients: Gradients = "adjoint",
    timeout_s: float | None = None,
    request_id: str | None = None,
    warm_start: WarmStart | None = None,
) -> QPSolution | BoundedQPSolution:
    """Solve minimise cᵀz subject to Az = b, Gz ≤ h, lb ≤ z ≤ ub, differentiably: `solve_qp` without Q, c its q.

    The solution is a vertex, and stays there while c moves a little: its gradient with respect to c is exactly zero,
    that of the multipliers is not, and neither are those with respect to G, h, A, b and the bounds. At a vertex in
    which more rows meet than there are variables the gradient is that of least norm across the dependent rows (flag
    `dependent`), and cotangents on the multipliers are refused. Where the solution is not unique (flag `nonunique`)
    the objective is exact, and there is no gradient.

    Args:
        client: Who solves.
        c: Costs.
        G: See `solve_qp`, as for the following.
        h: See there.
        A: See there.
        b: See there.
        lb: See there.
        ub: See there.
        options: See there.
        on_failure: See there.
        gradients: See there.
        timeout_s: See there.
        request_id: See there.
        warm_start: See there.

    Raises:
        ProblemError: see `solve_qp`; c is called `problem.q`.
        SolveError: see `solve_qp`.
        GradientError: see `solve_qp`.
    """
    return solve_qp(
        client,
        None,
        c,
        G,
        h,
        A,
        b,
        lb=lb,
        ub=ub,
        options=options,
        on_failure=on_failure,
        gradients=gradients,
        timeout_s=timeout_s,
        request_id=request_id,
        warm_start=warm_start,
    )


def solve_two_sided_qp(
    client: Client,
    P: Float[Tensor, "*#batch n n"] | None,
    q: Float[Tensor, "*#batch n"],
    A: Float[Tensor, "*#batch m n"] | None = None,
    l: Float[Tensor, "*#batch m"] | None = None,
    u: Float[Tensor, "*#batch m"] | None = None,
    *,
    options: Options = _DEFAULTS,
    on_failure: OnFailure = "raise",
    gradients: Gradients = "adjoint",
    timeout_s: float | None = None,
    request_id: str | None = None,
    warm_start: WarmStart | None = None,
) -> TwoSidedSolution:
    """Solve minimise ½xᵀPx + qᵀx subject to l ≤ Ax ≤ u, differentiably in all of them; see `solve_qp`.

    Args:
        client: Who solves.
        P: Like Q of `solve_qp`; None in a linear program.
        q: Linear term.
        A: Rows.
        l: Their lower bounds; −inf is none.
        u: Their upper bounds; +inf is none.
        options: See `solve_qp`, as for the following.
        on_failure: See there.
        gradients: See there.
        timeout_s: See there.
        request_id: See there.
        warm_start: See there.

    Raises:
        ProblemError: see `solve_qp`.
        SolveError: see `solve_qp`.
        GradientError: see `solve_qp`.
    """
    given = {"P": P, "q": q, "A": A, "l": l, "u": u}
    blocks = _solve(client, "qp_two_sided", given, options, on_failure, gradients, timeout_s, request_id, warm_start)
    return TwoSidedSolution(x=blocks["x"], y=blocks["y"])


def _solve(
    client: Client,
    kind: Kind,
    given: dict[str, Tensor | None],
    options: Options,
    on_failure: OnFailure,
    gradients: Gradients,
    timeout_s: float | None,
    request_id: str | None,
    warm_start: WarmStart | None,
) -> Blocks:
    if not isinstance(client, Client):
        raise ProblemError("client", type(client).__name__, "argrad.Client(…)")
    present = _present(given)
    is_sparse_problem = kind == "qp" and is_sparse(present)
    if torch.compiler.is_compiling() and not is_sparse_problem:
        return solve_in_graph(
            client,
            kind,
            present,
            options=options,
            on_failure=on_failure,
            timeout_s=timeout_s,
            request_id=request_id,
            start=warm_start,
        )
    check_choices(on_failure, gradients)
    if is_sparse_problem:
        return differentiable_sparse_solve(
            client,
            present,
            options=options,
            gradients=gradients,
            on_failure=on_failure,
            timeout_s=timeout_s,
            request_id=request_id,
        )
    return differentiable_solve(
        client,
        kind,
        present,
        options=options,
        gradients=gradients,
        on_failure=on_failure,
        timeout_s=timeout_s,
        request_id=request_id,
        start=warm_start,
    )


def _tau(entropy: Tensor | float | None, like: Tensor) -> Tensor | None:
    if entropy is None or isinstance(entropy, Tensor):
        return entropy
    return torch.tensor(entropy, dtype=like.dtype, device=like.device)


def _present(given: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The parameters that are given. Rows of which there are none count as absent if matrix and vectors agree on it."""
    present = {name: tensor for name, tensor in given.items() if tensor is not None}
    for name, tensor in present.items():
        if not isinstance(tensor, Tensor):
            raise ProblemError(f"problem.{name}", type(tensor).__name__, "a torch.Tensor")
    for matrix, vectors in _ROWS.items():
        sizes = {name: present[name].shape[-1:] for name in vectors if name in present}
        if matrix in present:
            sizes[matrix] = present[matrix].shape[-2:-1]
            if all(size == (0,) for size in sizes.values()):
                present = {name: tensor for name, tensor in present.items() if name not in sizes}
    return present

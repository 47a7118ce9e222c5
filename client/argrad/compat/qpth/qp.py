"""The names of `qpth.qp`: `QPFunction`, `QPSolvers` and `SpQPFunction`."""

from __future__ import annotations

from enum import Enum
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from argrad.client import Client
from argrad.compat.qpth.options import options_of, who_solves
from argrad.compat.qpth.sparse import SpQPFunction
from argrad.errors import ProblemError
from argrad.functional import solve_qp
from argrad.options import OnFailure, check_choices
from argrad.problems import check_names

__all__ = ["QPFunction", "QPSolvers", "SpQPFunction"]

_RANKS = {"Q": 2, "p": 1, "G": 2, "h": 1, "A": 2, "b": 1}


class QPSolvers(Enum):
    """Names that qpth has for its solvers; here each is the solver that `auto` chooses."""

    PDIPM_BATCHED = 1
    CVXPY = 2


class QPFunction:
    """argmin ½zᵀQz + pᵀz subject to Gz ≤ h, Az = b, of a batch, with the call signature of qpth 0.0.18.

    Args:
        eps: Tolerance on the scaled KKT residuals; below 1e-8 it counts as 1e-8, for what is solved ends on its exact
            active set anyway.
        verbose: Accepted, without effect: nothing is printed. A service has a log.
        notImprovedLim: Accepted, without effect.
        maxIter: Bound on iterations where it is above 100: a lower one is not a reason to fail.
        solver: A member of `QPSolvers`, or a name of `argrad.Client.solvers()`.
        check_Q_spd: Whether a Q that is not positive definite raises. Without it a semidefinite Q is solved; its
            gradient is refused where the solution is not unique. Not possible under `torch.func.vmap`.
        url: A client, or the address of a service, or `local`; by default what `argrad.configure` says, then the
            environment variable `ARGRAD_URL`, then the engine in this process.
        shared_gradients: `sum` gives a coefficient without batch dimension the sum of its gradients over the batch,
            which is its gradient; `mean` gives it qpth's, which is smaller by the factor 1/nBatch.
        on_failure: What happens to a problem without a solution; see `argrad.solve_qp`.
        timeout_s: Seconds for each solve and each backward; by default the client's.

    Raises:
        ProblemError: an argument cannot have that value.
    """

    def __init__(
        self,
        eps: float = 1e-12,
        verbose: bool | int = 0,  # noqa: ARG002 - qpth's signature
        notImprovedLim: int = 3,  # noqa: ARG002 - qpth's signature
        maxIter: int = 20,
        solver: QPSolvers | str = QPSolvers.PDIPM_BATCHED,
        check_Q_spd: bool = True,
        *,
        url: str | Client | None = None,
        shared_gradients: Literal["sum", "mean"] = "sum",
        on_failure: OnFailure = "raise",
        timeout_s: float | None = None,
    ) -> None:
        check_names("shared_gradients", [shared_gradients], ("sum", "mean"))
        check_choices(on_failure, "adjoint")
        if not isinstance(solver, QPSolvers | str):
            raise ProblemError("solver", repr(solver), "a member of QPSolvers, or the name of a solver")
        self._check_Q_spd, self._url = check_Q_spd, url
        self._shared_gradients = shared_gradients
        self._on_failure, self._timeout_s = on_failure, timeout_s
        self._options = options_of(solver if isinstance(solver, str) else "auto", eps, maxIter)

    def __call__(
        self,
        Q_: Float[Tensor, "*#batch nz nz"],
        p_: Float[Tensor, "*#batch nz"],
        G_: Float[Tensor, "*#batch nineq nz"] | None,
        h_: Float[Tensor, "*#batch nineq"] | None,
        A_: Float[Tensor, "*#batch neq nz"] | None,
        b_: Float[Tensor, "*#batch neq"] | None,
    ) -> Float[Tensor, "nBatch nz"]:
        """Solve; each coefficient with or without batch dimension, absent constraints as empty tensors of any dtype.

        Returns:
            z, always with a batch dimension, in the dtype and on the device of Q.

        Raises:
            RuntimeError: `Q is not SPD.`
            ProblemError: a coefficient does not fit the others.
            SolveError: a problem has no solution.
            GradientError: in the backward pass, a problem has no gradient.
        """
        pairs = zip(_RANKS, (Q_, p_, G_, h_, A_, b_), strict=True)
        # An empty tensor says "no such constraints", whatever its dtype, device and rank.
        given = {name: tensor for name, tensor in pairs if tensor is not None and tensor.numel()}
        batch = next((t.shape[0] for name, t in given.items() if t.ndim > _RANKS[name]), None)
        if self._check_Q_spd and not _is_spd(Q_):
            raise RuntimeError("Q is not SPD.")
        if self._shared_gradients == "mean" and batch is not None:
            given = {
                name: _averaged(tensor, batch) if tensor.ndim == _RANKS[name] else tensor
                for name, tensor in given.items()
            }
        z = solve_qp(
            who_solves(self._url),
            given.get("Q", Q_),
            given.get("p", p_),
            *(given.get(name) for name in ("G", "h", "A", "b")),
            options=self._options,
            on_failure=self._on_failure,
            timeout_s=self._timeout_s,
        ).z
        return z if batch is not None else z.unsqueeze(0)


def _is_spd(Q: Tensor) -> bool:
    """Whether symmetric parts are positive definite; what is no matrix of ours is left to the checks of a solve."""
    if Q.ndim not in (2, 3) or Q.shape[-1] != Q.shape[-2] or Q.dtype not in (torch.float32, torch.float64):
        return True
    Q = Q.detach()
    return not bool(torch.linalg.cholesky_ex(0.5 * (Q + Q.mT)).info.any())


class _Averaged(torch.autograd.Function):
    """The identity, with a gradient divided by the size of the batch."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, _: int) -> Tensor:
        return tensor.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Tensor) -> None:
        ctx.size = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.size, None


def _averaged(tensor: Tensor, size: int) -> Tensor:
    return cast("Tensor", _Averaged.apply(tensor, size))  # type: ignore[no-untyped-call]

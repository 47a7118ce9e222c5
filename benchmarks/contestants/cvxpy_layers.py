"""cvxpylayers, with diffcp, its default, and with moreau."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.contestants.base import TorchContestant
from benchmarks.workloads import TV_CURVATURE, TV_WEIGHT, Workload

_TIGHT = {
    "diffcp": {"eps": 1e-10, "max_iters": 100_000, "mode": "lsmr"},
    "moreau": {"ipm_settings": {"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11}},
}


class CvxpyLayers(TorchContestant):
    """`CvxpyLayer` of the problem as a user writes it, with parameters for what is differentiated or differs.

    Args:
        backend: `diffcp` or `moreau`.
        is_tight: Whether it has its tightest settings, or its own.
    """

    def __init__(self, backend: str = "diffcp", *, is_tight: bool = True) -> None:
        self.backend, self.is_tight = backend, is_tight

    def build(self, workload: Workload) -> None:
        import cvxpy as cp
        from cvxpylayers.torch import CvxpyLayer

        self.symbols: dict[str, Any] = {}
        objective, constraints, z = getattr(self, f"_{workload.kind}")(cp, workload)
        problem = cp.Problem(cp.Minimize(objective), constraints)
        self.layer: Any = CvxpyLayer(
            problem,
            parameters=list(self.symbols.values()),
            variables=[z],
            solver="MOREAU" if self.backend == "moreau" else None,
            solver_args=_TIGHT[self.backend] if self.is_tight else {},
        )

    def solve(self, given: Mapping[str, Tensor]) -> Float[Tensor, "batch n"]:
        if "Lt" in self.symbols:
            given = {**given, "Lt": torch.linalg.cholesky(given["Q"]).mT}
        if "low" in self.symbols:
            given = {**given, "low": torch.zeros_like(given["u"])}
        found = self.layer(*[given[name] for name in self.symbols])
        return found[0]  # type: ignore[no-any-return]

    def _part(self, cp: Any, workload: Workload, name: str) -> Any:
        """A parameter, or the value of what is one constant for the whole batch."""
        value = workload.parameters[name]
        if name not in workload.wrt and len(value) == 1:
            return value[0].numpy()
        self.symbols[name] = cp.Parameter(tuple(value.shape[1:]))
        return self.symbols[name]

    def _quadratic(self, cp: Any, workload: Workload, z: Any) -> Any:
        Q = workload.parameters["Q"]
        if "Q" not in workload.wrt and len(Q) == 1:
            return 0.5 * cp.quad_form(z, cp.psd_wrap(Q[0].numpy()))
        if self.backend == "moreau":
            self.symbols["Q"] = cp.Parameter(tuple(Q.shape[1:]), PSD=True)
            return 0.5 * cp.quad_form(z, self.symbols["Q"])
        self.symbols["Lt"] = cp.Parameter(tuple(Q.shape[1:]))  # a quadratic form in a parameter is not DPP for a cone
        return 0.5 * cp.sum_squares(self.symbols["Lt"] @ z)

    def _rows(self, cp: Any, workload: Workload, z: Any) -> list[Any]:
        rows = [self._part(cp, workload, "G") @ z <= self._part(cp, workload, "h")]
        if "A" in workload.parameters:
            rows.append(self._part(cp, workload, "A") @ z == self._part(cp, workload, "b"))
        return rows

    def _qp(self, cp: Any, workload: Workload) -> tuple[Any, list[Any], Any]:
        z = cp.Variable(workload.grad_z.shape[-1])
        objective = self._quadratic(cp, workload, z) + self._part(cp, workload, "q") @ z
        return objective, self._rows(cp, workload, z), z

    def _lp(self, cp: Any, workload: Workload) -> tuple[Any, list[Any], Any]:
        z = cp.Variable(workload.grad_z.shape[-1])
        return self._part(cp, workload, "q") @ z, self._rows(cp, workload, z), z

    def _softmax(self, cp: Any, workload: Workload) -> tuple[Any, list[Any], Any]:
        z = cp.Variable(workload.grad_z.shape[-1])
        return -self._part(cp, workload, "y") @ z - cp.sum(cp.entr(z)), self._rows(cp, workload, z), z

    def _sparsemax(self, cp: Any, workload: Workload) -> tuple[Any, list[Any], Any]:
        z = cp.Variable(workload.grad_z.shape[-1])
        objective = cp.sum_squares(z) - 2.0 * self._part(cp, workload, "y") @ z
        # The lower bound is a parameter, for with a constant in its place the moreau backend returns zeros.
        upper, self.symbols["low"] = self._part(cp, workload, "u"), cp.Parameter(z.shape)
        return objective, [cp.sum(z) == 1, z >= self.symbols["low"], z <= upper], z

    def _tv(self, cp: Any, workload: Workload) -> tuple[Any, list[Any], Any]:
        shape = tuple(workload.parameters["D"].shape)
        z, t = cp.Variable(shape[1]), cp.Variable(shape[0])
        y, D = cp.Parameter(shape[1]), cp.Parameter(shape)
        self.symbols |= {"y": y, "D": D}
        objective = 0.5 * cp.sum_squares(z) - y @ z + TV_WEIGHT * cp.sum(t) + 0.5 * TV_CURVATURE * cp.sum_squares(t)
        return objective, [D @ z <= t, -D @ z <= t], z

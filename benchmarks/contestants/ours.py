"""argrad's layers over the engine in this process, as a user calls them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

import argrad
from benchmarks.contestants.base import TorchContestant
from benchmarks.forms import as_qp
from benchmarks.workloads import Workload


class Argrad(TorchContestant):
    """A layer in process; a problem that it refuses counts as missed, not as a failure of the batch.

    Args:
        solver: Forward solver.
        method: Differentiation method.
        options: Further arguments of the layer.
    """

    def __init__(self, solver: str = "auto", method: str = "auto", **options: Any) -> None:
        self.options: dict[str, Any] = {"solver": solver, "method": method, "on_failure": "nan"} | options

    def build(self, workload: Workload) -> None:
        client = argrad.Client("local", timeout_s=None)
        layers = {"lp": argrad.nn.LPLayer, "softmax": argrad.nn.Softmax, "sparsemax": argrad.nn.Sparsemax}
        self.layer: Any = layers.get(workload.kind, argrad.nn.QPLayer)(client, **self.options)

    def solve(self, given: Mapping[str, Tensor]) -> Float[Tensor, "batch n"]:
        kind = self.workload.kind
        if kind == "softmax":
            found = self.layer(given["y"], given["A"], given["b"], given["G"], given["h"])
        elif kind == "lp":
            found = self.layer(given["q"], given["G"], given["h"], given.get("A"), given.get("b"))
        elif kind == "sparsemax":
            found = self.layer(given["y"][0], given["u"][0]).unsqueeze(
                0
            )  # without a batch the layer is a sparse problem
        else:
            rows = as_qp(kind, given)
            found = self.layer(rows.Q, rows.q, rows.G, rows.h, rows.A, rows.b)
        return found[..., : self.workload.grad_z.shape[-1]]  # type: ignore[no-any-return]

"""Exact solutions and gradients, to judge everybody by: independent of the engine, in plain NumPy and SciPy.

One problem at a time, on its exact active set, and whatever is returned has been checked against the optimality
conditions of the original data.
"""

from __future__ import annotations

from threadpoolctl import threadpool_limits

from benchmarks.reference import qp, special, vertex
from benchmarks.reference.truth import Truth
from benchmarks.workloads import Workload

__all__ = ["Truth", "exact"]

_ONE_THREAD_BELOW = 300
"""Variables; threads of the linear algebra cost more than they give on problems as small as this."""

_BY_KIND = {
    "qp": qp.exact,
    "tv": qp.exact_total_variation,
    "lp": vertex.exact,
    "sparsemax": special.exact_sparsemax,
    "softmax": special.exact_softmax,
}


def exact(workload: Workload) -> Truth:
    """Solve and differentiate each problem of the batch.

    Raises:
        ArithmeticError: the optimality conditions do not hold to 1e-9 at a point that was found.
    """
    is_small = workload.grad_z.shape[-1] < _ONE_THREAD_BELOW
    with threadpool_limits(limits=1 if is_small else None):
        return _BY_KIND[workload.kind](workload)

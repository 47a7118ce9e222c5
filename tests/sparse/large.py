"""One problem with 10 000 variables, forward and backward, in a process of its own: prints what it took as JSON."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

import argrad
from tests.sparse.problems import draw, moved, tensors, tracked, values_of


def main(solver: str) -> None:
    given = tensors(draw(n=10_000, m=5_000, p=1_000))
    leaves, options = tracked(given), argrad.Options(solver=solver)
    rng = np.random.default_rng(1)
    w, w_lam = (torch.from_numpy(rng.normal(size=size)) for size in (10_000, 5_000))
    with argrad.Client("local") as client:

        def loss(parameters):
            solution = argrad.solve_qp(client, **parameters, options=options)
            return (solution.z * w).sum() + (solution.lam * w_lam).sum()

        loss(leaves).backward()
        errors = {}
        for name, leaf in leaves.items():
            direction = torch.from_numpy(rng.normal(size=values_of(leaf).shape))
            ahead, behind = (loss(moved(given, name, direction, e)).item() for e in (1e-6, -1e-6))
            wanted = (values_of(leaf.grad) * direction).sum().item()
            errors[name] = abs((ahead - behind) / 2e-6 - wanted) / abs(wanted)
        from argrad_service.sparse.pool import WORKERS

        worker = sum(_peak_mb(pid) for pid in WORKERS.idle_pids)
    # Not ru_maxrss: a process that was forked and executed begins with its parent's.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024
    print(json.dumps({"peak_mb": peak, "worker_mb": worker, "errors": errors}))


def _peak_mb(pid: int) -> float:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    main(sys.argv[1])

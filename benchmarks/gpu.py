"""The engine on a GPU, with torch and NumPy and nothing else: `python benchmarks/gpu.py`.

Copy the checkout to a machine with CUDA and run it there; argrad need not be installed. It compares what the batched
torch solvers return on the device with the same on the CPU in float64, times them beside qpth on the same device (if it
can be imported) and beside the floor that no solver of this kind goes below, batched Cholesky factors of the same size,
in float64 and in float32 with refinement, and writes a results file.

Exit status: 0 if everything agreed (or there is no CUDA and none was asked for), 1 if something did not, or if
`--device cuda` finds no CUDA.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.bare import enter_checkout  # noqa: E402 - from the checkout, as all that follows

enter_checkout(ROOT)

from argrad.problems import QP  # noqa: E402
from argrad_service import engine  # noqa: E402
from benchmarks.workloads import Workload, optnet  # noqa: E402

AGREES_TO = 1e-8
"""Relative difference between device and CPU, in z and in every gradient, that counts as the same result."""

SOLVERS = ("auto", "pdipm", "admm")


def main(arguments: list[str]) -> int:
    """Run what the arguments ask for; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.device is None and not torch.cuda.is_available():
        print("This machine has no CUDA: nothing was measured. `--device cpu` runs the same on the CPU.")
        return 0
    device = torch.device(options.device or "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        print("--device cuda, and this machine has no CUDA: nothing was measured.")
        return 1
    sizes = ((10, 16), (50, 16)) if options.quick else ((10, 128), (50, 128), (100, 128), (100, 1024), (10, 4096))
    repeats = 3 if options.quick else 20
    results = _circumstances(device, options.seed)
    for n, batch in sizes:
        results["cases"].append(_case(optnet(n, batch, seed=options.seed), device, repeats))
        print(render(results["cases"][-1]), flush=True)
    agreed = all(row["agrees"] for case in results["cases"] for row in case["solvers"])
    results["agreed"] = agreed
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(
        f"{results['device']}: "
        + ("everything agrees with the CPU" if agreed else "NOT everything agrees with the CPU")
    )
    return 0 if agreed else 1


def render(case: dict[str, Any]) -> str:
    """One workload's lines."""
    lines = [f"{case['name']}: batched Cholesky {case['cholesky_float64_ms']:.3g} ms in float64, "
             f"{case['cholesky_float32_refined_ms']:.3g} ms in float32 with refinement "
             f"(to {case['cholesky_float32_refined_error']:.0e})"]  # fmt: skip
    for row in case["solvers"]:
        if "why" in row:
            lines.append(f"  {row['name']}: {row['why']}")
            continue
        differs = "" if row["difference"] is None else f", differs from the CPU by {row['difference']:.0e}"
        lines.append(
            f"  {row['name']}: forward {row['forward_ms']:.3g} ms, backward {row['backward_ms']:.3g} ms{differs}"
        )
    return "\n".join(lines)


def _case(workload: Workload, device: torch.device, repeats: int) -> dict[str, Any]:
    here = {name: value.to(device) for name, value in workload.parameters.items()}
    exact = _Solved(workload.parameters, workload.grad_z, "pdipm")
    rows = [_ours(name, here, workload.grad_z.to(device), exact, repeats) for name in SOLVERS]
    rows.append(_qpth(here, workload.grad_z.to(device), repeats))
    return {"name": workload.name, **_floor(here["Q"], here["q"], repeats), "solvers": rows}


class _Solved:
    """The engine's solution, and its adjoint, from which every gradient is formed by outer products."""

    def __init__(self, parameters: dict[str, Tensor], grad_z: Tensor, solver: str) -> None:
        self.problem, self.grad_z, self.solver = QP(**parameters), grad_z, solver
        self.forward()
        self.backward()

    def forward(self) -> None:
        self.outcome = engine.solve(self.problem, solver=self.solver, device=self.grad_z.device)

    def backward(self) -> None:
        self.adjoint = engine.vjp(self.outcome, {"z": self.grad_z}).adjoint

    def blocks(self) -> dict[str, Tensor]:
        solution, adjoint = self.outcome.solution, self.adjoint
        return {"z": solution.z.cpu(), "lam": solution.lam.cpu(), "d_z": adjoint.z.cpu(), "mu": adjoint.mu.cpu()}


def _ours(name: str, here: dict[str, Tensor], grad_z: Tensor, exact: _Solved, repeats: int) -> dict[str, Any]:
    row: dict[str, Any] = {"name": f"argrad {name}", "difference": None, "agrees": True}
    try:
        solved = _Solved(here, grad_z, name)
    except Exception as error:
        return row | {"why": f"failed: {type(error).__name__}: {error}", "agrees": False}
    wanted, found = exact.blocks(), solved.blocks()
    differences = [float(((found[k] - wanted[k]).norm(dim=1) / wanted[k].norm(dim=1)).max()) for k in ("z", "d_z")]
    differences += [float((found[k] - wanted[k]).norm() / (1 + wanted[k].norm())) for k in ("lam", "mu")]
    worst = max(differences) if all(d == d for d in differences) else float("inf")
    row |= {"difference": worst, "agrees": worst <= AGREES_TO}
    forward = _median_ms(solved.forward, grad_z.device, repeats)
    backward = _median_ms(solved.backward, grad_z.device, repeats)
    return row | {"forward_ms": forward, "backward_ms": backward}


def _qpth(here: dict[str, Tensor], grad_z: Tensor, repeats: int) -> dict[str, Any]:
    row: dict[str, Any] = {"name": "qpth", "difference": None, "agrees": True}
    try:
        function: Any = importlib.import_module("qpth.qp").QPFunction(verbose=-1)
    except ImportError as error:
        return row | {"why": f"not measured ({error})"}
    leaves = [here[name].clone().requires_grad_() for name in ("Q", "q", "G", "h")]
    absent = torch.empty(0, dtype=grad_z.dtype, device=grad_z.device)
    state: dict[str, Tensor] = {}

    def forward() -> None:
        state["z"] = function(*leaves, absent, absent)

    def backward() -> None:
        torch.autograd.grad((state["z"] * grad_z).sum(), leaves, retain_graph=True)

    try:
        times = {"forward_ms": _median_ms(forward, grad_z.device, repeats)}
        return row | times | {"backward_ms": _median_ms(backward, grad_z.device, repeats)}
    except RuntimeError as error:
        return row | {"why": f"failed: {error}".splitlines()[0][:200]}


def _floor(Q: Tensor, q: Tensor, repeats: int) -> dict[str, float]:
    """What one batched factor and solve of the size costs, in float64, and in float32 refined twice to float64."""
    right = q.unsqueeze(-1)

    def refined() -> Tensor:
        factor = torch.linalg.cholesky(Q.float())
        z = torch.cholesky_solve(right.float(), factor).double()
        for _ in range(2):
            z = z + torch.cholesky_solve((right - Q @ z).float(), factor).double()
        return z

    def exact() -> Tensor:
        return torch.cholesky_solve(right, torch.linalg.cholesky(Q))

    try:
        error = float((refined() - exact()).norm() / exact().norm())
        refined_ms = _median_ms(refined, Q.device, repeats)
    except RuntimeError:  # in float32 a Q of condition 1e7 need not be positive definite
        error, refined_ms = float("inf"), float("nan")
    return {
        "cholesky_float64_ms": _median_ms(exact, Q.device, repeats),
        "cholesky_float32_refined_ms": refined_ms,
        "cholesky_float32_refined_error": error,
    }


def _median_ms(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of so many runs after one that is not counted; waits for the device."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append((time.perf_counter() - start) * 1e3)
    return median(taken[1:])


def _circumstances(device: torch.device, seed: int) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": name,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "seed": seed,
        "cases": [],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Correctness and times of the engine on a GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="by default cuda, if there is one")
    parser.add_argument("--quick", action="store_true", help="small batches and few repeats: whether it works")
    parser.add_argument("--seed", type=int, default=0, help="of the random problems")
    parser.add_argument("--out", type=Path, help="results file")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

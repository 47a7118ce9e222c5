"""`make bench-serving`: a training step through argrad, through Tesseract and in process; then many callers at once."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import requests
import torch
from torch import Tensor

import argrad
from benchmarks.machine import ROOT, circumstances, load
from benchmarks.measures import elapsed_ms
from benchmarks.serving import callers
from benchmarks.workloads import Workload, optnet, two_variables
from examples.with_service import free_port

START_TIMEOUT_S = 60.0
PARAMETERS = ("Q", "q", "G", "h", "A", "b")

Step = Callable[[], list[Tensor]]


def main(arguments: list[str]) -> int:
    """Measure, print a table, write a results file; returns the exit status."""
    options = _parser().parse_args(arguments)
    url = os.environ.get("ARGRAD_URL")
    if not url:
        print("ARGRAD_URL names no service: run `make bench-serving`", file=sys.stderr)
        return 2
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    batch, blocks = (16, 3) if options.quick else (128, 10)
    results: dict[str, Any] = {"is_quick": options.quick, **circumstances(), "seed": seed, "steps": []}
    results["versions"] |= {name: version(name) for name in ("tesseract-core", "tesseract-torch")}
    cases = ((two_variables(), 50), (optnet(100, batch, seed=seed), 5))
    with _tesseract() as served, argrad.Client(url) as remote, argrad.Client("local") as local:
        for workload, block in cases:
            print(workload.name, file=sys.stderr)
            steps = {
                "in process": _layer_step(workload, local),
                "argrad remote": _layer_step(workload, remote),
                "Tesseract": _tesseract_step(workload, served),
            }
            results["steps"].append(_time(workload, steps, block=block, blocks=blocks))
    results["callers"] = callers.measure(seed, seconds=1.0 if options.quick else 5.0, rounds=1 if options.quick else 5)
    results["machine"]["load_at_end"] = load()
    target = options.out or _default_target(results)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")
    print(render(results) + "\n\n" + callers.render(results["callers"]))
    print(f"written to {target}", file=sys.stderr)
    return 0


def render(results: dict[str, Any]) -> str:
    """The table: medians of forward + backward, and how many times argrad's remote step each takes."""
    lines = [
        "Forward + backward through autograd, every parameter sent, every gradient formed; median (least) of a step.",
        "",
        "| problem | who | ms | ratio to argrad remote | gradient differs by |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for step in results["steps"]:
        own = step["who"]["argrad remote"]["median_ms"]
        for who, row in step["who"].items():
            times = f"{row['median_ms']:.3g} ({row['least_ms']:.3g})"
            lines.append(f"| {step['name']} | {who} | {times} | {row['median_ms'] / own:.2f} | {row['differs']:.0e} |")
    return "\n".join(lines)


def _time(workload: Workload, steps: dict[str, Step], *, block: int, blocks: int) -> dict[str, Any]:
    """Blocks of steps in turns; what each returns is compared with the step in process."""
    answers = {who: step() for who, step in steps.items()}
    exact = answers["in process"]
    scale = torch.stack([g.norm() for g in exact]).norm()
    taken: dict[str, list[float]] = {who: [] for who in steps}
    for _ in range(blocks):
        for who, step in steps.items():
            taken[who] += [elapsed_ms(step) for _ in range(block)]
    found = {}
    for who, times in taken.items():
        differs = max(float((a - b).norm() / scale) for a, b in zip(answers[who], exact, strict=True))
        found[who] = {"median_ms": median(times), "least_ms": min(times), "repeats": len(times), "differs": differs}
    return {"name": workload.name, "who": found}


def _leaves(workload: Workload) -> dict[str, Tensor]:
    return {k: workload.parameters[k].clone().requires_grad_() for k in PARAMETERS if k in workload.parameters}


def _layer_step(workload: Workload, client: argrad.Client) -> Step:
    layer, leaves = argrad.nn.QPLayer(client), _leaves(workload)
    arguments = [leaves.get(name) for name in PARAMETERS]

    def step() -> list[Tensor]:
        z = layer(*arguments)
        return list(torch.autograd.grad((z * workload.grad_z).sum(), list(leaves.values())))

    return step


def _tesseract_step(workload: Workload, served: Any) -> Step:
    from tesseract_torch import apply_tesseract

    leaves = _leaves(workload)
    is_single = leaves["q"].dim() == 1
    batch, n = (1, *leaves["q"].shape) if is_single else leaves["q"].shape
    empty = {"A": torch.zeros(batch, 0, n).double().numpy(), "b": torch.zeros(batch, 0).double().numpy()}

    def step() -> list[Tensor]:
        given = {name: leaf.unsqueeze(0) if is_single else leaf for name, leaf in leaves.items()}
        z = apply_tesseract(served, {**empty, **given})["z"]
        return list(torch.autograd.grad((z * workload.grad_z).sum(), list(leaves.values())))

    return step


@contextmanager
def _tesseract() -> Iterator[Any]:
    """`tesseract-runtime serve` on a free port, without a container."""
    from tesseract_core import Tesseract

    port = free_port()
    environment = os.environ | {"TESSERACT_API_PATH": str(Path(__file__).with_name("tesseract_api.py"))}
    command = [str(Path(sys.executable).with_name("tesseract-runtime")), "serve", "--port", str(port)]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError("no Tesseract: " + log.read().decode(errors="replace")[-600:])
                time.sleep(0.2)
            yield Tesseract.from_url(f"http://127.0.0.1:{port}")
        finally:
            process.terminate()
            process.wait(20)


def _answers(port: int) -> bool:
    try:
        return bool(requests.get(f"http://127.0.0.1:{port}/health", timeout=2.0).ok)
    except requests.ConnectionError:
        return False


def _default_target(results: dict[str, Any]) -> Path:
    folder = ".cache/bench-trials" if results["is_quick"] else "benchmarks/results/serving"
    return ROOT / folder / f"{results['date'][:10]}-{results['commit'].rstrip('+')}-serving.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small batch and few repeats: whether it works")
    parser.add_argument("--seed", type=int, help="of the random problems; drawn afresh by default, and recorded")
    parser.add_argument("--out", type=Path, help="results file")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

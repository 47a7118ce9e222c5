"""A training step, forward + backward through autograd: in process, through argrad's service, and through Tesseract."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch
from torch import Tensor

import argrad
from benchmarks.measures import elapsed_ms
from benchmarks.serving.services import serving
from benchmarks.workloads import Workload, optnet, two_variables
from examples.with_service import free_port

_START_TIMEOUT_S = 60.0
_PARAMETERS = ("Q", "q", "G", "h", "A", "b")
IN_PROCESS, REMOTE, UNIX, TESSERACT = "in process", "argrad remote", "argrad remote, unix socket", "Tesseract"
SMALL, LARGE, REGISTERED = "two variables", "large", "large, registered"

Step = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """A workload, and which of its parameters need no gradient: those are registered, and are not sent."""

    key: str
    name: str
    workload: Workload
    constant: tuple[str, ...] = ()
    block: int = 5


def cases(seed: int, *, batch: int) -> list[Case]:
    """One problem of two variables; and a batch whose parameters are all sent, or of which only q is."""
    small, large = two_variables(), optnet(100, batch, seed=seed)
    return [
        Case(SMALL, small.name, small, block=50),
        Case(LARGE, large.name, large),
        Case(REGISTERED, f"{large.name}; Q, G, h registered", large, ("Q", "G", "h")),
    ]


def measure(url: str, seed: int, *, batch: int, blocks: int) -> list[dict[str, Any]]:
    """Medians of every case, who takes part taking turns.

    Args:
        url: Of argrad's service.
        seed: Of the problems.
        batch: Of the large case.
        blocks: Turns of each.
    """
    found = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        unix = stack.enter_context(serving(uds=folder / "argrad.sock"))
        served = stack.enter_context(_tesseract())
        targets = {IN_PROCESS: "local", REMOTE: url, UNIX: unix}
        clients = {who: stack.enter_context(argrad.Client(target)) for who, target in targets.items()}
        for case in cases(seed, batch=batch):
            print(case.name, file=sys.stderr)
            steps = {who: _layer_step(case, client) for who, client in clients.items()}
            if not case.constant:
                steps[TESSERACT] = _tesseract_step(case.workload, served)
            found.append({"key": case.key, "name": case.name, "who": _time(steps, block=case.block, blocks=blocks)})
    return found


def render(found: list[dict[str, Any]]) -> str:
    """The table: medians of a step, and what each takes beyond the step in process."""
    lines = [
        "Forward + backward through autograd; median (least) of a step, and what the median has over that in process.",
        "Every parameter is sent and every gradient formed, except where constants are registered.",
        "",
        "| problem | who | ms | overhead ms | gradient differs by |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for case in found:
        for who, row in case["who"].items():
            times, over = f"{row['median_ms']:.3g} ({row['least_ms']:.3g})", overhead_ms(case, who)
            extra = "" if who == IN_PROCESS else f"{over:.3g}"
            lines.append(f"| {case['name']} | {who} | {times} | {extra} | {row['differs']:.0e} |")
    return "\n".join(lines)


def overhead_ms(case: Mapping[str, Any], who: str) -> float:
    """How much longer the median of a step is than in process."""
    return float(case["who"][who]["median_ms"] - case["who"][IN_PROCESS]["median_ms"])


def _time(steps: dict[str, Step], *, block: int, blocks: int) -> dict[str, dict[str, float]]:
    """Blocks of steps in turns; what each returns is compared with the step in process."""
    answers = {who: step() for who, step in steps.items()}
    exact = answers[IN_PROCESS]
    scale = torch.stack([g.norm() for g in exact]).norm()
    taken: dict[str, list[float]] = {who: [] for who in steps}
    for _ in range(blocks):
        for who, step in steps.items():
            taken[who] += [elapsed_ms(step) for _ in range(block)]
    found = {}
    for who, times in taken.items():
        differs = max(float((a - b).norm() / scale) for a, b in zip(answers[who], exact, strict=True))
        found[who] = {"median_ms": median(times), "least_ms": min(times), "repeats": len(times), "differs": differs}
    return found


def _leaves(workload: Workload, names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: workload.parameters[name].clone().requires_grad_() for name in names if name in workload.parameters}


def _layer_step(case: Case, client: argrad.Client) -> Step:
    layer = argrad.nn.QPLayer(client)
    leaves = _leaves(case.workload, tuple(name for name in _PARAMETERS if name not in case.constant))
    given: dict[str, Tensor] = dict(leaves)
    if case.constant:
        constants: dict[str, Any] = {name: case.workload.parameters[name] for name in case.constant}
        given |= client.register(**constants)
    arguments = [given.get(name) for name in _PARAMETERS]

    def step() -> list[Tensor]:
        z = layer(*arguments)
        return list(torch.autograd.grad((z * case.workload.grad_z).sum(), list(leaves.values())))

    return step


def _tesseract_step(workload: Workload, served: Any) -> Step:
    from tesseract_torch import apply_tesseract

    leaves = _leaves(workload, _PARAMETERS)
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
            deadline = time.monotonic() + _START_TIMEOUT_S
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
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=2.0, trust_env=False).is_success
    except httpx.TransportError:
        return False

"""A training step, forward + backward through autograd: in process, through argrad's service, and through Tesseract.

Of the large problems every step takes other data than the one before, so that what is said to be sent is new to the
service; the service's own count of bytes says whether it was sent.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from benchmarks.serving.services import plain_client, serving
from benchmarks.workloads import Workload, optnet, two_variables
from examples.with_service import free_port

_START_TIMEOUT_S = 60.0
_DRAWS = 3
_PARAMETERS = ("Q", "q", "G", "h", "A", "b")
IN_PROCESS, REMOTE, UNIX, TESSERACT = "in process", "argrad remote", "argrad remote, unix socket", "Tesseract"
SMALL, LARGE, REGISTERED = "two variables", "large", "large, registered"

Step = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """Workloads that steps take in turn, and which parameters of the first stay: those are registered, and not sent."""

    key: str
    name: str
    draws: tuple[Workload, ...]
    constant: tuple[str, ...] = ()
    block: int = 5


def cases(seed: int, *, batch: int) -> list[Case]:
    """One problem of two variables; and a batch whose parameters are all sent, or of which only q is."""
    small, large = two_variables(), tuple(optnet(100, batch, seed=seed + i) for i in range(_DRAWS))
    name = large[0].name
    return [
        Case(SMALL, small.name, (small,), block=50),
        Case(LARGE, name, large),
        Case(REGISTERED, f"{name}; Q, G, h registered", large, ("Q", "G", "h")),
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
                steps[TESSERACT] = _tesseract_step(case.draws, served)
            timed = _time(steps, targets, block=case.block, blocks=blocks)
            found.append({"key": case.key, "name": case.name, "who": timed})
    return found


def render(found: list[dict[str, Any]]) -> str:
    """The table: medians of a step, and what each takes beyond the step in process."""
    lines = [
        "Forward + backward through autograd; median (least) of a step, and what the median has over that in process.",
        "Every parameter is sent and every gradient formed, except where constants are registered.",
        "",
        "| problem | who | ms | overhead ms | sent MB | gradient differs by |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for case in found:
        for who, row in case["who"].items():
            times, over = f"{row['median_ms']:.3g} ({row['least_ms']:.3g})", overhead_ms(case, who)
            extra = "" if who == IN_PROCESS else f"{over:.3g}"
            sent = "" if row["sent_bytes"] is None else f"{1e-6 * row['sent_bytes']:.3g}"
            lines.append(f"| {case['name']} | {who} | {times} | {extra} | {sent} | {row['differs']:.0e} |")
    return "\n".join(lines)


def overhead_ms(case: Mapping[str, Any], who: str) -> float:
    """How much longer the median of a step is than in process."""
    return float(case["who"][who]["median_ms"] - case["who"][IN_PROCESS]["median_ms"])


def _time(
    steps: dict[str, Step], targets: Mapping[str, str], *, block: int, blocks: int
) -> dict[str, dict[str, float | None]]:
    """Blocks of steps in turns; what each returns is compared with the step in process."""
    answers = {who: step() for who, step in steps.items()}
    exact = answers[IN_PROCESS]
    scale = torch.stack([g.norm() for g in exact]).norm()
    taken: dict[str, list[float]] = {who: [] for who in steps}
    before = {who: _received_bytes(targets.get(who)) for who in steps}
    for _ in range(blocks):
        for who, step in steps.items():
            taken[who] += [elapsed_ms(step) for _ in range(block)]
    found = {}
    for who, times in taken.items():
        differs = max(float((a - b).norm() / scale) for a, b in zip(answers[who], exact, strict=True))
        after, start = _received_bytes(targets.get(who)), before[who]
        found[who] = {
            "median_ms": median(times),
            "least_ms": min(times),
            "repeats": len(times),
            "sent_bytes": None if after is None or start is None else (after - start) / len(times),
            "differs": differs,
        }
    return found


def _received_bytes(target: str | None) -> float | None:
    """Bytes of request bodies that a service of ours has received so far; None of anyone else."""
    if target is None or target == "local":
        return None
    with plain_client(target) as client:
        counts = re.findall(r'^argrad_body_bytes_total\{direction="in",.*\} (\S+)$', client.get("/metrics").text, re.M)
    return sum(map(float, counts))


def _leaves(workload: Workload, names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: workload.parameters[name].clone().requires_grad_() for name in names if name in workload.parameters}


def _layer_step(case: Case, client: argrad.Client) -> Step:
    layer = argrad.nn.QPLayer(client)
    constants: dict[str, Any] = {name: case.draws[0].parameters[name] for name in case.constant}
    fixed = client.register(**constants) if constants else {}
    names = tuple(name for name in _PARAMETERS if name not in constants)
    turns = itertools.cycle([(_leaves(workload, names), workload.grad_z) for workload in case.draws])

    def step() -> list[Tensor]:
        leaves, grad_z = next(turns)
        given = {**leaves, **fixed}
        z = layer(*(given.get(name) for name in _PARAMETERS))
        return list(torch.autograd.grad((z * grad_z).sum(), list(leaves.values())))

    return step


def _tesseract_step(draws: Sequence[Workload], served: Any) -> Step:
    from tesseract_torch import apply_tesseract

    turns = itertools.cycle([(_leaves(workload, _PARAMETERS), workload.grad_z) for workload in draws])
    q = draws[0].parameters["q"]
    is_single = q.dim() == 1
    batch, n = (1, *q.shape) if is_single else q.shape
    empty = {"A": torch.zeros(batch, 0, n).double().numpy(), "b": torch.zeros(batch, 0).double().numpy()}

    def step() -> list[Tensor]:
        leaves, grad_z = next(turns)
        given = {name: leaf.unsqueeze(0) if is_single else leaf for name, leaf in leaves.items()}
        z = apply_tesseract(served, {**empty, **given})["z"]
        return list(torch.autograd.grad((z * grad_z).sum(), list(leaves.values())))

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

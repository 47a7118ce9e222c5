"""How much memory one large request takes: the peak of the service's process over what it held before."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from argrad.problems import QP
from argrad.wire import SAFETENSORS, encode
from argrad.wire.messages import SolveRequest
from argrad_service.admission import Size
from benchmarks.serving.services import IDENTITY, SERVE, plain_client, running
from benchmarks.workloads import Workload, optnet

NO_SOLVER, SOLVED = "no solver, adjoint", "auto, full gradients"
_TIMEOUT_S = 60.0
_WARM = 2


def measure(seed: int, *, batch: int) -> list[dict[str, Any]]:
    """Peaks of a service that only reads and answers, and of one that solves and forms every gradient.

    Args:
        seed: Of the problems.
        batch: Problems of the request, n = m = 100.
    """
    print("memory", file=sys.stderr)
    workload, small = optnet(100, batch, seed=seed), optnet(100, _WARM, seed=seed)
    requests = {NO_SOLVER: (IDENTITY, SolveRequest(gradients="adjoint")), SOLVED: (SERVE, SolveRequest())}
    found = []
    for key, (module, request) in requests.items():
        with running(module) as (url, pid), plain_client(url) as client:
            client.timeout = _TIMEOUT_S

            def ask(of: Workload, request: SolveRequest = request) -> int:
                tensors = {f"problem.{k}": t for k, t in of.parameters.items()} | {"upstream.z": of.grad_z}
                body = b"".join(encode(request, tensors, SAFETENSORS))
                client.post("/v1/solve", content=body, headers={"content-type": SAFETENSORS}).raise_for_status()
                return len(body)

            ask(small)
            # The kernel's mark begins anew at what is held now (proc(5), clear_refs).
            Path(f"/proc/{pid}/clear_refs").write_text("5")
            before = _kilobytes(pid, "VmRSS")
            nbytes = ask(workload)
            peak = 1024 * (_kilobytes(pid, "VmHWM") - before)
        workspace = 0 if key == NO_SOLVER else Size.of(QP(**workload.parameters).parameters()).work_bytes
        row = {"key": key, "name": f"{workload.name}; {key}", "body_bytes": nbytes, "peak_bytes": peak}
        found.append(row | {"workspace_bytes": workspace})
    return found


def render(found: Sequence[Mapping[str, Any]]) -> str:
    """The table of the peaks."""
    lines = [
        "Memory of one request: the process's peak over what it held before; MB.",
        "",
        "| request | body | peak | documented workspace | peak to twice the body and the workspace |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in found:
        sizes = " | ".join(f"{row[name] / 1e6:.1f}" for name in ("body_bytes", "peak_bytes", "workspace_bytes"))
        lines.append(f"| {row['name']} | {sizes} | {share_of(row):.2f} |")
    return "\n".join(lines)


def share_of(row: Mapping[str, Any]) -> float:
    """The peak as a multiple of what it may be."""
    return float(row["peak_bytes"] / (2 * row["body_bytes"] + row["workspace_bytes"]))


def _kilobytes(pid: int, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"the system does not tell {name}")
    return int(found[1])

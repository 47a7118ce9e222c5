"""Where and with what a result was measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants.field import installed_versions

ROOT = Path(__file__).parents[1]


def circumstances() -> dict[str, Any]:
    """Date, commit, machine and versions, as the results file holds them."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "torch_threads": torch.get_num_threads(),
            "load_at_start": load(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version(), **installed_versions()},
    }


def write_results(results: Mapping[str, Any], folder: str, name: str, *, is_trial: bool, out: Path | None) -> Path:
    """Write a results file of its day and commit.

    Args:
        results: With `date` and `commit` of `circumstances`.
        folder: Of `benchmarks/results`.
        name: End of the file's name.
        is_trial: Whether it is kept among trials instead.
        out: Another place.
    """
    place = ROOT / (".cache/bench-trials" if is_trial else f"benchmarks/results/{folder}")
    target = out or place / f"{results['date'][:10]}-{results['commit'].rstrip('+')}-{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")
    return target


def load() -> float:
    """How many processes wanted to run during the last minute."""
    return round(os.getloadavg()[0], 2)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _commit() -> str:
    """Short hash, with `+` if the tree has changes; `unknown` outside a repository."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=10", "--dirty=+"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()

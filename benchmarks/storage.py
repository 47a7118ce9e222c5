"""Workloads and answers as files, on their way between processes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch

from benchmarks.contestants.base import Answer
from benchmarks.workloads import Workload


def save_workload(workload: Workload, path: str | Path) -> None:
    """Write it where `load_workload` will read it."""
    torch.save({field.name: getattr(workload, field.name) for field in fields(workload)}, path)


def load_workload(path: str | Path) -> Workload:
    """Read what `save_workload` wrote."""
    return Workload(**torch.load(path, weights_only=True))


def save_answer(answer: Answer, path: str | Path) -> None:
    """Write it where `load_answer` will read it."""
    torch.save({"z": answer.z, "gradients": answer.gradients}, path)


def load_answer(path: str | Path) -> Answer:
    """Read what `save_answer` wrote."""
    return Answer(**torch.load(path, weights_only=True))

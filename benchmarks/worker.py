"""One contestant in a process of its own: `python -m benchmarks.worker SPECIFICATION`, driven by `runner.py`.

Commands come as lines of JSON on standard input, and each is answered by one line; what libraries print goes to
standard error. A contestant that fails, or is ended because it hangs, takes nobody with it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
from typing import Any

import torch

from benchmarks.contestants.base import Contestant
from benchmarks.storage import load_workload, save_answer


def main(specification: str) -> None:
    """Serve commands until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    contestant = _create(**json.loads(specification))
    replies.write("{}\n")
    for line in sys.stdin:
        try:
            reply = _serve(contestant, **json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}".strip()[:300]}
        replies.write(json.dumps(reply) + "\n")


def _create(factory: str, arguments: dict[str, Any]) -> Contestant:
    module, _, name = factory.partition(":")
    made: Contestant = getattr(importlib.import_module(f"benchmarks.contestants.{module}"), name)(**arguments)
    return made


def _serve(contestant: Contestant, *, do: str, path: str = "", least_ms: float = 0.0) -> dict[str, Any]:
    if do == "prepare":
        contestant.prepare(load_workload(path))
        gc.collect()
    elif do == "turn":
        return _turn(contestant, least_ms)
    elif do == "answer":
        save_answer(contestant.answer(), path)
    elif do == "release":
        vars(contestant).pop("workload", None)
        for name in ("leaves", "given", "layer", "engine", "z", "found", "symbols"):
            vars(contestant).pop(name, None)
        gc.collect()
    return {}


def _turn(contestant: Contestant, least_ms: float) -> dict[str, list[float]]:
    """Forward and backward again and again for so long, at least once; milliseconds of each."""
    forward: list[float] = []
    backward: list[float] = []
    while sum(forward) + sum(backward) < least_ms or not forward:
        start = time.perf_counter()
        contestant.forward()
        middle = time.perf_counter()
        contestant.backward()
        forward.append((middle - start) * 1e3)
        backward.append((time.perf_counter() - middle) * 1e3)
    return {"forward": forward, "backward": backward}


if __name__ == "__main__":
    main(sys.argv[1])

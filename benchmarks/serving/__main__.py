"""`make bench-serving`: steps beside Tesseract, callers at once, probes under load, overload without a cache."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import secrets
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, circumstances, load
from benchmarks.serving import callers, loads, memory, training
from benchmarks.serving.figures import figures, render

PARTS = ("steps", "callers", "liveness", "overload", "memory")


def main(arguments: list[str]) -> int:
    """Measure, print tables, write a results file; returns the exit status."""
    options = _parser().parse_args(arguments)
    url = os.environ.get("ARGRAD_URL")
    if not url:
        print("ARGRAD_URL names no service: run `make bench-serving`", file=sys.stderr)
        return 2
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    results: dict[str, Any] = {"is_quick": options.quick, **circumstances(), "seed": seed}
    results["versions"] |= {name: version(name) for name in ("tesseract-core", "tesseract-torch")}
    measures, renders = _measures(url, seed, is_quick=options.quick), _renders()
    for part in options.parts:
        results[part] = measures[part]()
    results["machine"]["load_at_end"] = load()
    tables = [renders[part](results[part]) for part in options.parts]
    if len(options.parts) == len(PARTS):
        found = list(figures(results))
        results["figures"] = [dataclasses.asdict(figure) | {"is_met": figure.is_met} for figure in found]
        tables.append(render(found))
    target = options.out or _default_target(results)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")
    print("\n\n".join(tables))
    print(f"written to {target}", file=sys.stderr)
    return 0


def _measures(url: str, seed: int, *, is_quick: bool) -> dict[str, Callable[[], list[dict[str, Any]]]]:
    batch, blocks = (16, 3) if is_quick else (128, 10)
    seconds, rounds = (1.0, 1) if is_quick else (5.0, 5)
    return {
        "steps": lambda: training.measure(url, seed, batch=batch, blocks=blocks),
        "callers": lambda: callers.measure(seed, seconds=seconds, rounds=rounds),
        "liveness": lambda: loads.measure_liveness(seed, seconds=2 * seconds, batch=batch),
        "overload": lambda: loads.measure_overload(seed, seconds=2 * seconds, rounds=min(rounds, 3)),
        "memory": lambda: memory.measure(seed, batch=batch),
    }


def _renders() -> dict[str, Callable[[Any], str]]:
    return {
        "steps": training.render,
        "callers": callers.render,
        "liveness": loads.render_liveness,
        "overload": loads.render_overload,
        "memory": memory.render,
    }


def _default_target(results: dict[str, Any]) -> Path:
    is_trial = results["is_quick"] or "figures" not in results
    folder = ".cache/bench-trials" if is_trial else "benchmarks/results/serving"
    return ROOT / folder / f"{results['date'][:10]}-{results['commit'].rstrip('+')}-serving.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small batch and few repeats: whether it works")
    parser.add_argument(
        "--parts",
        type=_parts,
        default=PARTS,
        help=f"some of {','.join(PARTS)}; the figures need all",
    )
    parser.add_argument("--seed", type=int, help="of the random problems; drawn afresh by default, and recorded")
    parser.add_argument("--out", type=Path, help="results file")
    return parser


def _parts(text: str) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(text.split(",")))
    if unknown := [part for part in chosen if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(PARTS)}")
    return chosen


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

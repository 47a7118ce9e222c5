"""`make fuzz`: every target, a table at the end, and the inputs of all findings under .cache/fuzz."""

from __future__ import annotations

import argparse
import faulthandler
import sys
from pathlib import Path

from argrad.wire import JSON, SAFETENSORS
from tests.fuzz.api import fuzz_api
from tests.fuzz.calls import fuzz_calls
from tests.fuzz.codec import fuzz_frames, fuzz_messages
from tests.fuzz.framing import fuzz_framing
from tests.fuzz.keys import WHO, fuzz_keys
from tests.fuzz.tally import Tally, table

FOLDER = Path(".cache/fuzz")
LEAST_INPUTS = 200_000
"""Of a run at scale 1; fewer are a defect of the targets."""
MOST_SILENT_S = 600.0
"""Native code that hangs is deaf to the clocks of the targets; the run then ends with all tracebacks."""


def run(scale: float, seed: int) -> list[Tally]:
    """All targets, one after the other.

    Args:
        scale: Inputs, as a multiple of the usual: 215 000 to the codecs, 26 000 calls, 10 000 connections.
        seed: Of all chance, but for schemathesis' own.
    """
    targets = [
        lambda: fuzz_messages(JSON, int(90_000 * scale), seed),
        lambda: fuzz_messages(SAFETENSORS, int(90_000 * scale), seed + 1),
        lambda: fuzz_messages(JSON, int(10_000 * scale), seed + 2, of_replies=True),
        lambda: fuzz_messages(SAFETENSORS, int(10_000 * scale), seed + 3, of_replies=True),
        lambda: fuzz_frames(int(15_000 * scale), seed + 4),
        lambda: fuzz_calls(int(20_000 * scale), seed + 5),
        lambda: fuzz_keys(int(6_000 * scale), seed + 6),
        lambda: fuzz_framing(int(8_000 * scale), seed + 7),
        lambda: fuzz_framing(int(2_000 * scale), seed + 8, with_keys=True),
        lambda: fuzz_api(max(1, int(60 * scale)), seed + 9),
        *(lambda who=who: fuzz_api(max(1, int(12 * scale)), seed + 10, who=who) for who in WHO),  # type: ignore[misc]
    ]
    tallies = []
    for target in targets:
        faulthandler.dump_traceback_later(MOST_SILENT_S * max(1.0, scale), exit=True)
        tallies.append(target())
        print(f"{tallies[-1].name}: {tallies[-1].inputs} inputs, {len(tallies[-1].findings)} findings", flush=True)
    faulthandler.cancel_dump_traceback_later()
    return tallies


def main() -> int:
    """Exit status: 1 where something was found."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="inputs, as a multiple of the usual")
    parser.add_argument("--seed", type=int, default=0, help="of all chance")
    given = parser.parse_args()
    tallies = run(given.scale, given.seed)
    inputs = sum(one.inputs for one in tallies)
    print(f"\n{table(tallies)}\n\n{inputs} inputs, seed {given.seed}")
    for one in tallies:
        for path in one.save(FOLDER):
            print(f"{one.name}: {path}: {path.with_suffix('.txt').read_text()[:400]}")
    least, idle = int(LEAST_INPUTS * given.scale), [one.name for one in tallies if not one.inputs]
    if idle or inputs < least:
        print(f"NOT AS IT SHOULD BE: wanted {least} inputs, and some of each target; idle: {idle}")
        return 1
    return 1 if any(one.findings for one in tallies) else 0


if __name__ == "__main__":
    sys.exit(main())

"""The process in which a library may hold its own global lock as long as it likes.

Protocol on a pair of pipes: 8 bytes of length, little-endian, then a pickle; a task comes in, `Done` goes out. The
process ends when its input does, so that it never outlives its parent.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
import traceback
from dataclasses import dataclass
from typing import Any, BinaryIO

LENGTH_BYTES = 8


@dataclass(frozen=True)
class Done:
    """Outcome of a task.

    Args:
        result: What `run` returned.
        failure: Traceback of what it raised instead.
        is_out_of_memory: Whether that was a MemoryError.
        held_bytes: Memory that the process still holds.
    """

    result: Any
    failure: str | None
    is_out_of_memory: bool
    held_bytes: int


def main() -> None:
    """Serve tasks from standard input until it ends."""
    # Libraries print to standard output; what they say must not get between the replies.
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    tasks = sys.stdin.buffer
    # The parent decides when to end: Ctrl-C at a terminal reaches the whole group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while (message := _read(tasks)) is not None:
        _write(replies, _run(message))
        del message


def _run(message: bytes) -> Done:
    result, failure, is_out_of_memory = None, None, False
    try:
        result = pickle.loads(message).run()  # noqa: S301 - from the parent, over a pipe of its own
    except Exception as error:
        failure, is_out_of_memory = traceback.format_exc(), isinstance(error, MemoryError)
    return Done(result, failure, is_out_of_memory, _held_bytes())


def _held_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _read(stream: BinaryIO) -> bytes | None:
    head = stream.read(LENGTH_BYTES)
    if len(head) < LENGTH_BYTES:
        return None
    body = stream.read(int.from_bytes(head, "little"))
    return body or None


def _write(stream: Any, done: Done) -> None:
    body = pickle.dumps(done, protocol=5)
    view = memoryview(len(body).to_bytes(LENGTH_BYTES, "little") + body)
    while view:
        view = view[stream.write(view) :]

"""Tasks for worker processes; nothing here imports torch, which would not fit into a worker that is kept."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass


@dataclass
class Sleep:
    seconds: float

    def run(self):
        time.sleep(self.seconds)
        return os.getpid()


@dataclass
class Die:
    marker: str
    times: int

    def run(self):
        with open(self.marker, "a") as file:
            file.write("x")
        if os.path.getsize(self.marker) <= self.times:
            os.kill(os.getpid(), signal.SIGKILL)
        return "done"


@dataclass
class Raise:
    error: Exception

    def run(self):
        raise self.error


@dataclass
class LoadedModules:
    def run(self):
        return set(sys.modules)

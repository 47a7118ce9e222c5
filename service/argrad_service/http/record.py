"""What is noted of one request while it is served, for its log line, its metrics and its headers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from starlette.types import Scope
from torch import Tensor

from argrad_service.keyring import PUBLIC

_KEY = "argrad.record"


@dataclass
class Record:
    """Notes on one request.

    Args:
        request_id: The caller's, or a new one.
        began: `time.perf_counter()` at its first byte.
        stages_ms: Milliseconds of each stage, in the order in which they ended.
        starts: When stages began, on the clock of `began`; one that is not named began when the one before it ended.
        request_bytes: Of the body, decompressed.
        reply_bytes: Of the reply's body, as it is sent.
        problems: Problems in the batch, by status.
        solver: Who solved them, if anybody did.
        iterations: Of each problem, where it was solved.
        problem_type: Type of the error that was answered, if one was.
        detail: Its words.
        owner: Whose call it is, and whose what it leaves behind.
        key: Name of the API key that came with it, if one did.
        is_trusted: Whether it may see how the service fares.
    """

    request_id: str
    began: float = field(default_factory=time.perf_counter)
    stages_ms: dict[str, float] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)
    request_bytes: int = 0
    reply_bytes: int = 0
    problems: dict[str, int] = field(default_factory=dict)
    solver: str | None = None
    iterations: Tensor | None = None
    problem_type: str | None = None
    detail: str | None = None
    owner: str = PUBLIC
    key: str | None = None
    is_trusted: bool = True

    def attach(self, scope: Scope) -> None:
        """Make this the record of the request."""
        scope[_KEY] = self

    @staticmethod
    def of(scope: Scope) -> Record:
        """The record of the request."""
        record: Record = scope[_KEY]
        return record

    @property
    def elapsed_ms(self) -> float:
        """Milliseconds since the first byte."""
        return 1e3 * (time.perf_counter() - self.began)

    def stage_starts(self) -> dict[str, float]:
        """Seconds from the request's first byte to the beginning of each stage."""
        found, ended = {}, 0.0
        for stage, ms in self.stages_ms.items():
            found[stage] = self.starts[stage] - self.began if stage in self.starts else ended
            ended = found[stage] + 1e-3 * ms
        return found

    def server_timing(self) -> str:
        """Value of the Server-Timing header (W3C Server Timing, durations in ms)."""
        return ", ".join(f"{name};dur={ms:.3f}" for name, ms in self.stages_ms.items())

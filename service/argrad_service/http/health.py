"""Probes: whether the process lives, and whether it should be sent work."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from argrad_service.http.problems import NotReady
from argrad_service.scheduling import Scheduler
from argrad_service.state import Shared, StateStore


@dataclass
class Readiness:
    """Phase of the service, as its start and its end set it.

    Args:
        scheduler: Its threads must be alive.
        store: Reported.
        shared: Reported; where it is degraded, so is the service, which still takes work.
        device: Reported.
        phase: `starting` until a first solve has gone through.
        reason: Why the phase is `failed`.
    """

    scheduler: Scheduler
    store: StateStore
    device: str
    shared: Shared
    phase: Literal["starting", "ready", "failed", "stopping"] = "starting"
    reason: str | None = None

    def report(self, *, is_detailed: bool = True) -> dict[str, Any]:
        """What /health/ready answers.

        Args:
            is_detailed: Whether the caller may see what was found.

        Raises:
            NotReady: the service should not be sent work; the same report is in `checks`.
        """
        solver, state, shared = self.scheduler.health(), self.store.counts(), self.shared.health()
        checks = {
            "phase": self.phase,
            "reason": self.reason,
            "device": self.device,
            "solver": asdict(solver),
            "state": {"store": "memory", "entries": state.entries, "held_bytes": state.held_bytes},
            "shared": {"store": shared.store, "degraded": shared.degraded, "replicas": len(shared.replicas)},
        }
        is_ready = self.phase == "ready" and solver.alive >= solver.threads
        status = "degraded" if shared.degraded else "ready"
        if not is_detailed:
            if not is_ready:
                raise NotReady("the service is not ready")
            return {"status": status}
        if self.phase != "ready":
            raise NotReady(f"the service is {self.phase}{f': {self.reason}' if self.reason else ''}", checks)
        if not is_ready:
            raise NotReady(f"{solver.alive} of {solver.threads} solver threads are alive", checks)
        return {"status": status, "checks": checks}

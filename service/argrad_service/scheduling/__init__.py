"""Solving off the event loop: a bounded queue, solver threads, deadlines and cancellation."""

from argrad_service.scheduling.job import CallerGone, DeadlinePassed, Job, SolverCrashed
from argrad_service.scheduling.pending import Pending, PendingLimits
from argrad_service.scheduling.scheduler import Overloaded, Scheduler, SchedulerHealth, Stopping

__all__ = [
    "CallerGone",
    "DeadlinePassed",
    "Job",
    "Overloaded",
    "Pending",
    "PendingLimits",
    "Scheduler",
    "SchedulerHealth",
    "SolverCrashed",
    "Stopping",
]

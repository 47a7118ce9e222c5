"""Solving off the event loop: a bounded queue, batches, solver threads, deadlines and cancellation."""

from argrad_service.scheduling.job import CallerGone, DeadlinePassed, Job, Share, SolverCrashed, Unfinished
from argrad_service.scheduling.pending import Pending, PendingLimits
from argrad_service.scheduling.queue import Batch, Budget, Queue
from argrad_service.scheduling.scheduler import Overloaded, Scheduler, SchedulerHealth, Stopping
from argrad_service.scheduling.tally import SIZES, Tally

__all__ = [
    "SIZES",
    "Batch",
    "Budget",
    "CallerGone",
    "DeadlinePassed",
    "Job",
    "Overloaded",
    "Pending",
    "PendingLimits",
    "Queue",
    "Scheduler",
    "SchedulerHealth",
    "Share",
    "SolverCrashed",
    "Stopping",
    "Tally",
    "Unfinished",
]

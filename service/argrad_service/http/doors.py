"""Who is in the house, and how it is closed: first nobody comes in, later those inside are sent to another service."""

from __future__ import annotations

import asyncio
from typing import Any

from argrad_service.scheduling import Stopping

_MESSAGE = "the service is stopping: another one takes the call, or this one after its restart"


class Doors:
    """Knows the task of each call that is inside; on the event loop only."""

    def __init__(self) -> None:
        self.is_closed = False
        self._inside: set[asyncio.Task[Any]] = set()
        self._sent_away: set[asyncio.Task[Any]] = set()

    def enter(self) -> asyncio.Task[Any]:
        """Let the running task in.

        Raises:
            Stopping: the doors are closed.
        """
        task = asyncio.current_task()
        if self.is_closed or task is None:
            raise Stopping(_MESSAGE)
        self._inside.add(task)
        return task

    def leave(self, task: asyncio.Task[Any]) -> None:
        """Let a task out that has entered."""
        self._inside.discard(task)
        self._sent_away.discard(task)

    def close(self) -> None:
        """Let nobody in any more; who is inside may finish."""
        self.is_closed = True

    def hand_back(self) -> None:
        """Close, and end every call that is inside, wherever it is: its caller is told to go elsewhere."""
        self.close()
        for task in self._inside - self._sent_away:
            self._sent_away.add(task)
            task.cancel()

    def check_cancelled(self, task: asyncio.Task[Any]) -> None:
        """Tell a call that was sent away from one whose loop ends, where it was cancelled.

        Raises:
            Stopping: it was sent away, and can answer its caller.
        """
        if task in self._sent_away:
            task.uncancel()
            raise Stopping(_MESSAGE)

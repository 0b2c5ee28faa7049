"""Whether the engine thread turns, and what newcomers are told while they cannot be served."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import EngineDead, EngineRestarting, EngineStalled, ShuttingDown
from ..types import EngineStatus

HEARTBEAT_S = 10.0  # an idle loop without a heartbeat for this long is stalled
STALL_STEPS = 20  # a step is too old after this many median steps (and stall_s)


class Pulse:
    """When a turn began, and when the last one ended. Written by the engine thread, read by any."""

    def __init__(self, clock: Callable[[], float], stall_s: float) -> None:
        self._clock, self.stall_s = clock, stall_s
        self._last = clock()
        self._began: float | None = None

    @property
    def turning(self) -> bool:
        return self._began is not None

    def begin(self) -> float:
        """A turn begins; → now."""
        self._began = self._clock()
        return self._began

    def end(self) -> None:
        self._last, self._began = self._clock(), None

    def age_s(self) -> float:
        """Since the last turn ended."""
        return max(0.0, self._clock() - self._last)

    def trouble(self, median_turn_s: Callable[[], float]) -> str | None:
        """What is wrong, in a sentence: a turn far older than usual, or none for long. median_turn_s: is asked of old
        turns alone; it costs more than the rest of a submission"""
        began = self._began
        if began is None:
            return "The engine loop does not turn." if self.age_s() > HEARTBEAT_S else None
        age = self._clock() - began
        late = age > self.stall_s and age > STALL_STEPS * median_turn_s()
        return f"A step has been running for {age:.0f} s." if late else None


def refuse_unless_ok(status: EngineStatus) -> None:
    """Raises ShuttingDown, EngineDead, EngineRestarting or EngineStalled."""
    if status.state == "closed" or status.state == "draining":
        raise ShuttingDown("The server is shutting down.")
    if status.state == "failed":
        raise EngineDead(status.message or "The engine is gone.")
    if status.state == "restarting":
        raise EngineRestarting("The engine starts again after an error.")
    if status.state == "stalled":
        raise EngineStalled(f"{status.message} Try again later.")

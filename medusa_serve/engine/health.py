"""Is the engine well? Whether its loop still turns, whether new sequences are refused, whether it may start again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ..errors import EngineDead, EngineRestarting, EngineStalled, ShuttingDown
from ..types import EngineStatus

HEARTBEAT_S = 10.0  # an idle loop without a heartbeat for this long is stalled
STALL_STEPS = 20  # a step is stalled when it takes longer than this many median steps (and longer than stall_s)
MAX_RESTARTS, RESTART_WINDOW_S = 3, 600.0  # an engine that needs more restarts than that is broken


class Heartbeat:
    """When the current turn began and when the last one ended. The engine thread writes, any thread reads."""

    def __init__(self, clock: Callable[[], float], stall_s: float) -> None:
        self._clock, self.stall_s = clock, stall_s
        self._last = clock()
        self._began: float | None = None

    @property
    def turning(self) -> bool:
        return self._began is not None

    def begin(self) -> float:
        """A turn begins. Returns the time."""
        self._began = self._clock()
        return self._began

    def end(self) -> None:
        self._last, self._began = self._clock(), None

    def age_s(self) -> float:
        """Seconds since the last turn ended."""
        return max(0.0, self._clock() - self._last)

    def trouble(self, median_turn_s: Callable[[], float]) -> str | None:
        """What is wrong, in a sentence: a turn that takes far longer than usual, or no turn for a long time.

        median_turn_s is called for a long turn only, since it costs more than the rest of a submission."""
        began = self._began
        if began is None:
            return "The engine loop does not turn." if self.age_s() > HEARTBEAT_S else None
        age = self._clock() - began
        late = age > self.stall_s and age > STALL_STEPS * median_turn_s()
        return f"A step has been running for {age:.0f} s." if late else None


def refuse_unless_ok(status: EngineStatus) -> None:
    """Raises ShuttingDown, EngineDead, EngineRestarting or EngineStalled."""
    if status.state in ("closed", "draining"):
        raise ShuttingDown("The server is shutting down.")
    if status.state == "failed":
        raise EngineDead(status.message or "The engine is gone.")
    if status.state == "restarting":
        raise EngineRestarting("The engine starts again after an error.")
    if status.state == "stalled":
        raise EngineStalled(f"{status.message} Try again later.")


class Restarts:
    """Counts restarts and allows MAX_RESTARTS of them within RESTART_WINDOW_S."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._times: deque[float] = deque(maxlen=MAX_RESTARTS)

    def refusal(self, error: BaseException) -> str | None:
        """Why the engine may not start again after `error`, in a sentence; None: it may, and the restart is counted."""
        name, now = type(error).__name__, self._clock()
        if is_sticky(error):
            return f"The device met an error that only a new process cures ({name}): restart the runtime."
        if len(self._times) == MAX_RESTARTS and now - self._times[0] < RESTART_WINDOW_S:
            return f"The engine stopped after an error again and again ({name}). The server must be restarted."
        self._times.append(now)
        return None


def is_sticky(error: BaseException) -> bool:
    """A device error after which every later call of this process fails too, such as a device-side assert."""
    text = str(error)
    if "out of memory" in text:
        return False
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in text or "device-side assert" in text


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device (torch's error, known by its name) or of the host."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"

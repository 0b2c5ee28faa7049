"""Whether an engine that met an error may start again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

MOST, WITHIN_S = 3, 600.0  # an engine that needs more than these is broken


class Restarts:
    """Counts them; no more than MOST within WITHIN_S."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._times: deque[float] = deque(maxlen=MOST)

    def refusal(self, error: BaseException) -> str | None:
        """Why it may not, in a sentence; None: it may, and this one counts."""
        name, now = type(error).__name__, self._clock()
        if is_sticky(error):
            return f"The device met an error that only a new process cures ({name}): restart the runtime."
        if len(self._times) == MOST and now - self._times[0] < WITHIN_S:
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
    """torch's, by name, or the host's."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"

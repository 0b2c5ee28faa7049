"""The server's log lines go into a ring, not into the cell that happens to run."""

from __future__ import annotations

import logging
from collections import deque

LOGGERS = ("medusa_serve", "uvicorn")
LINES = 1000


class RingLog(logging.Handler):
    """The last lines of our loggers, while attached."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        self._lines: deque[str] = deque(maxlen=LINES)
        self._before: dict[str, tuple[int, bool]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))

    def attach(self) -> None:
        for name in LOGGERS:
            logger = logging.getLogger(name)
            self._before[name] = logger.level, logger.propagate
            logger.addHandler(self)
            logger.setLevel(logging.INFO)
            logger.propagate = False

    def detach(self) -> None:
        for name, (level, propagate) in self._before.items():
            logger = logging.getLogger(name)
            logger.removeHandler(self)
            logger.setLevel(level)
            logger.propagate = propagate
        self._before.clear()

    def text(self, lines: int) -> str:
        """The last `lines` lines."""
        return "\n".join(list(self._lines)[-lines:])

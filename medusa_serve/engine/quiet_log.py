"""A logger that never raises: a handler of the user's that does must not end the engine."""

from __future__ import annotations

import contextlib
import logging
from typing import Any


class QuietLogger(logging.LoggerAdapter[logging.Logger]):
    """As the logger of that name, but for what its handlers raise."""

    def __init__(self, name: str) -> None:
        super().__init__(logging.getLogger(name))

    def log(self, level: int, msg: object, *args: object, **options: Any) -> None:
        with contextlib.suppress(Exception):
            super().log(level, msg, *args, **options)

"""A logger that never raises: an error in a user's log handler must not end the engine."""

from __future__ import annotations

import contextlib
import logging
from typing import Any


class QuietLogger(logging.LoggerAdapter[logging.Logger]):
    """The logger of that name, without the errors that its handlers raise."""

    def __init__(self, name: str) -> None:
        super().__init__(logging.getLogger(name))

    def log(self, level: int, msg: object, *args: object, **options: Any) -> None:
        with contextlib.suppress(Exception):
            super().log(level, msg, *args, **options)

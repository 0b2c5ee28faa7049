"""Work that takes seconds and can wait, as a generator: an idle engine does one part at a time, and whoever asks
meanwhile waits for no more than the part under way."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

Result = TypeVar("Result")
LOOK_S = 0.05  # between looks at a thread


def at_once(parts: Generator[None, None, Result]) -> Result:
    """All parts, one after the other; → what the work gives."""
    while True:
        try:
            next(parts)
        except StopIteration as end:
            return end.value


def imported(*names: str) -> Iterator[None]:
    """Import modules in a thread: that takes seconds, but lets others run in between. What fails is told by whoever
    imports it again, to use it."""

    def run() -> None:
        with contextlib.suppress(Exception):
            for name in names:
                importlib.import_module(name)

    thread = threading.Thread(target=run, name="medusa-import", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(LOOK_S)
        yield

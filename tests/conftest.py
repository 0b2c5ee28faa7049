"""Tiny models are faster on one thread, and two test runs beside each other do not spin against one another.

A shell's background job ignores interrupts, and so would its tests and all that they start: they are heard again.
"""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure() -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

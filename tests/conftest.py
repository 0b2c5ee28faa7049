"""Tiny models are faster on one thread, and two test runs beside each other do not spin against one another.

A shell's background job ignores interrupts, and so would its tests and all that they start: they are heard again.
"""

import functools
import gc
import os
import signal

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure() -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def certificates_are_read_once() -> None:
    """httpx reads all of them for each request that no client of the test's own makes: 24 ms, also for loopback."""
    try:
        from httpx._transports import default
    except ImportError:
        return
    default.create_ssl_context = functools.cache(default.create_ssl_context)


@pytest.fixture(autouse=True, scope="session")
def modules_are_no_garbage() -> None:
    """Each engine that closes collects garbage, and with torch and transformers imported that took 0.23 s."""
    gc.collect()
    gc.freeze()

"""The command line in this process, while a test acts beside it as a person at a terminal does: without the seconds
that a new interpreter needs to load torch. One test of each command runs it in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from medusa_serve import cli


def main_while(act: Callable[[Iterator[str]], None], *arguments: str, stream: str = "stdout") -> tuple[int, str]:
    """→ (exit code, what was printed to `stream`). act: gets those lines as they come, in a thread of its own, and ends
    the command (`stop`); what it raises is raised here."""
    read, write = os.pipe()
    said, failures = list[str](), list[BaseException]()
    over = threading.Event()

    def beside() -> None:
        with open(read, encoding="utf-8") as file:

            def lines() -> Iterator[str]:
                for line in file:
                    said.append(line)
                    yield line

            try:
                act(lines())
            except BaseException as error:
                failures.append(error)
                if not over.is_set():
                    stop()
            said.extend(file)

    thread = threading.Thread(target=beside)
    thread.start()
    try:
        redirect = {"stdout": contextlib.redirect_stdout, "stderr": contextlib.redirect_stderr}[stream]
        with open(write, "w", buffering=1, encoding="utf-8") as file, redirect(file):
            code = cli.main(arguments)
            over.set()
    finally:
        thread.join()
    if failures:
        raise failures[0]
    return code, "".join(said)


def stop(how: signal.Signals = signal.SIGINT) -> None:
    """The signal reaches the main thread, which may be waiting."""
    ident = threading.main_thread().ident
    assert ident is not None
    signal.pthread_kill(ident, how)

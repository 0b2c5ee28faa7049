"""Compiles the kernels of a CPU's passes while a model is read. At the first start on a machine that takes half a
minute, and other Python threads can run only during LLVM's part of it. So a second process compiles half of the kernels
if the disk cache lacks the first one.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

FOUND_S = 0.2  # reading a kernel from the disk cache takes a twentieth of that
PROCESS_S = 120.0


def kernels_ahead() -> threading.Thread:
    """Start compiling in a thread. A kernel that fails here raises its error again where it is used."""
    thread = threading.Thread(target=_make, name="medusa-kernels", daemon=True)
    thread.start()
    return thread


def _make() -> None:
    with contextlib.suppress(Exception):
        _make_all()


def _make_all() -> None:
    from .draft import block_function, linear_function
    from .int_products import product_function
    from .search import children_function, largest_function

    largest_function()  # with its first kernel Numba prepares itself, too
    began = time.perf_counter()
    children_function()
    process = _second_process() if time.perf_counter() - began > FOUND_S else None
    for function in (product_function, block_function, linear_function):
        function()
    if process is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PROCESS_S)
    make_layers()


def make_layers() -> None:
    from .attention import attention_function
    from .tape import tape_function

    attention_function()
    tape_function()


def _second_process() -> subprocess.Popen[bytes] | None:
    """A process that runs `make_layers`, which leaves its kernels on the disk; None if it cannot start."""
    root = str(Path(__file__).parents[3])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    code = f"from {__name__} import make_layers; make_layers()"
    try:
        return subprocess.Popen(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except OSError:
        return None

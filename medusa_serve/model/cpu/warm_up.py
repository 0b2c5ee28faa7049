"""The kernels of a CPU's passes, made ready while a model is read: at the first start on a machine half a minute of
compiling, of which LLVM's part alone leaves the interpreter to others.

So a process of its own makes half of them where another was not found on the disk.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

FOUND_S = 0.2  # a kernel that lies on the disk is read in a twentieth of that
APART_S = 120.0


def kernels_ahead() -> threading.Thread:
    """Begin, in a thread. What fails is told by whoever uses the kernel."""
    thread = threading.Thread(target=_make, name="medusa-kernels", daemon=True)
    thread.start()
    return thread


def _make() -> None:
    with contextlib.suppress(Exception):
        _make_all()


def _make_all() -> None:
    from .draft import block_share, linear_share
    from .int_products import product_share
    from .search import children_share, largest_share

    largest_share()  # and what Numba makes ready at its first kernel
    began = time.perf_counter()
    children_share()
    apart = _apart() if time.perf_counter() - began > FOUND_S else None
    for share in (product_share, block_share, linear_share):
        share()
    if apart is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            apart.wait(APART_S)
    make_layers()


def make_layers() -> None:
    from .attention import attention_share
    from .tape import tape_share

    attention_share()
    tape_share()


def _apart() -> subprocess.Popen[bytes] | None:
    """A process that makes what `make_layers` does and leaves it on the disk; None where there cannot be one."""
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

"""The kernels of a CPU's passes, made ready while a model is read: at the first start on a machine half a minute of
compiling, of which LLVM's part leaves the interpreter to others."""

from __future__ import annotations

import contextlib
import threading


def kernels_ahead() -> threading.Thread:
    """Begin, in a thread. What fails is told by whoever uses the kernel."""
    thread = threading.Thread(target=_make, name="medusa-kernels", daemon=True)
    thread.start()
    return thread


def _make() -> None:
    with contextlib.suppress(Exception):
        _make_all()


def _make_all() -> None:
    from .canonical import attention_share
    from .native_draft import block_share, linear_share
    from .native_products import product_share
    from .native_step import children_share, largest_share
    from .native_tape import tape_share

    for share in (attention_share, product_share, largest_share, children_share, block_share, linear_share, tape_share):
        share()

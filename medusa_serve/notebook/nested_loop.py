"""`asyncio.run` in a cell, for users who want it. The server does not need this: its loop has its own thread."""

from __future__ import annotations

import asyncio
import importlib
import sys
from types import ModuleType

from ..errors import InvalidConfig


def allow_nested_loop() -> str:
    """Make `asyncio.run` and `run_until_complete` work in cells, where a loop runs already; → the library's name.

    Takes nest-asyncio2, or nest-asyncio below Python 3.14, where it breaks. May be called twice, before or after a
    server was started. Raises InvalidConfig where neither is installed.
    """
    module = _module()
    module.apply(_loop_of_this_thread())
    return module.__name__


def _module() -> ModuleType:
    names = ["nest_asyncio2", "nest_asyncio"]
    if hasattr(asyncio, "_nest_patched") and not hasattr(asyncio, "_nest_asyncio2"):
        names.reverse()  # the older one is applied already, and the two do not mix
    for name in names:
        if name == "nest_asyncio" and sys.version_info >= (3, 14):
            continue
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise InvalidConfig("This needs nest-asyncio2: run %pip install nest-asyncio2, then this cell again.")


def _loop_of_this_thread() -> asyncio.AbstractEventLoop | None:
    """The running loop; None without one: then asyncio's own choice is patched."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None

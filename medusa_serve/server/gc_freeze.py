"""Python's garbage collector in a process that is an engine's alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loaded_is_kept() -> Iterator[None]:
    """What is there now, of the libraries and the model, is not looked at again until the end. It is half a million
    objects: a full collection, which comes every few thousand requests, takes a third of a second, and meanwhile nobody
    gets a token. Not for a notebook: its own objects must be found when they are given up."""
    gc.collect()  # what is garbage already would stay
    kept_already = gc.get_freeze_count() > 0
    gc.freeze()
    try:
        yield
    finally:
        if not kept_already:  # else somebody else wants that too, and one cannot have the rest alone back
            gc.unfreeze()

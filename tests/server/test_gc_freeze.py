"""python -m pytest tests/engine/test_collector.py"""

import gc
import weakref

import pytest

from medusa_serve.server.gc_freeze import loaded_is_kept


class Node:
    pass


def ring():
    """Garbage that only a collection finds."""
    node = Node()
    node.itself = node
    return weakref.ref(node)


@pytest.fixture
def _nothing_kept():
    """The suite itself keeps what it has loaded."""
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.mark.usefixtures("_nothing_kept")
def test_what_is_loaded_is_left_alone_and_what_comes_later_is_not():
    node, early = Node(), ring()
    node.itself, kept = node, weakref.ref(node)
    with loaded_is_kept():
        assert early() is None, "what is garbage already does not stay"
        with loaded_is_kept():
            del node
        late = ring()
        gc.collect()
        assert kept() is not None
        assert late() is None
    gc.collect()
    assert kept() is None
    assert gc.get_freeze_count() == 0

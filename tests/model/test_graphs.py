"""What an idle engine captures ahead; capturing itself needs a GPU (tests/test_gpu.py).

pytest tests/model/test_graphs.py
"""

import pytest
import torch

from medusa_serve.model import graphs
from medusa_serve.model.graphs import StepGraphs
from medusa_serve.model.plan import Shape
from medusa_serve.model.tables import PLAIN, Needs

SHAPES = [Shape(1, 0, 0), Shape(8, 2, 4), Shape(64, 16, 16)]
HOT = Needs(sampled=True)


@pytest.fixture
def idle():
    """StepGraphs whose captures only take notes."""
    made = StepGraphs.__new__(StepGraphs)
    made._graphs, made._seen = {}, set()

    def run(slots, width, shape, needs, active=True):
        assert not active
        made._seen.add((len(slots), width, needs))
        made._graphs[len(slots), width, shape, needs] = None

    made.run = run
    return made


def test_every_size_for_each_number_of_rows_that_was_asked_for(idle):
    assert not idle.prepare(SHAPES)
    assert not idle._graphs
    idle._seen = {(4, 256, PLAIN), (64, 256, HOT)}
    idle._graphs[4, 256, SHAPES[0], PLAIN] = None
    turns = 1
    while idle.prepare(SHAPES):
        turns += 1
    assert turns == 4
    assert set(idle._graphs) == {(4, 256, shape, PLAIN) for shape in SHAPES} | {
        (64, 256, shape, HOT)
        for shape in SHAPES[:2]  # 64 rows of 64 nodes are too many
    }
    assert not idle.prepare(SHAPES)


def test_there_is_an_end_to_it(idle, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    idle._seen = {(rows, 256, PLAIN) for rows in (1, 2, 4)}
    while idle.prepare(SHAPES):
        pass
    assert len(idle._graphs) == 2


def test_no_memory_left_ends_it(idle, caplog):
    def full(*arguments, **options):
        raise torch.cuda.OutOfMemoryError("out of memory")

    idle.run, idle._seen = full, {(1, 256, PLAIN)}
    assert not idle.prepare(SHAPES)
    assert "is not captured ahead: out of memory" in caplog.text
    assert not idle.prepare(SHAPES)

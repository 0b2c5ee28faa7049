import itertools
import json

import pytest
import torch

from medusa_serve.errors import LoadError
from medusa_serve.model.drafting.tree import HeadNodes, Tree, ancestors, assemble, most_probable, read_choices
from tests.oracles import DEFAULT_RANKS


def test_the_drawing_in_the_docstring():
    tree = Tree(((0,), (1,), (0, 0)), num_lookup=2)
    assert tree.parents == (0, 0, 0, 1, 0, 4)
    assert tree.depths == (0, 1, 1, 2, 1, 2)
    assert (tree.num_nodes, tree.max_depth, tree.num_heads, tree.num_ranks) == (6, 2, 2, 2)
    mask = tree.draft(torch.zeros(1, 6, dtype=torch.int64)).mask[0]
    seen = [[j for j in range(6) if mask[i, j]] for i in range(6)]
    assert seen == [[0], [0, 1], [0, 2], [0, 1, 3], [0, 4], [0, 4, 5]]


def heads(rows: int = 2) -> HeadNodes:
    """The heads' part of the drawing: 10 and 11 below the root, 20 below 10."""
    parts = ([10, 11, 20], [0, 0, 1], [1, 1, 2])
    return HeadNodes(*(torch.tensor([part] * rows) for part in parts))


def test_assemble_joins_root_heads_and_lookup():
    lookup = torch.tensor([[30, 31, 32], [33, -1, -1]])
    draft = assemble(torch.tensor([7, 8]), heads(), lookup, torch.tensor([99, 1]), 6, 2, 2)
    assert draft.tokens.tolist() == [[7, 10, 11, 20, 30, 31], [8, -1, -1, -1, -1, -1]]
    assert draft.parents[0].tolist() == [0, 0, 0, 1, 0, 4]
    assert draft.depths[0].tolist() == [0, 1, 1, 2, 1, 2]
    assert torch.equal(draft.mask[0], Tree(((0,), (1,), (0, 0)), 2).draft(draft.tokens).mask[0])


def test_a_smaller_tree_takes_the_best_nodes_first():
    draft = assemble(
        torch.tensor([7, 8]), heads(), torch.zeros(2, 1, dtype=torch.int64), torch.tensor([99, 99]), 3, 1, 2
    )
    assert draft.tokens.tolist() == [[7, 10, 0], [8, 10, 0]]


def test_every_row_may_have_a_tree_of_its_own():
    parents = torch.tensor([[0, 0, 1, 2], [0, 0, 0, 2]])
    mask = ancestors(parents, 3)
    assert [[j for j in range(4) if mask[0, i, j]] for i in range(4)] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert [[j for j in range(4) if mask[1, i, j]] for i in range(4)] == [[0], [0, 1], [0, 2], [0, 2, 3]]


@pytest.mark.parametrize(
    ("paths", "says"),
    [
        (((0, 0),), "without, or before, its parent"),
        (((0,), (0,)), "twice"),
        (((),), "non-empty"),
        (((-1,),), "ranks from 0"),
        (tuple((i,) for i in range(64)), "65 nodes"),
    ],
)
def test_nonsense_is_refused(paths, says):
    with pytest.raises(LoadError, match=says):
        Tree(paths)


def test_a_tree_wider_than_its_heads_is_refused():
    with pytest.raises(LoadError, match="needs 1 heads with 4 candidates"):
        Tree(((0,), (1,), (2,), (3,))).check(1, 3)


def test_most_probable_is_the_best_tree_of_its_size():
    ranks = ((0.5, 0.25, 0.1), (0.4, 0.3, 0.1))
    probability = {(a,): ranks[0][a] for a in range(3)}
    probability |= {(a, b): ranks[0][a] * ranks[1][b] for a in range(3) for b in range(3)}
    for nodes in range(2, 13):
        paths = most_probable(ranks, nodes)
        got = sum(probability[path] for path in paths)
        closed = (
            chosen
            for chosen in itertools.combinations(probability, nodes - 1)
            if all(len(path) == 1 or path[:1] in chosen for path in chosen)
        )
        best = max(sum(probability[path] for path in chosen) for chosen in closed)
        assert got == pytest.approx(best)
        Tree(paths)


def test_every_prefix_of_the_default_order_is_a_tree():
    paths = most_probable(DEFAULT_RANKS, 64)
    assert len(paths) == 63
    for count in range(1, 64):
        Tree(paths[:count])


def test_published_choices_are_read_in_any_order(tmp_path):
    file = tmp_path / "tree.json"
    file.write_text(json.dumps([[0, 0], [1], [0]]))
    assert read_choices(file) == ((0,), (1,), (0, 0))


@pytest.mark.parametrize("text", ["", "{}", "[]", "[1]", '[["a"]]', "[[true]]"])
def test_a_broken_tree_file_is_an_error_that_names_it(tmp_path, text):
    file = tmp_path / "tree.json"
    file.write_text(text)
    with pytest.raises(LoadError, match="tree.json"):
        read_choices(file)

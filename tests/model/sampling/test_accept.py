"""The walk on hand-made trees: every place where a draft can end."""

import pytest
import torch

from medusa_serve.model.drafting.tree import Tree
from medusa_serve.model.sampling.accept import Limits, accept
from tests.model.rows import sampling

VOCAB = 64
#      root ─┬─ 1 ── 3 ── 4
#            ├─ 2
#            └─ 5 ── 6        (a lookup chain)
TREE = Tree(((0,), (1,), (0, 0), (0, 0, 0)), num_lookup=2)
DRAFT = [40, 52, 53, 9, 10, 52, 9]


def walk(says: dict[int, int], draft=DRAFT, length=7, total=1000, eos=()):
    """`says`: node → the token that the model picks after it."""
    logits = torch.zeros(1, TREE.num_nodes, VOCAB)
    for node, token in says.items():
        logits[0, node, token] = 5.0
    limits = Limits(torch.tensor([length]), torch.tensor([total]), torch.tensor([list(eos) or [-1]]))
    tree = TREE.draft(torch.tensor([draft]))
    got = accept(logits, tree.tokens, tree.parents, TREE.max_depth, sampling(1), limits)
    count = int(got.num_emitted)
    return got.tokens[0, :count].tolist(), got.nodes[0, :count].tolist(), bool(got.finished), bool(got.finite)


@pytest.mark.parametrize(
    ("says", "tokens", "nodes"),
    [
        ({0: 52, 1: 9, 3: 30}, [52, 9, 30], [0, 1, 3]),  # the docstring's example
        ({0: 60}, [60], [0]),  # mismatch at the first node
        ({0: 52, 1: 60}, [52, 60], [0, 1]),  # in the middle
        ({0: 52, 1: 9, 3: 10, 4: 61}, [52, 9, 10, 61], [0, 1, 3, 4]),  # none: depth + 1 tokens
        ({0: 53, 2: 5}, [53, 5], [0, 2]),  # the sibling
    ],
)
def test_the_path_that_the_model_itself_takes(says, tokens, nodes):
    assert walk(says) == (tokens, nodes, False, True)


def test_heads_and_lookup_may_draft_the_same_child():
    """Node 1 and node 5 both hold 52, but only below 5 stands 9: the walk keeps both alive and finds it."""
    draft = [40, 52, 53, 11, 10, 52, 9]
    assert walk({0: 52, 1: 9, 5: 9, 6: 3}, draft) == ([52, 9, 3], [0, 1, 6], False, True)


def test_empty_nodes_are_never_accepted():
    assert walk({0: 0}, [40, -1, -1, -1, -1, -1, -1])[0] == [0]


def test_eos_inside_a_path_ends_it():
    assert walk({0: 52, 1: 9, 3: 10, 4: 61}, eos=(9, 2)) == ([52, 9], [0, 1], True, True)


def test_eos_as_the_very_first_token():
    assert walk({0: 52, 1: 9}, eos=(52,)) == ([52], [0], True, True)


@pytest.mark.parametrize(("total", "tokens"), [(9, [52]), (10, [52, 9]), (11, [52, 9, 10]), (12, [52, 9, 10, 61])])
def test_the_limit_inside_a_path_ends_it(total, tokens):
    """Length 7 and the pending token are 8; total counts what is emitted on top."""
    got = walk({0: 52, 1: 9, 3: 10, 4: 61}, total=total)
    assert got[0] == tokens
    assert got[2] is True


@pytest.mark.parametrize(("bad", "finite"), [(0, False), (3, False), (4, True), (2, True)])
def test_bad_logits_count_only_on_the_walked_path(bad, finite):
    says = {0: 52, 1: 9, 3: 30}
    logits = torch.zeros(1, TREE.num_nodes, VOCAB)
    for node, token in says.items():
        logits[0, node, token] = 5.0
    logits[0, bad, 0] = torch.nan
    limits = Limits(torch.tensor([7]), torch.tensor([99]), torch.tensor([[-1]]))
    tree = TREE.draft(torch.tensor([DRAFT]))
    got = accept(logits, tree.tokens, tree.parents, 3, sampling(1), limits)
    assert bool(got.finite) is finite


def test_rows_walk_independently():
    logits = torch.zeros(3, TREE.num_nodes, VOCAB)
    for row, says in enumerate(({0: 52, 1: 9, 3: 10, 4: 61}, {0: 60}, {0: 53, 2: 5})):
        for node, token in says.items():
            logits[row, node, token] = 5.0
    limits = Limits(torch.tensor([7, 3, 5]), torch.tensor([99, 99, 6]), torch.full((3, 1), -1))
    tree = TREE.draft(torch.tensor([DRAFT] * 3))
    got = accept(logits, tree.tokens, tree.parents, 3, sampling(3), limits)
    assert got.tokens.tolist() == [[52, 9, 10, 61], [60, -1, -1, -1], [53, -1, -1, -1]]
    assert got.num_emitted.tolist() == [4, 1, 1]
    assert got.finished.tolist() == [False, False, True]

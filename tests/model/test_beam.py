"""Per-context trees against an exhaustive search."""

import itertools

import pytest
import torch

from medusa_serve.errors import LoadError
from medusa_serve.model.beam import SequentialDrafter
from medusa_serve.model.heads import SequentialHeads
from medusa_serve.model.noise import gumbel
from medusa_serve.model.tree import ancestors
from tests.model.rows import sampling

VOCAB, HIDDEN, DEPTH = 6, 16, 3


def heads(token_map=None) -> SequentialHeads:
    torch.manual_seed(0)
    made = SequentialHeads(HIDDEN, inner=24, readout=16, max_depth=DEPTH, token_map=token_map)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    made.attach(torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN))
    return made.eval().requires_grad_(False)


def exhaustive(made, hidden, pending, temperature, seed, length) -> dict[tuple[int, ...], float]:
    """The log-probability of every path of tokens up to DEPTH, node by node."""
    found: dict[tuple[int, ...], float] = {}
    states = {(): made.start(hidden[None], torch.tensor([pending]))}
    for depth in range(DEPTH):
        for path in [p for p in states if len(p) == depth]:
            logits = made.logits(states[path])[0].float()
            ids = torch.arange(VOCAB) if made.token_map is None else made.token_map
            if temperature:
                logits = logits / temperature + gumbel(torch.tensor(seed), torch.tensor(length + 1 + depth), ids)
            for token, logp in zip(ids.tolist(), logits.log_softmax(-1).tolist(), strict=True):
                found[(*path, token)] = found.get(path, 0.0) + logp
                states[(*path, token)] = made.advance(states[path], torch.tensor([token]))
    return found


@pytest.mark.parametrize("token_map", [None, torch.tensor([5, 0, 3, 2])])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_most_probable_nodes_are_found_and_form_a_tree(temperature, token_map):
    made = heads(token_map)
    ranks = VOCAB if token_map is None else len(token_map)
    drafter = SequentialDrafter(made, num_ranks=ranks)
    drafter.size(40, None)
    drafter._width = 64  # wide enough that no node is lost, so that the search is exhaustive, too
    hidden, pending, length = torch.randn(3, HIDDEN), torch.tensor([1, 4, 2]), torch.tensor([7, 0, 30])
    rows = sampling(3, temperature=temperature, seeds=torch.tensor([5, 6, 7]))
    got = drafter.draft(torch.arange(3), hidden, pending, length, rows)
    for row in range(3):
        truth = exhaustive(made, hidden[row], int(pending[row]), temperature, 5 + row, int(length[row]))
        best = sorted(truth, key=lambda path: truth[path] - 1e-4 * len(path), reverse=True)[: drafter.max_nodes]
        assert paths(got, row) == best
    for first in range(1, drafter.max_nodes):
        assert int(got.parents[:, first].max()) <= first


def paths(nodes, row: int) -> list[tuple[int, ...]]:
    out: list[tuple[int, ...]] = []
    for token, parent, depth in zip(*(part[row].tolist() for part in nodes), strict=True):
        out.append((*(out[parent - 1] if parent else ()), token))
        assert len(out[-1]) == depth
    return out


def test_a_narrow_beam_still_gives_a_tree_of_distinct_paths():
    drafter = SequentialDrafter(heads(), num_ranks=3)
    for size in (1, 2, 3, 7, 15):
        drafter.size(size, None)
        got = drafter.draft(
            torch.arange(2), torch.randn(2, HIDDEN), torch.tensor([1, 2]), torch.tensor([3, 4]), sampling(2)
        )
        assert got.tokens.shape == (2, drafter.max_nodes)
        for row in range(2):
            found = paths(got, row)
            assert len(set(found)) == len(found)
        root = torch.zeros(2, 1, dtype=torch.int64)
        mask = ancestors(torch.cat([root, got.parents], dim=1), drafter.max_depth)
        assert torch.equal(mask.sum(2)[:, 1:], got.depths + 1)


def test_a_tree_file_is_refused():
    with pytest.raises(LoadError, match="parallel heads"):
        SequentialDrafter(heads(), num_ranks=3).size(3, ((0,), (1,)))


def test_rows_do_not_depend_on_each_other():
    drafter = SequentialDrafter(heads(), num_ranks=4)
    hidden, pending, length = torch.randn(4, HIDDEN), torch.arange(4), torch.arange(4) * 3
    rows = sampling(4, temperature=0.7)
    together = drafter.draft(torch.arange(4), hidden, pending, length, rows)
    for row, part in itertools.product(range(4), range(3)):
        one = slice(row, row + 1)
        alone = drafter.draft(
            torch.arange(1), hidden[one], pending[one], length[one], sampling(1, temperature=0.7, seeds=rows.seed[one])
        )
        assert torch.equal(alone[part], together[part][one])

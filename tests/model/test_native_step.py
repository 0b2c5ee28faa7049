"""The kernels of a CPU's greedy step against the operations that they stand for."""

import pytest
import torch

from medusa_serve.model import accept as accepting
from medusa_serve.model import beam
from medusa_serve.model.accept import Limits, accept
from medusa_serve.model.lookup import lookup, reference_lookup
from medusa_serve.model.native_step import best_children
from medusa_serve.model.tree import Tree
from tests.model.rows import sampling

ROWS, VOCAB = 64, 2500
TREE = Tree(((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)), num_lookup=3)


@pytest.mark.parametrize("bad", [None, torch.nan, torch.inf])
def test_the_walk_is_the_references(monkeypatch, bad):
    """Few tokens, so that paths go on, siblings and the lookup's chain hold the same, and ends come at all depths."""
    generator = torch.Generator().manual_seed(0)
    draft = TREE.draft(torch.randint(-1, 3, (ROWS, TREE.num_nodes), generator=generator))
    logits = torch.randn(ROWS, TREE.num_nodes, VOCAB, generator=generator).bfloat16()
    logits[:, :, :3] += 6
    if bad is not None:
        logits[::3, 1, 2000] = bad
        logits[1::5, 0, 7] = -bad
    limits = Limits(*(torch.randint(low, high, (ROWS, *more), generator=generator)
                      for low, high, more in ((4, 9, ()), (8, 16, ()), (2, 40, (2,)))))  # fmt: skip
    got = accept(logits, draft, TREE.max_depth, sampling(ROWS), limits)
    monkeypatch.setattr(accepting, "has_numba", lambda: False)
    want = accept(logits, draft, TREE.max_depth, sampling(ROWS), limits)
    assert torch.equal(got.finite, want.finite)
    good = want.finite
    assert int(good.sum()) > ROWS / 2
    assert len(set(got.num_emitted.tolist())) > 2
    for name in ("num_emitted", "finished"):
        assert torch.equal(getattr(got, name)[good], getattr(want, name)[good]), name
    for row in good.nonzero().flatten().tolist():
        count = int(want.num_emitted[row])
        assert got.tokens[row, :count].tolist() == want.tokens[row, :count].tolist()
        assert got.nodes[row, :count].tolist() == want.nodes[row, :count].tolist()
        assert (got.tokens[row, count:] == -1).all()


def test_the_lookup_is_the_references():
    generator = torch.Generator().manual_seed(1)
    for high in (2, 3, 6, 50):
        history = torch.randint(high, (ROWS, 90), generator=generator)
        length = torch.randint(90, (ROWS,), generator=generator)
        for count in (1, 4, 15):
            assert torch.equal(lookup(history, length, count), reference_lookup(history, length, count))


@pytest.mark.parametrize("vocab", [9, 1024, 2500])
def test_children_are_the_largest_of_the_softmax(vocab):
    logits = (torch.randn(3, 2, vocab, generator=torch.Generator().manual_seed(2)) * 4).bfloat16()
    for tau in (torch.tensor([0.7]), torch.tensor([1.0, 2.5])):
        ids, logp = best_children(logits, tau, 8)
        wanted = (logits.float() / tau[:, None]).log_softmax(-1)
        torch.testing.assert_close(logp, wanted.topk(8).values, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(wanted.gather(2, ids), logp, atol=1e-4, rtol=1e-4)
        assert all(len(set(row)) == 8 for row in ids.flatten(0, 1).tolist())


def test_a_draft_is_that_of_torchs_operations(monkeypatch):
    from medusa_serve.model.heads import SequentialHeads

    torch.manual_seed(0)
    heads = SequentialHeads(32, inner=32, readout=16, vocab_size=300).bfloat16().requires_grad_(False)
    heads.attach(torch.randn(300, 32).bfloat16(), torch.randn(300, 32).bfloat16())
    drafter = beam.SequentialDrafter(heads, tau=[0.8, 1.1, 1.3])
    given = torch.tensor([0]), torch.randn(1, 32).bfloat16(), torch.tensor([5]), torch.tensor([9]), sampling(1)
    with torch.no_grad():
        got = drafter.draft(*given, 7)
        monkeypatch.setattr(beam, "has_numba", lambda: False)
        want = drafter.draft(*given, 7)
    assert torch.equal(got.parents, want.parents)
    assert torch.equal(got.tokens, want.tokens)

"""The kernels of a CPU's greedy step against the operations that they stand for."""

import pytest
import torch

from medusa_serve.model.cpu.search import best_children, largest
from medusa_serve.model.drafting import drafters as beam
from medusa_serve.model.drafting.lookup import lookup, reference_lookup
from tests.model.rows import sampling

ROWS = 64


@pytest.mark.parametrize("vocab", [9, 1024, 2500])
def test_the_largest_logits_are_torchs(vocab):
    logits = (torch.randn(3, 5, vocab, generator=torch.Generator().manual_seed(0)) * 2).bfloat16()
    logits[0, 1, 3], logits[1, 0, 5], logits[2, 4, 7], logits[2, 2] = torch.nan, torch.inf, -torch.inf, -3.0
    picked, best = largest(logits)
    wanted = logits.float().max(dim=-1)
    good = wanted.values.isfinite()
    assert torch.equal(best.isfinite(), good)
    assert good.tolist() == [[True, False, True, True, True], [False, *[True] * 4], [True] * 5]
    assert torch.equal(best[good], wanted.values[good])
    assert torch.equal(logits.float().gather(2, picked[..., None])[..., 0][good], wanted.values[good])
    assert picked[2, 2] == 0  # the first among equals


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
    from medusa_serve.model.drafting.heads import SequentialHeads

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

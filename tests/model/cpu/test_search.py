"""The kernels of a CPU's greedy step against the operations that they stand for."""

import pytest
import torch

from medusa_serve.model.cpu.kernels import CpuKernels
from medusa_serve.model.cpu.search import largest
from medusa_serve.model.drafting import drafters as beam
from tests.model.rows import sampling


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


def test_a_draft_is_that_of_torchs_operations():
    from medusa_serve.model.drafting.heads import SequentialHeads

    torch.manual_seed(0)
    heads = SequentialHeads(32, inner=32, readout=16, vocab_size=300).bfloat16().requires_grad_(False)
    heads.attach(torch.randn(300, 32).bfloat16(), torch.randn(300, 32).bfloat16())
    drafter = beam.SequentialDrafter(heads, tau=[0.8, 1.1, 1.3])
    given = torch.tensor([0]), torch.randn(1, 32).bfloat16(), torch.tensor([5]), torch.tensor([9]), sampling(1)
    with torch.no_grad():
        got = drafter.using(CpuKernels()).draft(*given, 7)
        want = drafter.draft(*given, 7)
    assert torch.equal(got.parents, want.parents)
    assert torch.equal(got.tokens, want.tokens)

"""The Triton kernels of the tree search against its plain form: `pytest -m gpu tests/model/test_fused_search.py`."""

import pytest
import torch

from medusa_serve.model.drafting.drafters import ParallelDrafter, SequentialDrafter
from medusa_serve.model.drafting.heads import MedusaHeads, SequentialHeads
from medusa_serve.model.drafting.pool import Pool
from medusa_serve.model.gpu.kernels import GpuKernels
from medusa_serve.model.gpu.search import FusedPool, top_children
from tests.model.rows import sampling

pytestmark = pytest.mark.gpu
BASE, HIDDEN = 50_000, 32
TAU, NOISE_TAU = (0.4, 1.5, 0.6, 1.1), (0.9, 0.3, 2.0, 1.3)
TEMPERATURES = [(0.0, 0.0, 0.0), (0.8, 0.8, 0.8), (0.7, 0.0, 1.2)]


def on_gpu(rows):
    return rows._replace(
        temperature=rows.temperature.cuda(), seed=rows.seed.cuda(), top_k=rows.top_k.cuda(), top_p=rows.top_p.cuda(),
        min_p=rows.min_p.cuda(),
    )  # fmt: skip


def mixed(temperatures):
    rows = on_gpu(sampling(len(temperatures), seeds=torch.tensor((5, 2**40 + 6, -7))))
    return rows._replace(temperature=torch.tensor(temperatures).cuda(), sampled=max(temperatures) > 0)


def drafter_of(family, vocab, mapped):
    torch.manual_seed(0)
    token_map = torch.randperm(BASE)[:vocab] if mapped else None
    if family == "sequential":
        made = SequentialHeads(HIDDEN, inner=48, readout=32, max_depth=4, token_map=token_map)
    else:
        made = MedusaHeads(HIDDEN, 4, token_map=token_map)
        torch.nn.init.normal_(made.weight, std=0.3)
    made = made.cuda().eval().requires_grad_(False)
    rows = BASE if mapped else vocab
    made.attach(torch.randn(rows, HIDDEN, device="cuda"), torch.randn(rows, HIDDEN, device="cuda"))
    return (SequentialDrafter if family == "sequential" else ParallelDrafter)(made, TAU, NOISE_TAU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [29, 1024, 24_576, 49_153])
@pytest.mark.parametrize("temperatures", TEMPERATURES)
@pytest.mark.parametrize("depth", [None, 2])
def test_the_best_of_a_vocabulary(dtype, vocab, temperatures, depth):
    drafter = drafter_of("medusa", vocab, mapped=True)
    logits = (torch.randn(3, 4, vocab, device="cuda") * 3).to(dtype)
    length, rows = torch.tensor([7, 0, 3000], device="cuda"), mixed(temperatures)
    token_map = drafter.heads.token_map
    tokens, logp = top_children(logits, depth, length, drafter.tau, token_map, rows, 10)
    drafter._num_ranks = vocab
    everything = drafter._ranked(logits.clone(), depth, length, rows)
    torch.testing.assert_close(logp, everything.logp[..., :10], rtol=1e-4, atol=1e-4)
    known = torch.empty(3, 4, BASE, device="cuda").scatter_(2, everything.tokens, everything.logp)
    torch.testing.assert_close(known.gather(2, tokens), logp, rtol=1e-4, atol=1e-4)  # equal logits may swap places
    assert all(len(set(place.tolist())) == 10 for place in tokens.flatten(0, 1))


@pytest.mark.parametrize("shared", [False, True])
def test_the_pool(shared):
    torch.manual_seed(1)
    rows, ranks, widths = 3, 8, [8, 5, 31, 0]
    size = ranks * (1 + 8 + 5 + 31)
    plain, fused = (kind(rows, size, torch.device("cuda")) for kind in (Pool, FusedPool))
    beams = 1
    for width in widths:
        logp = torch.randn(rows, 1 if shared else beams, ranks, device="cuda").abs().neg().mul(3)
        logp[0, 0, 3] = -torch.inf
        logp[1, 0, 1] = torch.nan
        logp[2, 0] = 0.0
        tokens = torch.randint(0, BASE, logp.shape, device="cuda")
        wanted, got = plain.grow(tokens, logp, width), fused.grow(tokens, logp, width)
        if width:  # the third row's children tie
            assert torch.equal(wanted[0][:2], got[0][:2])
            assert torch.equal(wanted[1][:2], got[1][:2])
        beams = width
    for name in ("tokens", "depths"):
        assert torch.equal(getattr(plain, name)[:2], getattr(fused, name)[:2])
    assert torch.equal(plain.parents[:2], fused.parents[:2])
    torch.testing.assert_close(plain.scores, fused.scores)
    for mine, other in zip(fused.best(50), plain.best(50), strict=True):
        assert torch.equal(mine[:2], other[:2])


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("temperatures", TEMPERATURES)
@pytest.mark.parametrize("family", ["sequential", "medusa"])
@pytest.mark.parametrize("size", [3, 7, 63])
def test_a_whole_tree(family, temperatures, mapped, size):
    drafter = drafter_of(family, 3000, mapped)
    drafter.size(size, None)
    pending, length = torch.tensor([1, 4, 2], device="cuda"), torch.tensor([7, 0, 30], device="cuda")
    arguments = (None, torch.randn(3, HIDDEN, device="cuda"), pending, length, mixed(temperatures))
    got, want = drafter.using(GpuKernels()).draft(*arguments), drafter.draft(*arguments)
    same = [float((mine == other).float().mean()) for mine, other in zip(got, want, strict=True)]
    assert min(same) > 0.95, same  # nodes of nearly equal probability may swap places


@pytest.mark.parametrize("temperature", [0.0, 0.01])
def test_logits_of_any_kind_give_trees(temperature):
    drafter = drafter_of("medusa", 3000, mapped=False).using(GpuKernels())
    rows = torch.zeros(6, 4, 3000, device="cuda")
    rows[1, :, 2], rows[2, 0, 4], rows[3] = 1e30, -torch.inf, torch.nan
    rows[4, :, :3], rows[5] = torch.inf, -torch.inf
    drafter.heads.logits = lambda hidden: rows
    zeros = torch.zeros(6, dtype=torch.int64, device="cuda")
    drawn = on_gpu(sampling(6, temperature=temperature))
    got = drafter.draft(zeros, torch.zeros(6, HIDDEN, device="cuda"), zeros, zeros, drawn)
    assert bool((got.parents <= torch.arange(63, device="cuda")).all())
    assert bool(((got.tokens >= 0) & (got.tokens < 3000)).all())
    assert got.tokens[1, :3].tolist() == [2, 2, 2]
    assert got.depths[1, :3].tolist() == [1, 2, 3]

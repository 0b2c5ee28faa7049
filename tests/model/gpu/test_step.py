"""The Triton kernels around a step against what they stand for: `pytest -m gpu tests/model/test_fused_step.py`.

Without a GPU, Triton's interpreter runs them too (TRITON_INTERPRET=1, where triton is installed).
"""

import pytest
import torch

from medusa_serve.model.sampling.filters import Sampling, keep_threshold, pick
from tests.model.rows import SETTINGS
from tests.model.test_kernels import same

fused_pick = pytest.importorskip("medusa_serve.model.gpu.pick")

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("setting", [{"temperature": 0.0}, *SETTINGS], ids=str)
@pytest.mark.parametrize("vocab", [37, 9000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nodes_pick_what_rows_pick(setting, vocab, dtype):
    check_picks(setting, vocab, getattr(torch, dtype), 3.0)


@pytest.mark.parametrize("spread", [0.02, 0.5, 1.5, 4.0, 9.0])
@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.99])
def test_top_p_of_distributions_from_flat_to_steep(spread, top_p):
    """From more tokens than can be set aside to a handful."""
    check_picks({"temperature": 0.7, "top_p": top_p}, 9000, torch.float32, spread)


@pytest.mark.parametrize("top_k", [20, 200])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_top_k_where_most_tokens_are_forbidden(top_k, top_p):
    """100 are left: more than are asked for, or fewer."""
    check_picks({"temperature": 1.0, "top_k": top_k, "top_p": top_p}, 9000, torch.float32, 2.0, allowed=100)


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.9])
def test_the_noisiest_that_is_not_left_gives_way_to_one_above_it(top_p):
    """A small top-p refuses most of them: many tries, of few tokens and of all."""
    for spread in (0.1, 2.0):
        check_picks({"temperature": 2.0, "top_p": top_p}, 9000, torch.float32, spread)


def test_a_row_picks_the_same_whatever_others_ask_for():
    """Unfiltered ones in a batch in which somebody has top-p."""
    logits = torch.randn(2, 40, 3000, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    position = torch.arange(80, device=DEVICE).view(2, 40)

    def picked(top_p, filtered):
        one = torch.ones(2, device=DEVICE)
        nucleus, seeds = torch.tensor([1.0, top_p], device=DEVICE), torch.tensor([3, 4], device=DEVICE)
        sampling = Sampling(one, (one * 0).long(), nucleus, one * 0, seeds, True, filtered)
        return fused_pick.pick_nodes(logits, sampling, position)[0]

    alone, beside = picked(1.0, False), picked(0.5, True)
    assert torch.equal(alone[0], beside[0])
    assert not torch.equal(alone[1], beside[1])


def check_picks(setting, vocab, dtype, spread, allowed=None):
    """Sums in another order may put a token at the edge of top-p on the other side, which is what is left out."""
    random = torch.Generator().manual_seed(5)
    rows, nodes = 3, 5
    logits = (spread * torch.randn(rows, nodes, vocab, generator=random)).to(dtype)
    logits[..., vocab if allowed is None else allowed :] = -torch.inf
    position = torch.arange(rows * nodes).view(rows, nodes) * 13 + 2
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | setting

    def row(name, kind, count):
        return torch.full((count,), values[name], dtype=kind)

    def made(count, seeds):
        reals = [row(name, torch.float32, count) for name in ("temperature", "top_p", "min_p")]
        filtered = values["top_k"] > 0 or values["top_p"] < 1 or values["min_p"] > 0
        return Sampling(reals[0], row("top_k", torch.int64, count), *reals[1:], seeds, True, filtered)

    seeds = torch.tensor([5, 2**40 + 3, 2**62])
    flat = made(rows * nodes, seeds.repeat_interleave(nodes))
    want, finite = pick(logits.flatten(0, 1), flat, position.flatten())
    assert finite.all()
    there = Sampling(*(part.to(DEVICE) if torch.is_tensor(part) else part for part in made(rows, seeds)))
    got, best = fused_pick.pick_nodes(logits.to(DEVICE), there, position.to(DEVICE))
    same(best, logits.float().amax(dim=-1))
    differ = (got.cpu().flatten() != want).nonzero().flatten().tolist()
    for place in differ:
        x = logits.flatten(0, 1)[place].float() / values["temperature"]
        top = x.sort(descending=True).values[None]
        edge = keep_threshold(x[None], top, flat._replace(**{
            name: getattr(flat, name)[:1] for name in ("temperature", "top_k", "top_p", "min_p", "seed")
        }))  # fmt: skip
        below = top[0, int((top[0] >= edge).sum()) : int((top[0] >= edge).sum()) + 1]
        assert x[int(got.flatten()[place])] in (edge[0], *below)
    assert len(differ) <= 1


def test_logits_that_are_no_numbers():
    logits = torch.randn(1, 3, 50)
    logits[0, 1, 7] = torch.nan
    logits[0, 2] = -torch.inf
    zero = torch.zeros(1, device=DEVICE)
    sampling = Sampling(zero, zero.long(), zero + 1, zero, zero.long(), True, False)
    picked, best = fused_pick.pick_nodes(logits.to(DEVICE), sampling, torch.zeros(1, 3, device=DEVICE).long())
    assert int(picked[0, 0]) == int(logits[0, 0].argmax())
    assert best[0].isfinite().tolist() == [True, False, False]
    assert ((picked >= 0) & (picked < 50)).all()

"""The draft that is one call finds the tree that SequentialDrafter's own search finds."""

import pytest
import torch

from medusa_serve.model.cpu.int_products import NativeInt4Linear, NativeInt8Linear
from medusa_serve.model.cpu.kernels import CpuKernels
from medusa_serve.model.drafting.drafters import SequentialDrafter
from medusa_serve.model.drafting.heads import SequentialHeads
from medusa_serve.model.weights.int4 import Int4Linear
from medusa_serve.model.weights.int8 import Int8Linear, quantize_linears
from tests.model.rows import sampling

BASE, DRAFTED, HIDDEN = 800, 512, 32


def drafter_of(mapped=True, four=NativeInt4Linear, eight=NativeInt8Linear, **sizes):
    torch.manual_seed(0)
    token_map = torch.randperm(BASE)[:DRAFTED] if mapped else None
    heads = SequentialHeads(HIDDEN, inner=32, readout=64, token_map=token_map, **sizes).bfloat16()
    for parameter in heads.requires_grad_(False).parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    heads.attach(torch.randn(BASE, HIDDEN).bfloat16(), torch.randn(BASE, heads.embed_size).bfloat16())
    heads.output.to_int4(four)
    quantize_linears(heads, eight)
    return SequentialDrafter(heads, tau=[0.8, 1.1, 1.3, 1.0, 0.9])


def drafted(drafter, rows, nodes, hidden=None):
    generator = torch.Generator().manual_seed(rows)
    if hidden is None:
        hidden = torch.randn(rows, HIDDEN * drafter.heads.hidden_inputs, generator=generator).bfloat16()
    pending = torch.randint(BASE, (rows,), generator=generator)
    return drafter.draft(torch.arange(rows), hidden, pending, torch.full((rows,), 9), sampling(rows), nodes)


def paths(found) -> list[set[tuple[int, ...]]]:
    """Of each row the nodes as the tokens from the root to them."""
    rows = []
    for tokens, parents, depths in zip(*(part.tolist() for part in found), strict=True):
        known = [()]
        for token, parent, depth in zip(tokens, parents, depths, strict=True):
            known.append((*known[parent], token))  # a parent stands before its children
            assert len(known[-1]) == depth
        assert len(set(known)) == len(known)
        rows.append(set(known))
    return rows


@torch.inference_mode()
@pytest.mark.parametrize(
    "sizes",
    [{}, {"hidden_inputs": 3}, {"layers": 2}, {"width": 64}, {"embed_size": 96}, {"mapped": False}],
    ids=str,
)
def test_the_tree_is_the_searches(sizes):
    drafter = drafter_of(**sizes)
    for rows, nodes in ((1, 1), (1, 3), (3, 7), (2, 15), (1, 40)):
        wanted = drafted(drafter, rows, nodes)
        native = drafter.using(CpuKernels())
        assert native._at_once is not None
        got = drafted(native, rows, nodes)
        assert got.tokens.shape == wanted.tokens.shape
        for mine, theirs, first, two in zip(
            paths(got), paths(wanted), got.tokens[:, 0].tolist(), wanted.tokens[:, :2].tolist(), strict=True
        ):
            assert len(mine & theirs) >= 0.9 * len(theirs)  # logits in bfloat16 tie, and either may be taken
            assert first in two


@torch.inference_mode()
def test_hidden_states_that_are_no_numbers_still_give_a_tree():
    drafter = drafter_of().using(CpuKernels())
    hidden = torch.randn(2, HIDDEN).bfloat16()
    alone = drafted(drafter, 2, 7, hidden)
    hidden[1, 3] = torch.nan
    found = drafted(drafter, 2, 7, hidden)
    assert ((found.parents >= 0) & (found.parents <= torch.arange(7))).all()
    assert ((found.tokens >= 0) & (found.tokens < BASE)).all()
    for one, other in zip(found, alone, strict=True):
        assert torch.equal(one[0], other[0])  # the other row's tree is its own


@torch.inference_mode()
def test_sampled_rows_and_other_heads_keep_the_search():
    drafter = drafter_of().using(CpuKernels())
    drafter._at_once.run = None  # whoever calls it fails
    hot = sampling(1, temperature=0.8)
    drafter.draft(torch.zeros(1), torch.randn(1, HIDDEN).bfloat16(), torch.tensor([5]), torch.tensor([9]), hot, 3)
    for other in ({"four": Int4Linear}, {"eight": Int8Linear}):
        assert drafter_of(**other).using(CpuKernels())._at_once is None

"""The Triton kernels against the reference: `pytest -m gpu tests/model/test_splitk.py`."""

import pytest
import torch

from medusa_serve.model.drafting.tree import Tree, most_probable
from medusa_serve.model.forward.attention import reference_attention
from medusa_serve.model.forward.view import ancestor_bits, tree_view
from medusa_serve.model.gpu.attention import available, tree_attention
from tests.oracles import DEFAULT_RANKS

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def test_ancestor_bits_hold_64_nodes():
    tree = torch.zeros(1, 64, 64, dtype=torch.bool)
    tree[0, 63] = True
    tree[0, 5, [0, 5, 63]] = True
    bits = ancestor_bits(tree)[0]
    for node in (5, 63):
        assert [j for j in range(64) if (int(bits[node]) >> j) & 1] == tree[0, node].nonzero().flatten().tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "value_dim"), [(9, 3, 64, 64), (32, 8, 128, 128), (4, 4, 80, 48)])
@pytest.mark.parametrize("nodes", [1, 4, 24, 64])
@pytest.mark.parametrize("window", [None, 33])
def test_it_equals_the_reference(dtype, heads, kv_heads, dim, value_dim, nodes, window):
    device = torch.device("cuda")
    assert available(device)
    generator = torch.Generator(device).manual_seed(nodes)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device=device).to(dtype)

    slots, columns = 7, 1100
    chosen, lengths = [3, 0, 6, 5], [0, 1, 517, 1030]
    keys, values = random(slots, columns, kv_heads, dim), random(slots, columns, kv_heads, value_dim)
    for slot, length in zip(chosen, lengths, strict=True):  # nothing behind a row's nodes may matter
        keys[slot, length + nodes :] = torch.nan
        values[slot, length + nodes :] = torch.nan
    query = random(4, nodes, heads, dim).transpose(1, 2)
    paths = most_probable(DEFAULT_RANKS, nodes - nodes // 4)
    draft = Tree(paths, nodes // 4).draft(torch.zeros(4, nodes, dtype=torch.int64, device=device))
    ids = torch.tensor(chosen, device=device)
    view = tree_view(ids, torch.tensor(lengths, device=device), chosen, lengths, draft)
    got = tree_attention(query, keys, values, view, 0.11, window)
    clean = [torch.nan_to_num(slab) for slab in (keys, values)]
    want = reference_attention(query.double(), clean[0].double(), clean[1].double(), view, 0.11, window)
    error = float((got.double() - want).norm() / want.norm())
    assert error < TOLERANCE[dtype], error

import pytest
import torch

from medusa_serve.model.attention import _by_batch, _by_row, attend, chain_view, make_view, reference_attention
from medusa_serve.model.tree import Tree

TREE = Tree(((0,), (1,), (0, 0), (0, 1)), num_lookup=3)


def setting(dtype=torch.float64, heads=6, kv_heads=2, slots=5, columns=40):
    generator = torch.Generator().manual_seed(0)
    tensors = TREE.tensors(2, 2, torch.device("cpu"))
    view = make_view([3, 0, 4], [7, 19, 1], tensors.depths, tensors.mask)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    query = random(3, heads, TREE.num_nodes, 8)
    return query, random(slots, columns, kv_heads, 8), random(slots, columns, kv_heads, 5), view


@pytest.mark.parametrize("window", [None, 4, 10])
@pytest.mark.parametrize("fast", [_by_row, _by_batch])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_fast_paths_equal_the_reference(fast, window, kv_heads):
    query, keys, values, view = setting(kv_heads=kv_heads)
    want = reference_attention(query, keys, values, view, 0.3, window)
    torch.testing.assert_close(fast(query, keys, values, view, 0.3, window), want)


def test_each_node_sees_its_history_itself_and_its_ancestors():
    """The oracle spelled out: node by node, key by key, without a mask."""
    query, keys, values, view = setting(heads=2, kv_heads=2)
    got = attend(query, keys, values, view, 0.3)
    for row, (slot, length) in enumerate(zip(view.host_slots, view.host_length, strict=True)):
        for node in range(TREE.num_nodes):
            family, at = [node], node
            while at:
                at = TREE.parents[at]
                family.append(at)
            columns = [*range(length), *(length + index for index in family)]
            for head in range(2):
                weights = (keys[slot, columns, head] @ query[row, head, node] * 0.3).softmax(0)
                torch.testing.assert_close(got[row, node, head], weights @ values[slot, columns, head])


def test_windows_compare_positions_not_columns():
    """With a window of 2 a node of depth 2 sees its parent and itself, though its column is further behind."""
    view = make_view([0], [5], torch.tensor(TREE.depths), TREE.tensors(2, 2, torch.device("cpu")).mask)
    seen = view.visible(2)[0]
    assert seen[3].nonzero().flatten().tolist() == [5 + 1, 5 + 3]
    assert seen[0].nonzero().flatten().tolist() == [4, 5]
    assert seen[7].nonzero().flatten().tolist() == [5 + 6, 5 + 7]


def test_every_row_sees_itself_even_in_an_empty_slot():
    view = chain_view([0, 1], [0, 9], 1, torch.device("cpu"))
    assert bool(view.visible(None).any(dim=-1).all())


def test_garbage_behind_a_sequence_does_not_matter():
    query, keys, values, view = setting()
    want = attend(query, keys, values, view, 0.3)
    for slot, length in zip(view.host_slots, view.host_length, strict=True):
        keys[slot, length + TREE.num_nodes :] = torch.nan
        values[slot, length + TREE.num_nodes :] = torch.nan
    torch.testing.assert_close(attend(query, keys, values, view, 0.3), want)


def test_soft_cap_and_sinks():
    query, keys, values, view = setting(heads=2, kv_heads=1)
    capped = attend(query, keys, values, view, 0.3, softcap=1e9)
    torch.testing.assert_close(capped, attend(query, keys, values, view, 0.3))
    sinks = torch.full((2,), -1e9, dtype=query.dtype)
    torch.testing.assert_close(
        attend(query, keys, values, view, 0.3, sinks=sinks), attend(query, keys, values, view, 0.3)
    )
    swallowed = attend(query, keys, values, view, 0.3, sinks=torch.full((2,), 1e9, dtype=query.dtype))
    assert float(swallowed.abs().max()) < 1e-12

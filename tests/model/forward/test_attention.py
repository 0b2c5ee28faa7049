import pytest
import torch

from medusa_serve.model.drafting.tree import Tree
from medusa_serve.model.forward.attention import _by_batch, _by_row, attend, reference_attention
from medusa_serve.model.forward.view import chain_view, tree_view

TREE = Tree(((0,), (1,), (0, 0), (0, 1)), num_lookup=3)


def view_of(slots: list[int], lengths: list[int]):
    draft = TREE.draft(torch.zeros(len(slots), TREE.num_nodes, dtype=torch.int64))
    return tree_view(torch.tensor(slots), torch.tensor(lengths), slots, lengths, draft)


def setting(dtype=torch.float64, heads=6, kv_heads=2, slots=5, columns=40):
    generator = torch.Generator().manual_seed(0)
    view = view_of([3, 0, 4], [7, 19, 1])

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
    view = view_of([0], [5])
    seen = view.visible(2)[0]
    assert seen[3].nonzero().flatten().tolist() == [5 + 1, 5 + 3]
    assert seen[0].nonzero().flatten().tolist() == [4, 5]
    assert seen[7].nonzero().flatten().tolist() == [5 + 6, 5 + 7]


def test_every_row_sees_itself_even_in_an_empty_slot():
    view = chain_view([0, 1], [0, 9], [1, 1], torch.device("cpu"))
    assert bool(view.visible(None).any(dim=-1).all())


def test_a_padded_prefill_equals_one_row_at_a_time():
    """Runs of 3, 1 and 5 tokens at the right end of one pass; the padding writes to a scratch column."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(3, 40, 2, 8, generator=generator), torch.randn(3, 40, 2, 8, generator=generator)
    query = torch.randn(3, 4, 5, 8, generator=generator)
    starts, counts = [4, 0, 9], [3, 1, 5]
    view = chain_view([2, 0, 1], starts, counts, torch.device("cpu"), scratch=39)
    assert view.columns.tolist() == [[39, 39, 4, 5, 6], [39, 39, 39, 39, 0], [9, 10, 11, 12, 13]]
    together = _by_batch(query, keys, values, view, 0.3, None)
    assert bool(torch.isfinite(together).all())
    for row, (slot, start, count) in enumerate(zip([2, 0, 1], starts, counts, strict=True)):
        alone = chain_view([slot], [start], [count], torch.device("cpu"))
        want = _by_row(query[row : row + 1, :, -count:], keys, values, alone, 0.3, None)
        torch.testing.assert_close(together[row : row + 1, -count:], want)


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

import pytest
import torch

from medusa_serve.model.forward.slab import SlotCache


def cache(dtype: torch.dtype = torch.float32) -> SlotCache:
    made = SlotCache([(1, 1, 1)] * 2, slots=3, columns=16, dtype=dtype, device=torch.device("cpu"))
    made.keys[:] = torch.arange(made.keys.numel()).view_as(made.keys)
    made.values[:] = -made.keys
    return made


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # torch's operations, and a kernel


@DTYPES
def test_the_drawing_in_the_docstring(dtype):
    """Length 7, nodes 0 1 3: columns 7 8 9 hold r a c afterwards; other slots and columns are untouched."""
    made = cache(dtype)
    before = made.keys.clone()
    made.commit(torch.tensor([1]), torch.tensor([7]), torch.tensor([[0, 1, 3]]))
    expected = before.clone()
    expected[:, 1, 9] = before[:, 1, 10]
    assert torch.equal(made.keys, expected)
    assert torch.equal(made.values, -expected)


@DTYPES
def test_overlapping_moves_read_before_they_write(dtype):
    made = cache(dtype)
    before = made.keys.clone()
    made.commit(torch.tensor([0, 2]), torch.tensor([3, 5]), torch.tensor([[0, 2, 3], [0, 1, 4]]))
    assert torch.equal(made.keys[:, 0, 3:6], before[:, 0, [3, 5, 6]])
    assert torch.equal(made.keys[:, 2, 5:8], before[:, 2, [5, 6, 9]])


def test_what_stands_behind_a_path_moves_nothing_of_it():
    made = cache(torch.bfloat16)
    before = made.keys.clone()
    made.commit(torch.tensor([0, 2]), torch.tensor([0, 5]), torch.tensor([[0, 2, 0, -1], [0, 1, 3, 2]]))
    assert torch.equal(made.keys[:, 0, :2], before[:, 0, [0, 2]])
    assert torch.equal(made.keys[:, 2, 5:8], before[:, 2, [5, 6, 8]])
    assert torch.equal(made.keys[:, 1], before[:, 1])


def test_write_puts_rows_behind_the_length_and_returns_the_layer():
    made = cache()
    new = torch.tensor([[[[100.0], [101.0]]], [[[200.0], [201.0]]]])  # (B 2, kv_heads 1, N 2, dim 1)
    keys, values = made.write(1, torch.tensor([2, 0]), torch.tensor([[4, 5], [9, 10]]), new, new + 0.5)
    assert keys[2, 4:6, 0, 0].tolist() == [100, 101]
    assert keys[0, 9:11, 0, 0].tolist() == [200, 201]
    assert values[2, 4, 0, 0] == 100.5
    assert keys.data_ptr() == made.keys[1].data_ptr()


def test_zero_wipes_one_slot():
    made = cache()
    made.keys[:, 1] = torch.nan
    made.zero(1)
    assert bool((made.keys[:, 1] == 0).all())
    assert bool((made.keys[:, 2] != 0).all())

"""Groups of inputs as whole numbers of 16 bits and a power of two."""

import pytest
import torch
from numba import njit

from medusa_serve.model.cpu.base import OPTIONS
from medusa_serve.model.cpu.int16_inputs import SUMMARY, to_int16

GROUP = 32


@njit(**OPTIONS)
def run(x, groups, numbers, facts):
    to_int16(x, groups, numbers, facts)


def of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (G, 32) → numbers (G, 32) int64, of each group scale, scaled sum, minus eight times the sum"""
    x = x.bfloat16().contiguous()
    numbers, facts = torch.empty(len(x), GROUP, dtype=torch.int16), torch.empty(len(x), SUMMARY, dtype=torch.int32)
    run(x.data_ptr(), len(x), numbers.data_ptr(), facts.data_ptr())
    scale, scaled = facts[:, :2].contiguous().view(torch.float32).unbind(1)
    return numbers.long(), scale, scaled, facts[:, 2].long()


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_numbers_near_the_largest_are_exact(size):
    torch.manual_seed(0)
    x = (torch.randn(50, GROUP) * size).bfloat16()
    numbers, scale, scaled, eight = of(x)
    back, largest = numbers.double() * scale.double()[:, None], x.double().abs().amax(1, keepdim=True)
    near = x.double().abs() >= largest / 64
    assert torch.equal(back[near], x.double()[near])
    assert ((back - x.double()).abs() <= largest * 2**-15).all()
    assert numbers.abs().max() < 2**15
    assert torch.equal(numbers.sum(1) * -8, eight)
    torch.testing.assert_close(scaled.double(), back.sum(1), rtol=1e-6, atol=0)


def test_zeros_and_what_is_next_to_them_are_zeros():
    x = torch.zeros(3, GROUP).bfloat16()
    x[1, 4], x[2, 5] = 1e-39, torch.finfo(torch.bfloat16).tiny
    numbers, scale, scaled, _ = of(x)
    assert scale.isfinite().all()
    assert (numbers.double() * scale.double()[:, None] - x.double()).abs().max() < 1e-37
    assert scaled.abs().max() < 1e-37


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_group_with_a_bad_number_has_no_scale(bad):
    x = torch.ones(3, GROUP).bfloat16()
    x[1, 31] = bad
    _, scale, scaled, _ = of(x)
    assert scale.isnan().tolist() == scaled.isnan().tolist() == [False, True, False]


def test_the_largest_numbers_fit():
    x = torch.full((2, GROUP), torch.finfo(torch.bfloat16).max).bfloat16()
    x[1] = -x[1]
    numbers, scale, *_ = of(x)
    assert torch.equal(numbers.double() * scale.double()[:, None], x.double())

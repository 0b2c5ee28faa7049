"""Products of our own give what torch's give, each row the same bits whatever the others are."""

import pytest
import torch
from torch import nn

from medusa_serve.model.cpu import int_products as native_products
from medusa_serve.model.cpu.int_products import NativeInt4Linear, NativeInt8Linear
from medusa_serve.model.cpu.threads import Threads, threads
from medusa_serve.model.cpu.workers import openmp_address
from medusa_serve.model.weights.int4 import Int4Linear
from medusa_serve.model.weights.int8 import Int8Linear, quantize_linears
from tests.model.weights.test_int4 import eight_bits, four_bits, linear

SHAPES = [(16, 32), (48, 64), (192, 576), (80, 96), (2064, 64)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize(("make", "bits"), [(four_bits, 4), (eight_bits, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_int4_products_are_torchs(rows, columns, make, bits, bias):
    torch.manual_seed(0)
    given = linear(make(rows, columns), bias)
    layer, reference = NativeInt4Linear.of(given), Int4Linear.of(given)
    assert (layer.bits, layer.in_features, layer.out_features) == (bits, columns, rows)
    x = torch.randn(2, 7, columns)
    got, wanted = layer(x), reference(x)
    assert (got.shape, got.dtype) == (wanted.shape, torch.bfloat16)
    torch.testing.assert_close(got, wanted, rtol=2**-6, atol=2**-7 * float(wanted.abs().max()))
    if rows < 1000:
        error = (layer.dense().double() - given.weight.double()).abs().max()
        assert error < 2**-7 * given.weight.abs().max()  # bfloat16 rounds scales and what is made of them


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_int8_products_are_torchs(rows, columns, bias):
    torch.manual_seed(0)
    given = nn.Linear(columns, rows, bias=bias).requires_grad_(False)
    layer, reference, x = NativeInt8Linear.of(given), Int8Linear.of(given), torch.randn(2, 7, columns)
    assert (layer.in_features, layer.out_features) == (columns, rows)
    torch.testing.assert_close(layer(x), reference(x), rtol=2**-6, atol=2**-8)


def test_other_shapes_stay_torchs():
    both = nn.Sequential(nn.Linear(32, 17), nn.Linear(64, 32))
    quantize_linears(both, NativeInt8Linear)
    assert [type(layer) for layer in both] == [Int8Linear, NativeInt8Linear]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kind", [NativeInt4Linear, NativeInt8Linear])
def test_no_row_sees_the_others(kind, threads, monkeypatch):
    monkeypatch.setattr(Threads, "count", lambda self: threads)
    torch.manual_seed(0)
    layer, x = kind.of(linear(four_bits(208, 576))), torch.randn(70, 576)  # 13 units: no number of threads divides them
    together = layer(x)
    assert torch.equal(torch.cat([layer(row[None]) for row in x]), together)
    for count in (2, 3, 4, 5, 7, 8, 31, 65):
        for start in (0, 1, 70 - count):
            assert torch.equal(layer(x[start : start + count]), together[start : start + count])


def test_without_openmp_one_thread_does_it(monkeypatch):
    torch.manual_seed(0)
    layer, x = NativeInt4Linear.of(linear(four_bits(96, 64))), torch.randn(5, 64)
    wanted = layer(x)
    monkeypatch.setattr(native_products, "threads", lambda: Threads([]))
    assert native_products.threads().count() == 1
    assert torch.equal(layer(x), wanted)


def test_numbers_that_are_none_stay_so():
    layer = NativeInt4Linear.of(linear(four_bits(32, 64)))
    x = torch.ones(3, 64)
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    assert layer(x).isfinite().all(dim=1).tolist() == [True, False, False]


def test_a_merged_product_is_the_separate_ones():
    torch.manual_seed(0)
    parts = [NativeInt4Linear.of(linear(eight_bits(rows, 64))) for rows in (48, 64, 16)]
    x = torch.randn(1, 5, 64).bfloat16()
    wanted = torch.cat([part(x) for part in parts], dim=-1)
    assert NativeInt4Linear.can_merge(parts)
    whole = NativeInt4Linear.merged(parts)
    assert torch.equal(whole(x), wanted)
    assert torch.equal(torch.cat([part(x) for part in parts], dim=-1), wanted)
    assert parts[1].packed.untyped_storage().data_ptr() == whole.packed.untyped_storage().data_ptr()


def test_the_threads_are_torchs():
    assert threads().count() == (torch.get_num_threads() if openmp_address("GOMP_barrier") else 1)

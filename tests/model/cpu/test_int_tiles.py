"""A tile is the same bits by the processor's own instructions for pairs and by plain ones, in vectors of any width."""

import pytest
import torch
from numba import njit

from medusa_serve.model.cpu import int_tiles as native_tile
from medusa_serve.model.cpu.base import OPTIONS
from medusa_serve.model.cpu.int16_inputs import SUMMARY, to_int16
from medusa_serve.model.cpu.int_products import NativeInt4Linear
from medusa_serve.model.cpu.int_tiles import Int4Tile, Int8Tile, lanes_here, tiles
from tests.model.weights.test_int4 import eight_bits, four_bits, linear

OUTPUTS, INPUTS = 16, 96


@pytest.mark.parametrize(("make", "kind"), [(four_bits, Int4Tile), (eight_bits, Int8Tile)])
@pytest.mark.parametrize("vectors", [(8, False), (16, False), (8, True)])
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_other_processors_get_the_same_bits(make, kind, rows, vectors, monkeypatch):
    if vectors[1] and not lanes_here()[1]:
        pytest.skip("this processor multiplies no pairs")
    torch.manual_seed(0)
    monkeypatch.setattr(native_tile, "lanes_here", lambda: vectors)
    tile = tiles(kind)

    @njit(**OPTIONS)
    def run(x, numbers, facts, packed, scales, out):
        to_int16(x, rows * INPUTS // 32, numbers, facts)
        tile(rows, numbers, INPUTS, facts, packed, scales, out, OUTPUTS)

    layer, x = NativeInt4Linear.of(linear(make(OUTPUTS, INPUTS))), torch.randn(rows, INPUTS).bfloat16()
    numbers, facts = torch.empty(rows, INPUTS, dtype=torch.int16), torch.empty(rows, INPUTS // 32 * SUMMARY).int()
    out = torch.empty(rows, OUTPUTS, dtype=torch.bfloat16)
    run(*(each.data_ptr() for each in (x, numbers, facts, layer.packed, layer.scales, out)))
    monkeypatch.undo()
    assert torch.equal(out, layer(x))


@pytest.mark.parametrize("make", [four_bits, eight_bits])
def test_inputs_of_very_different_size(make):
    """As a model's hidden states are: one number of a group a thousand times the others."""
    torch.manual_seed(0)
    given, x = linear(make(64, 576)), torch.randn(5, 576).bfloat16()
    x[:, 40] *= 1000
    x[:, 300] *= 100
    got = NativeInt4Linear.of(given)(x).double()
    scaled = NativeInt4Linear.of(given).dense().double()
    wanted = x.double() @ scaled.T
    assert float((got - wanted).norm() / wanted.norm()) < 2**-8

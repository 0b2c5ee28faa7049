"""The kernels around a CPU's greedy step against what they stand for."""

import pytest
import torch

from medusa_serve.model.cpu import step as native_tables
from tests.model.step_tables import SHAPES, check_keep_heads, check_open_and_close

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rest", [False, True])
def test_open_and_close(shape, seed, rest):
    check_open_and_close(native_tables, CPU, shape, seed, rest)


def test_keep_heads():
    check_keep_heads(native_tables, CPU)

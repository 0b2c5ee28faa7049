"""Muon of stacks against singular values and torch's own: python -m pytest tests/training/test_muon.py"""

import pytest
import torch

from medusa_serve.training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(2, 3, 24, 40), (40, 24), (16, 16)], ids=["stack", "tall", "square"])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_singular_vectors_stay_and_singular_values_are_about_one(shape, dtype, near):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    values = left.mT @ orthogonal(matrices, dtype) @ right.mT
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    assert float((values - torch.diag_embed(diagonal)).abs().max()) < near
    assert float(diagonal.min()) > 0.3  # the smallest values of a square one are far from one after five rounds
    assert float(diagonal.max()) < 1.3
    assert float(diagonal.median()) > 0.6


def test_zeros_stay_zeros():
    assert not orthogonal(torch.zeros(2, 4, 6), torch.float32).any()


def test_each_matrix_of_a_stack_learns_as_with_torchs_muon():
    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(2, 24, 40))
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    mine = Muon([stack], 0.01, torch.float32)
    theirs = torch.optim.Muon(alone, lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        gradient = torch.randn(2, 24, 40)
        stack.grad = 8.0 * gradient
        for matrix, part in zip(alone, gradient, strict=True):
            matrix.grad = part.clone()
        before = stack.detach().clone()
        mine.step(0.1, torch.tensor(0.0), torch.tensor(8.0))
        theirs.step()
        assert float((stack.detach() - before).abs().mean()) > 0.01
    # theirs is made orthogonal in bfloat16
    torch.testing.assert_close(stack.detach(), torch.stack([matrix.detach() for matrix in alone]), rtol=0, atol=0.005)


def test_a_step_of_bad_gradients_changes_neither_weights_nor_momentum():
    stack = torch.nn.Parameter(torch.randn(2, 4, 6))
    muon = Muon([stack], 0.01, torch.float32)
    stack.grad = torch.randn(2, 4, 6)
    muon.step(0.1, torch.tensor(0.0), torch.tensor(1.0))
    before = [stack.detach().clone(), muon.moments[0].clone()]
    assert before[1].any()
    stack.grad = torch.full((2, 4, 6), torch.nan)
    muon.step(0.1, torch.tensor(1.0), torch.tensor(torch.nan))
    assert torch.equal(stack.detach(), before[0])
    assert torch.equal(muon.moments[0], before[1])

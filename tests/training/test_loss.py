"""The chunked loss against every logit at once, values and gradients.

pytest tests/training/test_loss.py
"""

import pytest
import torch

from medusa_serve.training.loss import Output, soft_loss
from tests.oracles import plain_loss


def case(rows=13, depths=4, hidden=6, vocab=11, dtype=torch.float64, **output):
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    place = torch.tensor([0, 1, 2, 3, 4, 0, 0, 1, 0, 1, 2, 3, 4][:rows])  # sequences of 5, 1, 2 and 5 rows
    weights = 0.8 ** torch.arange(depths, dtype=dtype)
    features = normal(rows, depths, hidden).requires_grad_()
    return features, normal(rows, hidden), place, Output(normal(vocab, hidden), **output), weights


@pytest.mark.parametrize("chunk", [1, 3, 5, 100, None])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_value_and_gradients_equal_the_plain_loss(chunk, temperature):
    features, teacher, place, output, weights = case(bias=torch.linspace(-1, 1, 11, dtype=torch.float64))
    plain = plain_loss(features, teacher, place, output, weights, temperature)
    plain.backward()
    got = soft_loss(
        features.detach(), teacher, place, output, weights, scale=16.0, temperature=temperature, chunk=chunk
    )
    torch.testing.assert_close(got.total, plain.detach())
    torch.testing.assert_close(got.grad / 16, features.grad)


def test_a_soft_cap_is_part_of_the_gradient():
    features, teacher, place, output, weights = case(softcap=3.0)
    plain = plain_loss(features, teacher, place, output, weights)
    plain.backward()
    got = soft_loss(features.detach(), teacher, place, output, weights, chunk=4)
    torch.testing.assert_close(got.grad, features.grad)


def test_no_gradient_where_a_depth_has_no_target():
    features, teacher, place, output, weights = case()
    got = soft_loss(features.detach(), teacher, place, output, weights, chunk=4)
    left = [5, 4, 3, 2, 1, 1, 2, 1, 5, 4, 3, 2, 1]
    for row, count in enumerate(left):
        assert bool(got.grad[row, :count].abs().sum(dim=-1).gt(0).all()), row
        assert got.grad[row, count:].abs().sum() == 0, row


def test_per_depth_means_are_cross_entropies():
    features, teacher, place, output, weights = case()
    got = soft_loss(features.detach(), teacher, place, output, weights)
    p, log_q = output.log_probs(teacher).exp(), output.log_probs(features.detach())
    by_hand = torch.stack([-(p[row + 3] * log_q[row, 3]).sum() for row in (0, 1, 8, 9)]).mean()
    torch.testing.assert_close(got.per_depth[3], by_hand)


def test_half_precision_stays_close_and_does_not_vanish():
    features, teacher, place, output, weights = case(dtype=torch.float32)
    exact = soft_loss(features.detach(), teacher, place, output, weights)
    half = Output(output.weight.half())
    got = soft_loss(features.detach(), teacher.half(), place, half, weights, scale=4096.0)
    torch.testing.assert_close(got.grad / 4096, exact.grad, rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_gradient_does_not_need_the_value(softcap):
    features, teacher, place, output, weights = case(softcap=softcap)
    options = {"temperature": 0.7, "chunk": 4}
    whole = soft_loss(features.detach(), teacher, place, output, weights, scale=8.0, **options)
    without = soft_loss(features.detach(), teacher, place, output, weights, scale=8.0, value=False, **options)
    assert torch.equal(without.grad, whole.grad)
    assert without.total.isnan()
    assert without.per_depth.isnan().all()
    torch.testing.assert_close(whole.total, plain_loss(features, teacher, place, output, weights, 0.7).detach())


def test_the_value_is_right_where_logits_are_large():
    """log q is never made, also for a student that is sure of a token to which the teacher gives nothing."""
    features, teacher, place, output, weights = case(dtype=torch.float32)
    got = soft_loss(60 * features.detach(), 60 * teacher, place, output, weights)
    wide = Output(output.weight.double())
    exact = plain_loss(60 * features.detach().double(), 60 * teacher.double(), place, wide, weights.double())
    torch.testing.assert_close(got.total, exact.double(), rtol=1e-4, atol=0)


def test_a_depth_beyond_every_sequence_costs_nothing():
    features, teacher, _, output, weights = case(rows=3)
    got = soft_loss(features.detach(), teacher, torch.tensor([0, 0, 0]), output, weights)
    assert got.per_depth[1:].tolist() == [0, 0, 0]
    assert torch.isfinite(got.total)

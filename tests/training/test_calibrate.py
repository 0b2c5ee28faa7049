"""Ranks, tables and forecasts against walks by hand.

pytest tests/training/test_calibrate.py
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medusa_serve.model.drafting.heads import MedusaHeads
from medusa_serve.model.drafting.tree import most_probable
from medusa_serve.model.sampling.noise import gumbel
from medusa_serve.training.calibrate import (
    NONE,
    PAST_END,
    Noise,
    Ranks,
    accepted,
    conditional_ranks,
    fit_tau,
    forecast,
    tokens_per_step,
    top_shares,
    true_ranks,
)
from medusa_serve.training.finish import Subject, calibrate_tau, measure
from medusa_serve.training.loss import Output
from medusa_serve.training.teacher import Teacher
from tests.training.toy import HIDDEN, VOCAB, Toy, pack


def random_ranks(seed=0, depths=4):
    random = np.random.default_rng(seed)
    counts = random.integers(1, 30, size=20)
    rank = random.geometric(0.5, size=(counts.sum(), depths)) - 1
    rank[random.random(rank.shape) < 0.1] = NONE
    row = 0
    for count in counts:
        for i in range(count):
            rank[row + i, count - i :] = PAST_END
        row += count
    return Ranks(rank, counts)


def test_the_forecast_is_a_brute_force_walk():
    """Each answer, each step: go down the tree's paths as long as one holds the true ranks, then emit one more."""
    ranks = random_ranks()
    table = conditional_ranks(ranks)
    for size, got in forecast(ranks).items():
        paths = set(most_probable(table, size))
        steps = emitted = first = 0
        for count in ranks.count:
            done = 0
            while done < count:
                right = 0
                while right < 4 and tuple(ranks.rank[first + done, : right + 1].tolist()) in paths:
                    right += 1
                done, steps = done + right + 1, steps + 1
            emitted, first = emitted + count, first + count
        assert got == pytest.approx(emitted / steps)
    values = list(forecast(ranks).values())
    assert values == sorted(values)
    assert values[-1] > 1.5


def test_accepted_counts_the_draft_tokens_that_are_right():
    paths = ((0,), (1,), (0, 0), (1, 2))
    rows = [
        [0, 0, 0],
        [0, 1, 0],
        [1, 2, 0],
        [1, 0, 0],
        [2, 0, 0],
        [PAST_END] * 3,
        [0, PAST_END, PAST_END],
        [NONE, 0, 0],
    ]
    assert accepted(np.array(rows), paths).tolist() == [2, 1, 2, 1, 0, 0, 1, 0]
    assert accepted(np.array(rows), ()).tolist() == [0] * 8


def test_a_tree_of_the_root_alone_is_plain_decoding():
    assert tokens_per_step(random_ranks(), ()) == 1.0


def test_conditional_ranks_look_only_at_rows_whose_earlier_tokens_were_candidates():
    rank = np.array([[0, 1], [0, 0], [NONE, 0], [1, 0], [0, PAST_END]])
    table = conditional_ranks(Ranks(rank, np.array([5])), num_ranks=3)
    assert table[0] == pytest.approx([0.6, 0.2, 1e-6])
    assert table[1] == pytest.approx([2 / 3, 1 / 3, 1e-6])


def test_top_shares_count_every_position_with_a_target():
    rank = np.array([[0, 1], [4, PAST_END], [NONE, 7], [0, 0]])
    ranks = Ranks(rank, np.array([4]))
    assert top_shares(ranks, 1) == pytest.approx([0.5, 1 / 3])
    assert top_shares(ranks, 5) == pytest.approx([0.75, 2 / 3])


def test_chosen_keeps_the_rows_of_the_sequences():
    ranks = random_ranks()
    mask = np.random.default_rng(0).random(len(ranks.count)) < 0.3
    kept, others = ranks.chosen(mask), ranks.chosen(~mask)
    assert kept.count.sum() == len(kept.rank) > 0
    assert kept.count.sum() + others.count.sum() == ranks.count.sum()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_true_ranks_are_those_of_a_sort(temperature):
    random = torch.Generator().manual_seed(0)
    features, weight = torch.randn(7, 2, 5, generator=random), torch.randn(9, 5, generator=random)
    token_map = torch.tensor([20, 3, 7, 11, 2, 30, 8, 1, 0])
    targets = torch.tensor([[20, 3], [7, 99], [0, 1], [2, 2], [30, 8], [11, 11], [3, 20]])
    left = torch.tensor([2, 2, 2, 1, 2, 2, 2])
    seed, position = torch.arange(7) * 13, torch.arange(7) + 5
    noise = Noise(torch.full((7,), temperature), seed, position) if temperature else None
    got = true_ranks(features, targets, left, Output(weight), token_map, 100, noise)
    for row in range(7):
        for depth in range(2):
            z = weight @ features[row, depth]
            if temperature:
                z = z / temperature + gumbel(seed[row], position[row] + depth, token_map)
            order = token_map[z.argsort(descending=True)].tolist()
            target = int(targets[row, depth])
            want = PAST_END if depth >= left[row] else order.index(target) if target in order else NONE
            assert got[row, depth] == want, (row, depth)


def test_equal_logits_have_ranks_of_their_own():
    targets = torch.arange(4)[:, None]
    got = true_ranks(torch.ones(4, 1, 2), targets, torch.ones(4), Output(torch.ones(4, 2)), None, 4)
    assert got.flatten().tolist() == [0, 1, 2, 3]


def picks(z, tau, extra):
    """What a base picks whose scores are the heads' own plus unknown ones: argmax(z + extra + tau · Gumbel), which
    given z and extra is a draw from softmax((z + extra) / tau)."""
    surprise = -torch.empty(z.shape).exponential_(generator=torch.Generator().manual_seed(1)).log()
    return (z + extra + tau * surprise).argmax(dim=-1)


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.5])
def test_tau_of_greedy_answers_is_found(tau):
    z = torch.randn(4000, 12, generator=torch.Generator().manual_seed(0)) * 2
    assert fit_tau(z, picks(z, tau, 0.0), Output(torch.eye(12)), None, 12) == pytest.approx(tau, rel=0.08)
    assert fit_tau(z[:0], torch.empty(0, dtype=torch.int64), Output(torch.eye(12)), None, 12) == 1.0


@pytest.mark.parametrize("tau", [0.2, 0.6, 1.5])
def test_noise_tau_of_sampled_answers_is_found(tau):
    """log p / T = log q / T + surprises; the base picks argmax(log p / T + G), and the fit knows q, T and G."""
    token_map, depth = torch.tensor([20, 3, 7, 11, 2, 30, 8, 1, 0, 40, 41, 42]), 2
    z = torch.randn(4000, 12, generator=torch.Generator().manual_seed(0)) * 2
    noise = Noise(torch.tensor([0.7, 1.0]).repeat(2000), torch.arange(4000) * 31, torch.arange(4000) % 90)
    drawn = gumbel(noise.seed[:, None], noise.position[:, None] + depth, token_map)
    targets = token_map[picks(z / noise.temperature[:, None], tau, drawn)]
    fit = fit_tau(z, targets, Output(torch.eye(12)), token_map, 50, noise, depth)
    assert fit == pytest.approx(tau, rel=0.08)
    elsewhere = fit_tau(z, targets, Output(torch.eye(12)), token_map, 50, noise, depth + 1)
    assert elsewhere > 1.3 * tau  # the noise of another position is no help


class Flat(Toy):
    """A base that says the same at every position, so that fresh heads, which repeat it, know it at each depth."""

    def __init__(self):
        super().__init__()
        self.lm_head.weight.copy_(torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(3)) * 2)

    def forward(self, input_ids, **options):
        return SimpleNamespace(logits=self.lm_head(self.embedding(torch.zeros_like(input_ids))))


def test_calibration_uses_the_noise_that_the_answers_were_sampled_with():
    """q = p, so that log q / T + G names each token of a sampled answer: surer than any tau; for plain q it is not."""
    base, rows = Flat(), []
    z = base.lm_head(base.embedding.weight[0])
    for seed in range(12):
        prompt = list(range(1 + seed % 3))
        drawn = z / 0.7 + gumbel(torch.tensor(seed), torch.arange(60)[:, None], torch.arange(VOCAB))
        rows.append((seed, seed, 0.7, prompt, drawn.argmax(dim=-1)[len(prompt) :].tolist()))
    teacher, answers = Teacher(base), pack(rows, VOCAB)
    heads = MedusaHeads(HIDDEN, 3)
    teacher.attach(heads)
    subject, numbers = Subject(heads, teacher, answers, size=200), np.arange(12)
    assert measure(subject, numbers, sampled=True).rank.max() == 0
    assert max(calibrate_tau(subject, numbers, sampled=True)) < 0.1
    assert min(calibrate_tau(subject, numbers, sampled=False)) == pytest.approx(0.7, rel=0.2)

import math

import pytest
import torch

from medusa_serve.model.sampling.noise import gumbel, hash32


def draws(count: int, seed: int = 1, position: int = 0) -> torch.Tensor:
    return gumbel(torch.tensor(seed), torch.tensor(position), torch.arange(count))


def test_noise_is_a_function_of_seed_position_and_token():
    assert torch.equal(draws(1000), draws(1000))
    assert torch.equal(draws(1000)[500:600], gumbel(torch.tensor(1), torch.tensor(0), torch.arange(500, 600)))


@pytest.mark.parametrize(
    "other", [{"seed": 2}, {"position": 1}, {"seed": 1 + 2**40}, {"seed": 2**63 - 1}, {"position": 2**20}]
)
def test_every_part_of_the_key_matters(other):
    same = (draws(100_000) == draws(100_000, **other)).float().mean()
    assert same < 1e-3
    together = torch.stack([draws(100_000), draws(100_000, **other)])
    assert abs(float(torch.corrcoef(together)[0, 1])) < 0.02


def test_neighbouring_seeds_and_positions_do_not_collide():
    """A weak mixing of the key would make (seed, position + 1) repeat (seed + c, position) for all tokens."""
    seeds, positions = torch.arange(300)[:, None, None], torch.arange(300)[None, :, None]
    keys = hash32(seeds, positions, torch.arange(2)).to(torch.int64).reshape(-1, 2)
    pairs = keys[:, 0] * 2**32 + keys[:, 1]
    assert len(pairs.unique()) == len(pairs)


def test_the_distribution_is_gumbel():
    x = draws(4_000_000).double()
    assert float(x.mean()) == pytest.approx(0.5772, abs=0.003)
    assert float(x.var()) == pytest.approx(math.pi**2 / 6, abs=0.01)
    for quantile in (0.01, 0.1, 0.5, 0.9, 0.99, 0.999):
        value = -math.log(-math.log(quantile))
        share = float((x <= value).double().mean())
        assert share == pytest.approx(quantile, abs=4 * math.sqrt(quantile * (1 - quantile) / len(x)))


def test_all_noise_is_finite_and_the_tail_is_right_over_1e8_draws():
    """At p = 1e-7 about 10 of 1e8 draws lie above -log(-log(1 - p)); 24 bits of uniform would give whole steps or
    none."""
    count, above, total, chunk = 10**8, 0, 0, 10**5
    threshold = -math.log(-math.log1p(-1e-7))
    rough = 0
    for start in range(0, count, chunk):
        x = gumbel(torch.tensor(3), torch.tensor(7), torch.arange(start, start + chunk))
        assert bool(torch.isfinite(x).all())
        above += int((x > threshold).sum())
        rough += int((x > -math.log(-math.log1p(-1e-5))).sum())
        total += len(x)
    assert total == count
    assert 1 <= above <= 25  # Poisson(10): outside with probability 5e-5 each side
    assert rough == pytest.approx(1000, abs=5 * math.sqrt(1000))

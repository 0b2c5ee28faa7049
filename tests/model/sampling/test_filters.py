"""Filters against transformers' own processors, and sampling against their distribution by chi-square."""

import pytest
import torch

from medusa_serve.model.sampling.filters import WINDOW, Sampling, keep_threshold, pick
from tests.model.rows import SETTINGS, processors, sampling

stats = pytest.importorskip("scipy.stats", reason="the chi-square tests need scipy: pip install -e '.[test]'")


@pytest.mark.parametrize("vocab", [WINDOW // 2, 4 * WINDOW])
@pytest.mark.parametrize("spread", [0.2, 3.0])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_same_tokens_are_kept_as_by_transformers(setting, spread, vocab):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(6, vocab, generator=generator) * spread
    rows = sampling(6, **setting)
    x = logits / rows.temperature[:, None]
    threshold = keep_threshold(x, x.topk(min(WINDOW, vocab)).values, rows)
    want = torch.isfinite(processors(**setting)(None, logits.clone()))
    got = x >= threshold[:, None]
    # The sums of probabilities are formed in another order: a token exactly at top-p's edge may fall on either side.
    assert int((got != want).sum()) <= (6 if "top_p" in setting else 0)
    assert bool(got.any(dim=1).all())


def test_rows_with_different_parameters_share_a_pass():
    logits = torch.randn(len(SETTINGS) + 1, 3000, generator=torch.Generator().manual_seed(1))
    alone = [sampling(1, seeds=torch.tensor([9]), **setting) for setting in [*SETTINGS, {}]]
    together = Sampling(*(torch.cat(parts) for parts in zip(*(row[:5] for row in alone), strict=True)), True, True)
    position = torch.full((len(alone),), 17)
    got, finite = pick(logits, together, position)
    assert bool(finite.all())
    for row, one in enumerate(alone):
        assert pick(logits[row : row + 1], one, position[:1])[0][0] == got[row]


def test_greedy_is_argmax_and_bad_rows_are_told():
    logits = torch.randn(4, 50)
    logits[1, 3], logits[2] = torch.nan, -torch.inf
    token, finite = pick(logits, sampling(4), torch.zeros(4, dtype=torch.int64))
    assert token[0] == logits[0].argmax()
    assert finite.tolist() == [True, False, False, True]


def chi_square(setting: dict, used: dict) -> float:
    """The p-value of 200,000 picks under `used` against the distribution that transformers gives for `setting`."""
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(2)) * 1.5
    expected = processors(**setting)(None, logits.clone()).softmax(-1)[0].double()
    count = 200_000
    rows = sampling(count, **used)
    token, _ = pick(logits.expand(count, -1), rows, torch.full((count,), 4))
    observed = torch.bincount(token, minlength=12).double()
    kept = expected > 0
    assert observed[~kept].sum() == 0 or used != setting
    return float(stats.chisquare(observed[kept], expected[kept] / expected[kept].sum() * observed[kept].sum()).pvalue)


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": 0.3},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0},
        {"temperature": 1.5, "min_p": 0.1},
    ],
    ids=str,
)
def test_picks_follow_the_distribution(setting):
    assert chi_square(setting, setting) > 1e-4


def test_negative_control_a_temperature_five_percent_off_is_seen():
    assert chi_square({"temperature": 1.0}, {"temperature": 1.05}) < 1e-6


def test_bfloat16_logits_and_ties_are_handled():
    logits = torch.zeros(3, 20, dtype=torch.bfloat16)
    logits[:, 7:9] = 4.0
    token, finite = pick(logits, sampling(3, temperature=0.5, top_k=1), torch.arange(3))
    assert set(token.tolist()) <= {7, 8}  # both tie with the last one kept
    assert bool(finite.all())

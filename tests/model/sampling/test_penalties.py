"""Bias and penalties equal transformers' processors and, where it has none, a plain loop; and they follow the walk."""

from collections import Counter

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from medusa_serve.model.drafting.tree import Tree
from medusa_serve.model.sampling.accept import Limits, accept
from medusa_serve.model.sampling.penalties import Penalties, Tally
from tests.model.rows import sampling

VOCAB = 64


def penalties(rows, repetition=1.0, presence=0.0, frequency=0.0, bias=None, num_prompt=3, columns=12) -> Penalties:
    """rows: the tokens of each row, prompt first; behind them stand stale ones that must not count."""
    history = torch.full((len(rows), columns), 63)
    for row, tokens in enumerate(rows):
        history[row, : len(tokens)] = torch.tensor(tokens)
    full = [torch.full((len(rows),), float(x)) for x in (repetition, presence, frequency)]
    bias_ids, values = torch.zeros(len(rows), 4, dtype=torch.int64), torch.zeros(len(rows), 4)
    for place, (token, value) in enumerate((bias or {}).items()):
        bias_ids[:, place], values[:, place] = token, value
    length = torch.tensor([len(tokens) - 1 for tokens in rows])
    return Penalties(*full, bias_ids, values, history, length, torch.full((len(rows),), num_prompt))


def plainly(logits, prompt, completion, presence, frequency):
    """OpenAI's definition, word for word."""
    out = logits.clone()
    for token, count in Counter(completion).items():
        out[token] -= count * frequency + float(count > 0) * presence
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_and_repetition_equal_transformers(dtype):
    torch.manual_seed(0)
    logits = torch.randn(2, VOCAB).mul(4).to(dtype)
    rows = [[5, 9, 5, 9, 21], [1, 2, 3, 4]]
    bias = {9: 3.5, 40: -2.0, 63: 1.0}
    got = Tally(penalties(rows, repetition=1.3, bias=bias), VOCAB).apply(logits)
    theirs = LogitsProcessorList(
        [SequenceBiasLogitsProcessor({(k,): v for k, v in bias.items()}), RepetitionPenaltyLogitsProcessor(1.3)]
    )
    for row, tokens in enumerate(rows):
        want = theirs(torch.tensor([tokens]), logits[row : row + 1].float())
        assert torch.equal(got[row], want[0])


def test_presence_and_frequency_count_completion_tokens_alone():
    torch.manual_seed(0)
    logits = torch.randn(1, VOCAB)
    tokens = [5, 9, 7, 9, 21, 9]
    got = Tally(penalties([tokens], presence=0.7, frequency=-0.4), VOCAB).apply(logits)
    torch.testing.assert_close(got[0], plainly(logits[0], tokens[:3], tokens[3:], 0.7, -0.4))


def test_a_neutral_row_is_untouched_beside_others():
    logits = torch.randn(1, VOCAB, dtype=torch.float64)
    assert torch.equal(Tally(penalties([[1, 2, 3, 4]]), VOCAB).apply(logits), logits)


def test_ids_that_the_logits_lack_are_left_out():
    got = Tally(penalties([[1, 2, 3, 60]], presence=1.0, bias={50: 9.0}), 40).apply(torch.zeros(1, 40))
    assert torch.equal(got, torch.zeros(1, 40))


def test_tokens_of_the_walk_count_at_once():
    """Root → 52 → 9 drafted. The model wants 52 again and again; with a frequency penalty it turns to 9 after the
    first, within the same pass."""
    tree = Tree(((0,), (0, 0)))
    logits = torch.zeros(1, 3, VOCAB)
    logits[0, :, 52], logits[0, :, 9] = 5.0, 4.5
    limits = Limits(torch.tensor([3]), torch.tensor([99]), torch.tensor([[-1]]))
    for draft, want in (([7, 52, 9], [52, 9, 52]), ([7, 52, 52], [52, 9])):
        asked = sampling(1)._replace(penalties=penalties([[1, 2, 3, 7]], frequency=1.0))
        walk = accept(logits, *tree.draft(torch.tensor([draft]))[:2], 2, asked, limits)
        assert walk.tokens[0, : int(walk.num_emitted)].tolist() == want


def test_bad_logits_stay_bad_under_penalties():
    logits = torch.zeros(1, 1, VOCAB)
    logits[0, 0, 5] = torch.nan
    limits = Limits(torch.tensor([3]), torch.tensor([99]), torch.tensor([[-1]]))
    asked = sampling(1)._replace(penalties=penalties([[1, 2, 3, 7]], repetition=2.0, bias={5: -100.0}))
    assert not bool(accept(logits, *Tree().draft(torch.tensor([[7]]))[:2], 0, asked, limits).finite)

"""What makes drafting cheap: python -m pytest tests/model/test_draft_cost.py"""

import pytest
import torch

from medusa_serve.errors import LoadError
from medusa_serve.model import draft_cost
from medusa_serve.model.draft_cost import fastest_dtype, limit_vocabulary
from medusa_serve.model.heads import MedusaHeads

HIDDEN, VOCAB = 8, 60


def mapped(**options):
    layer = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
    heads = MedusaHeads(HIDDEN, 2, **({"token_map": torch.arange(59, 19, -1)} | options))
    heads.attach(layer)
    return heads, layer


def test_the_first_of_the_heads_own_tokens():
    heads, layer = mapped()
    assert limit_vocabulary(heads, layer, 10, ordered=True)
    assert heads.token_map.tolist() == list(range(59, 49, -1))
    torch.testing.assert_close(heads.output.weight, layer.weight[heads.token_map])


def test_the_whole_vocabulary():
    heads, layer = mapped()
    assert limit_vocabulary(heads, layer, 0, ordered=True)
    assert heads.token_map is None
    assert heads.output.vocab_size == VOCAB


def test_heads_without_a_list_keep_the_first_ids():
    heads, layer = mapped(token_map=None)
    limit_vocabulary(heads, layer, 7, ordered=False)
    assert heads.token_map.tolist() == list(range(7))


@pytest.mark.parametrize(("ordered", "left"), [(True, 16), (False, 40)])
def test_automatic_on_a_cpu(monkeypatch, ordered, left):
    """Only where the list is known to be ordered by frequency."""
    monkeypatch.setattr(draft_cost, "CPU_VOCAB", 16)
    heads, layer = mapped()
    assert bool(limit_vocabulary(heads, layer, None, ordered=ordered)) == ordered
    assert heads.output.vocab_size == left


def test_a_short_list_stays():
    heads, layer = mapped()
    assert limit_vocabulary(heads, layer, None, ordered=True) == []
    assert heads.output.vocab_size == 40


def test_refusals():
    heads, layer = mapped()
    with pytest.raises(LoadError, match="more than the 40"):
        limit_vocabulary(heads, layer, 41, ordered=True)
    own = MedusaHeads(HIDDEN, 2, vocab_size=VOCAB)
    with pytest.raises(LoadError, match="output layer of their own"):
        limit_vocabulary(own, layer, 10, ordered=True)


def test_small_and_other_heads_keep_their_dtype():
    heads, _ = mapped()
    assert fastest_dtype(heads) == torch.float32
    assert fastest_dtype(heads.double()) == torch.float64


def test_the_faster_dtype_is_measured(monkeypatch):
    """A clock that says bfloat16 takes half, then nine tenths, of float32's time."""
    heads, _ = mapped()
    monkeypatch.setattr(draft_cost, "WORTH_IT", 1)
    for ratio, chosen in ((0.5, torch.bfloat16), (0.9, torch.float32)):
        times = iter([t for _ in range(6) for t in (0.0, 1.0, 5.0, 5.0 + ratio)])
        monkeypatch.setattr(draft_cost.time, "perf_counter", lambda times=times: next(times))
        assert fastest_dtype(heads) == chosen

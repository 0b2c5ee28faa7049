"""What makes drafting cheap: python -m pytest tests/model/test_draft_cost.py"""

import pytest
import torch

from medusa_serve.errors import LoadError
from medusa_serve.model.cpu.int_products import NativeInt4Linear, NativeInt8Linear
from medusa_serve.model.drafting import draft_formats as draft_cost
from medusa_serve.model.drafting.draft_formats import limit_vocabulary, make_fast
from medusa_serve.model.drafting.heads import MedusaHeads, SequentialHeads
from medusa_serve.model.weights import number_format as formats
from medusa_serve.model.weights.int4 import Int4Linear
from medusa_serve.model.weights.int8 import Int8Linear

HIDDEN, VOCAB = 32, 60


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
    with pytest.raises(LoadError, match="their own output layer"):
        limit_vocabulary(own, layer, 10, ordered=True)


def state(heads):
    return {name: tensor.dtype for name, tensor in heads.named_parameters()}, heads.output.weight.dtype


def test_small_and_other_heads_keep_their_numbers(tmp_path, monkeypatch):
    heads, _ = mapped()
    before = state(heads)
    assert make_fast(heads, tmp_path) == []
    monkeypatch.setattr(draft_cost, "WORTH_IT", 1)
    monkeypatch.setattr(draft_cost, "format_times", lambda weights, rows, int4: dict.fromkeys(formats.PASSES, 1.0))
    assert make_fast(heads, tmp_path) == []  # all alike: the most exact one
    assert state(heads) == before
    assert make_fast(heads.double(), tmp_path) == []


@pytest.mark.parametrize(("best", "output"), [("bfloat16", torch.bfloat16), ("int8", torch.int8)])
def test_the_fastest_format_is_used(tmp_path, monkeypatch, best, output):
    made = (
        SequentialHeads(HIDDEN, inner=64, readout=32, token_map=torch.arange(59, 19, -1)).eval().requires_grad_(False)
    )
    layer = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
    made.attach(layer, torch.randn(VOCAB, HIDDEN))
    hidden, token = torch.randn(3, HIDDEN), torch.tensor([1, 2, 3])
    exact = made.logits(made.start(hidden, token))
    monkeypatch.setattr(draft_cost, "WORTH_IT", 1)
    monkeypatch.setattr(
        draft_cost, "format_times", lambda weights, rows, int4: dict.fromkeys(formats.PASSES, 1.0) | {best: 0.5}
    )
    (note,) = make_fast(made, tmp_path)
    assert best in note
    assert made.output.weight.dtype == output
    assert layer.weight.dtype == torch.float32  # the base's own
    assert sum(isinstance(module, Int8Linear) for module in made.modules()) == (5 if best == "int8" else 0)
    got = made.logits(made.advance(made.start(hidden, token), token)), made.logits(made.start(hidden, token))
    assert got[1].dtype == torch.bfloat16
    assert float((got[1].float() - exact).norm() / exact.norm()) < 0.03
    assert bool(got[0].isfinite().all())


def test_heads_of_an_int8_base_draft_in_int8(tmp_path, monkeypatch):
    made = (
        SequentialHeads(HIDDEN, inner=64, readout=32, token_map=torch.arange(59, 19, -1)).eval().requires_grad_(False)
    )
    layer = Int8Linear.of(torch.nn.Linear(HIDDEN, VOCAB))
    made.to(torch.bfloat16).attach(layer, torch.randn(VOCAB, HIDDEN))
    assert torch.equal(made.output.weight, layer.weight[made.token_map])
    assert limit_vocabulary(made, layer, 10, ordered=True)
    assert make_fast(made, tmp_path)
    features = torch.randn(3, HIDDEN)
    want = layer(features)[:, made.token_map]
    assert torch.equal(made.project(features), want)


@pytest.mark.parametrize(("kind", "linears"), [(Int4Linear, Int8Linear), (NativeInt4Linear, NativeInt8Linear)])
def test_a_bfloat16_output_layer_may_draft_in_int4(tmp_path, monkeypatch, kind, linears):
    """Rounded to 16 steps a group of 32: drafts alone read it, so the base's layer keeps its numbers."""
    torch.manual_seed(0)
    made = SequentialHeads(HIDDEN, inner=64, readout=32, token_map=torch.arange(59, 11, -1)).eval()
    made.requires_grad_(False).bfloat16()
    layer = torch.nn.Linear(HIDDEN, VOCAB, bias=False).bfloat16()
    made.attach(layer, torch.randn(VOCAB, HIDDEN).bfloat16())
    features = torch.randn(2, 3, HIDDEN).bfloat16()
    exact = made.project(features).float()
    monkeypatch.setattr(draft_cost, "WORTH_IT", 1)
    times = dict.fromkeys(formats.PASSES, 1.0) | {"int8": 0.5, "int4": 0.3}
    monkeypatch.setattr(draft_cost, "format_times", lambda weights, rows, int4: times)
    (note,) = make_fast(made, tmp_path, kind)
    assert "int4" in note
    assert type(made.output.small) is kind
    assert type(made.cell[0].w_in) is linears
    assert made.output.vocab_size == 48
    assert layer.weight.dtype == torch.bfloat16
    got = made.project(features)
    assert got.shape == exact.shape
    assert float((got.float() - exact).norm() / exact.norm()) < 0.1


def test_drafts_are_timed_once_for_a_machine(tmp_path, monkeypatch):
    asked = []

    def times(weights, rows, int4):
        asked.append(rows)
        return dict.fromkeys(formats.PASSES, 1.0) | {"bfloat16": 0.5}

    monkeypatch.setattr(draft_cost, "WORTH_IT", 1)
    monkeypatch.setattr(draft_cost, "format_times", times)
    notes = [make_fast(mapped()[0], tmp_path) for _ in range(2)]
    assert notes[0] == notes[1]
    assert "bfloat16" in notes[0][0]
    make_fast(mapped(token_map=torch.arange(59, 29, -1))[0], tmp_path)  # of another shape
    assert len(asked) == 2

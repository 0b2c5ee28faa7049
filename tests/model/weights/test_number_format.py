"""In which numbers a CPU computes, and that the choice is kept: python -m pytest tests/model/test_formats.py"""

from types import SimpleNamespace

import pytest
import torch

from medusa_serve.config import EngineConfig
from medusa_serve.errors import InvalidConfig, LoadError
from medusa_serve.model.cpu.int_products import NativeInt4Linear
from medusa_serve.model.loading import choose
from medusa_serve.model.loading import load as loader
from medusa_serve.model.weights import machine_cache as measured
from medusa_serve.model.weights import number_format as formats
from medusa_serve.model.weights.int4 import Int4Linear
from medusa_serve.model.weights.number_format import (
    SLOWER,
    best_format,
    choice_times,
    choose_format,
    format_times,
    int4_kind,
)
from tests.tiny import save_tiny_folder

ALL = ("float32", "bfloat16", "int8")


def config(hidden=576, inner=1536, layers=30, vocab=49152):
    text = SimpleNamespace(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, vocab_size=vocab)
    return SimpleNamespace(get_text_config=lambda: text)


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ((10, 9, 8.1), "float32"),  # not worth leaving the exact one
        ((10, 7, 6), "bfloat16"),
        ((10, 7, 5), "int8"),
        ((10, 30, 5), "int8"),  # a CPU that emulates bfloat16
        ((10, 30, 20), "float32"),
    ],
)
def test_the_most_exact_format_that_is_not_a_fifth_slower(times, best):
    assert best_format(dict(zip(ALL, times, strict=True)), ALL) == best
    assert best_format(dict(zip(ALL, times, strict=True)), ALL[:2]) != "int8"


@pytest.mark.parametrize(
    ("slower", "names", "best"),
    [(1.2, ALL, "bfloat16"), (6.0, ALL, "int8"), (1.2, ALL[:2], "bfloat16"), (6.0, ALL[:2], "float32")],
)
def test_bfloat16_is_not_taken_where_a_prompt_would_pay_for_it(tmp_path, monkeypatch, slower, names, best):
    times = dict(zip(ALL, (10.0, 7.0, 6.0), strict=True)) | {SLOWER: slower}
    monkeypatch.setattr(formats, "choice_times", lambda weights, int4: times)
    name, why = choose_format(config(), names, tmp_path)
    assert name == best
    assert ("6.0x as long" in why) == (slower == 6.0)


def test_every_format_is_timed():
    times = choice_times([torch.randn(64, 32)] * 2, Int4Linear)
    assert set(times) == {*ALL, "int4", SLOWER}
    assert all(0 < ms < 1000 for ms in times.values())
    assert set(format_times([torch.randn(64, 33)])) == {"float32", "bfloat16"}  # no kernel for such rows
    assert set(format_times([torch.randn(63, 32)])) == {*ALL}


def test_a_choice_is_measured_once(tmp_path, monkeypatch):
    asked = []

    def times(weights, int4):
        asked.append(len(weights))
        return {"float32": 10.0, "bfloat16": 5.0, "int8": 2.0, SLOWER: 0.5}

    monkeypatch.setattr(formats, "choice_times", times)
    for _ in range(2):
        name, why = choose_format(config(), ALL, tmp_path)
        assert name == "int8"
        assert "int8 2.0 ms" in why
    assert choose_format(config(), ALL[:2], tmp_path)[0] == "bfloat16"
    assert choose_format(config(hidden=592), ALL, tmp_path)[0] == "bfloat16"  # no multiple of 32: no int8
    assert len(asked) == 2
    assert choose_format(config(layers=2, vocab=1000), ALL, tmp_path) == (
        "float32", "the text is then exact token for token, and the model is small",
    )  # fmt: skip
    assert len(asked) == 2


def test_what_cannot_be_kept_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(formats, "choice_times", lambda weights, int4: dict.fromkeys((*ALL, SLOWER), 1.0))
    name, why = choose_format(config(), ALL, tmp_path / "file" / "cache")
    assert name == "float32"
    assert "cannot be written" in why


def test_measurements_are_kept(tmp_path):
    assert measured.recall(tmp_path, "a") is None
    assert measured.remember(tmp_path / "new", "a", {"x": 1.5}) is None
    assert measured.remember(tmp_path / "new", "b", 2) is None
    assert (measured.recall(tmp_path / "new", "a"), measured.recall(tmp_path / "new", "b")) == ({"x": 1.5}, 2)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [measured.FILE]
    (tmp_path / "new" / measured.FILE).write_text("{damaged")
    assert measured.recall(tmp_path / "new", "a") is None
    assert measured.remember(tmp_path / "new", "a", 3) is None
    assert measured.recall(tmp_path / "new", "a") == 3
    assert "threads" in measured.machine_key("cpu")
    assert torch.backends.cpu.get_cpu_capability() in measured.machine_key("cpu")


def load(folder, **options):
    return loader.load_model(EngineConfig(model=str(folder), device="cpu", **options), progress=False)


def test_int8_is_named(tmp_path, monkeypatch):
    folder = save_tiny_folder(tmp_path / "tiny")
    plain = load(folder)
    assert (plain.numbers, plain.weights) == ("float32", "")
    small = load(folder, quantize="int8")
    assert (small.numbers, small.dtype, small.weights) == ("int8", torch.bfloat16, "int8")
    assert "a changed model" in small.notes[-1] or any("a changed model" in note for note in small.notes)
    monkeypatch.setattr(choose, "choose_format", lambda config, allowed, cache, own: (allowed[-1], "of a test"))
    assert load(folder).numbers == "int8"
    assert load(folder, quantize="none").numbers == "bfloat16"
    assert load(folder, dtype="float32").numbers == "float32"


def test_a_model_of_other_layers_is_refused_or_left(tmp_path, monkeypatch):
    folder = save_tiny_folder(tmp_path / "tiny", "gpt2")  # its layers are Conv1D
    with pytest.raises(LoadError, match="cannot have int8 weights: only"):
        load(folder, quantize="int8")
    monkeypatch.setattr(choose, "choose_format", lambda config, allowed, cache, own: (allowed[-1], "of a test"))
    found = load(folder)
    assert found.numbers == "bfloat16"
    assert any(note.startswith("no int8 weights because") for note in found.notes)


def test_int8_computes_in_bfloat16_on_a_cpu():
    with pytest.raises(InvalidConfig, match="not in float32") as error:
        EngineConfig(quantize="int8", dtype="float32")
    assert error.value.param == "quantize"
    with pytest.raises(InvalidConfig, match="quantize must be one of auto, none, int8, int4, nf4, not 'int2'"):
        EngineConfig(quantize="int2")


def test_whose_int4_products_are_faster_is_measured_once(tmp_path, monkeypatch):
    asked = []

    def times(passes, x):
        asked.append(set(passes))
        return {"torch": 2.0, "own": own}

    monkeypatch.setattr(formats, "_timed", times)
    for own, kind in ((1.0, NativeInt4Linear), (3.0, Int4Linear)):
        cache = tmp_path / str(own)
        assert [int4_kind(cache, NativeInt4Linear), int4_kind(cache, NativeInt4Linear)] == [kind, kind]
    assert asked == [{"torch", "own"}] * 2
    assert int4_kind(tmp_path / "1.0", None) is Int4Linear

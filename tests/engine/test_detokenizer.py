"""The detokenizer: python -m pytest tests/engine/test_text.py"""

from __future__ import annotations

import codecs

import pytest

from medusa_serve.engine.detokenizer import WINDOW, Detokenizer
from tests.fakes import BOS, EOS, FakeCodec

hypothesis = pytest.importorskip("hypothesis", reason="the property test needs hypothesis: pip install -e '.[test]'")
assume, given, settings, st = (
    hypothesis.assume,
    hypothesis.given,
    hypothesis.settings,
    pytest.importorskip("hypothesis.strategies"),
)

SMILE = list("🙂".encode())


def run(codec, parts, stop=()):
    """(text, ids used, stopped) of ids that come in parts."""
    detokenizer = Detokenizer(codec, stop, frozenset({EOS}))
    text, used, stopped = "", 0, False
    for part in parts:
        new, n, stopped = detokenizer.feed(part)
        text, used = text + new, used + n
        if stopped:
            break
    return text + detokenizer.flush(), used, stopped


def split(ids, sizes):
    """Cut ids into parts of the given sizes, repeated."""
    parts, at = [], 0
    while at < len(ids):
        size = sizes[len(parts) % len(sizes)]
        parts.append(ids[at : at + size])
        at += size
    return parts


def reference(codec, ids, stop):
    """Grow the text id by id with full decodes; the first id whose certain text holds a stop string ends it. What
    bytes that are no text become is certain where the codec tells them, else when something follows."""
    for used in range(1, len(ids) + 1):
        kept = [i for i in ids[:used] if i != EOS]
        if codec.token_texts is None:
            certain = codec.decode(kept).rstrip("\ufffd")
        else:
            text = b"".join(map(codec.token_texts.get, kept))
            certain = codecs.getincrementaldecoder("utf-8")("replace").decode(text)
        found = [at for at in (certain.find(s) for s in stop) if at >= 0]
        if found:
            return certain[: min(found)], used, True
    return codec.decode([i for i in ids if i != EOS]), len(ids), False


class Slow(FakeCodec):
    """Counts the ids it decodes."""

    def __init__(self):
        super().__init__()
        self.decoded = 0

    def decode(self, ids):
        self.decoded += len(ids)
        return super().decode(ids)


tokens = st.one_of(
    st.integers(0, FakeCodec.vocab_size - 1),
    st.sampled_from([EOS, BOS, 32, 97, 98, 0xE4, 0xBD, 0xA0, *SMILE]),
)
kinds = st.sampled_from([{}, {"strip_space": True}, {"pieces": True}])
stops = st.lists(st.text("ab ,é🙂", min_size=1, max_size=4), max_size=3)


@given(st.lists(tokens, max_size=60), st.lists(st.integers(1, 6), min_size=1, max_size=5), stops, kinds)
@settings(max_examples=900, deadline=None)
def test_parts_concatenate_to_the_whole(ids, sizes, stop, kind):
    codec = FakeCodec(**kind)
    assert run(codec, split(ids, sizes), stop) == reference(codec, ids, stop)


@given(st.text(max_size=40), st.lists(st.integers(1, 6), min_size=1, max_size=5), kinds)
@settings(max_examples=300, deadline=None)
def test_no_broken_character_is_shown(text, sizes, kind):
    assume(not (kind.get("strip_space") and text.startswith(" ")))
    detokenizer = Detokenizer(FakeCodec(**kind))
    ids = list(text.encode(errors="ignore"))
    shown = [detokenizer.feed(part)[0] for part in split(ids, sizes)]
    assert not any("\ufffd" in piece for piece in shown)
    assert "".join(shown) + detokenizer.flush() == bytes(ids).decode()


@pytest.mark.parametrize("pieces", [False, True])
def test_character_is_held_until_whole(pieces):
    detokenizer = Detokenizer(FakeCodec(pieces=pieces))
    assert [detokenizer.feed([i])[0] for i in [97, *SMILE]] == ["a", "", "", "", "🙂"]


@pytest.mark.parametrize("pieces", [False, True])
def test_unfinished_character_is_flushed(pieces):
    detokenizer = Detokenizer(FakeCodec(pieces=pieces))
    assert detokenizer.feed([97, *SMILE[:2]])[0] == "a"
    assert detokenizer.flush() == "\ufffd"


def test_space_of_a_later_word_stays():
    codec = FakeCodec(strip_space=True)
    ids = [*codec.encode(" the cat"), BOS, *b" dog"]
    assert run(codec, [[i] for i in ids])[0] == "the cat dog"


@pytest.mark.parametrize("sizes", [[1], [2], [3], [7], [100]])
def test_stop_string_across_steps(sizes):
    ids = list(b"one two END three")
    assert run(FakeCodec(), split(ids, sizes), ["END"]) == ("one two ", 11, True)


def test_beginning_of_a_stop_string_is_held_then_given():
    detokenizer = Detokenizer(FakeCodec(), ["END"])
    assert detokenizer.feed(list(b"xEN"))[0] == "x"
    assert detokenizer.feed(list(b"d"))[0] == "ENd"
    assert detokenizer.feed(list(b"E"))[0] == ""
    assert detokenizer.flush() == "E"


def test_earliest_of_several_stop_strings():
    the = FakeCodec.vocab_size  # a word completes both at once
    codec = FakeCodec()
    codec.decode = lambda ids: "".join("abcd" if i == the else chr(i) for i in ids)
    assert run(codec, [[120, the, 120]], ["cd", "bcd", "d"]) == ("xa", 2, True)


def test_eos_is_used_without_text():
    assert run(FakeCodec(), [[97, EOS]]) == ("a", 2, False)
    assert run(FakeCodec(), [[EOS]], ["a"]) == ("", 1, False)


def test_nothing_is_used_after_a_stop():
    detokenizer = Detokenizer(FakeCodec(), ["a"])
    assert detokenizer.feed(list(b"xay")) == ("x", 2, True)
    assert detokenizer.feed(list(b"z")) == ("", 0, True)
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("stop", [(), ("never this",)])
def test_a_step_costs_the_same_however_long_the_text(stop):
    costs = []
    for length in (100, 2000):
        codec = Slow()
        detokenizer = Detokenizer(codec, stop)
        for i in range(length):
            detokenizer.feed([97 + i % 26])
        costs.append(codec.decoded / length)
    assert costs[1] <= costs[0] * 1.1
    assert costs[1] <= 2 * WINDOW

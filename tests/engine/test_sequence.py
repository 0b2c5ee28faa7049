"""One sequence and what it takes of a pass: python -m pytest tests/engine/test_sequence.py"""

from __future__ import annotations

import pytest

from medusa_serve.engine.detokenizer import Detokenizer
from medusa_serve.engine.sequence import Sequence, State
from medusa_serve.errors import GenerationFailed
from medusa_serve.types import Delta, SamplingParams, StepOutput
from tests.fakes import EOS, FakeCodec


def decoding(limit=20, **params):
    """A sequence of 5 prompt tokens that has emitted "a"."""
    detokenizer = Detokenizer(FakeCodec(), params.get("stop", ()), frozenset({EOS}))
    seq = Sequence("x", (1, 2, 3, 4, 5), SamplingParams(seed=1, **params), limit, lambda pairs: None, detokenizer)
    seq.num_prefilled = 5
    take(seq, [97])
    seq.state = State.DECODING
    return seq


def take(seq, ids, **fields):
    return seq.take(StepOutput(0, tuple(ids), **fields), frozenset({EOS}), decoding=seq.state is State.DECODING)


def test_the_first_token_is_no_decode_step():
    seq = decoding()
    assert (seq.steps, seq.drafted, seq.accepted, seq.token_ids) == (0, 0, 0, [97])
    assert seq.kv_ids == (1, 2, 3, 4, 5)
    took = take(seq, [98, 99, 100], num_drafted=7, draft_ready=5)
    assert took[:4] == ((98, 99, 100), 2, "bcd", None)
    assert took.delta() == Delta("bcd", (3,), (2,), (98, 99, 100))
    assert (seq.steps, seq.drafted, seq.accepted, seq.draft_ready) == (1, 7, 2, 5)
    assert seq.kv_ids == (1, 2, 3, 4, 5, 97, 98, 99)


@pytest.mark.parametrize(
    ("ids", "limit", "params", "taken", "reason"),
    [
        ([98, 99, 100], 8, {}, [98, 99], "length"),  # a runner that goes too far
        ([98, EOS, 100], 20, {}, [98, EOS], "stop"),
        ([98, EOS, 100], 8, {}, [98, EOS], "stop"),  # EOS and the limit at once
        ([98, EOS, 100], 20, {"ignore_eos": True}, [98, EOS, 100], None),
        ([98, 99, 100], 20, {"stop": ("bc",)}, [98, 99], "stop"),
        ([98, 99, EOS], 20, {"stop": ("bc",)}, [98, 99], "stop"),
        ([98, EOS], 20, {"stop": ("bcd",)}, [98, EOS], "stop"),  # what was held back is given at the end
        ([98, 0xE4], 8, {}, [98, 0xE4], "length"),
    ],
)
def test_the_end_inside_a_path(ids, limit, params, taken, reason):
    seq = decoding(limit, **params)
    took = take(seq, ids, num_drafted=7)
    assert (list(took.ids), took.reason) == (taken, reason)
    assert took.accepted == min(len(taken), len(ids) - 1)
    text = FakeCodec().decode([97, *taken])
    assert "".join(seq.text) == ("a" if "bc" in params.get("stop", ()) else text)


def test_an_odd_word_of_the_runner_is_an_error_not_an_endless_sequence():
    with pytest.raises(GenerationFailed):
        take(decoding(), [])
    with pytest.raises(GenerationFailed):
        take(decoding(), [98], finished=True)


def test_no_completion_before_the_end():
    with pytest.raises(RuntimeError):
        decoding().completion("m", "stop")

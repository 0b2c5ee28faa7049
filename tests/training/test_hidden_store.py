"""Kept hidden states give the gradients that fresh ones give, whatever part of the answers is kept.

pytest tests/training/test_hidden_store.py
"""

import numpy as np
import pytest
import torch

from medusa_serve.training.batches import make_batch, plan_epoch
from medusa_serve.training.hidden_store import HiddenStore
from medusa_serve.training.teacher import Teacher
from medusa_serve.training.train_config import TrainConfig
from medusa_serve.training.train_heads import Run, train
from tests.tiny import tiny_model
from tests.training.toy import Toy, pack, toy_answers

ROWS = 64


def some_answers(count=40, vocab=97, seed=0):
    random = np.random.default_rng(seed)
    rows = [
        (i, i, 0.0, random.integers(vocab, size=random.integers(1, 9)).tolist(),
         random.integers(vocab, size=random.integers(2, 30)).tolist())
        for i in range(count)
    ]  # fmt: skip
    return pack(rows, vocab)


def new_run(tmp_path, inputs=(-1,), **options):
    answers = some_answers()
    small = {"steps": 5, "num_heads": 3, "inner": 16, "readout": 8, "held_out": 4, "draft_vocab": 50}
    config = TrainConfig(
        family="sequential", out=str(tmp_path / "h"), hidden_inputs=inputs, batch_rows=ROWS, **{**small, **options}
    )
    run = Run(Teacher(tiny_model("llama", torch.float32), inputs), answers, config, "tiny")
    for begin in (run.resume, run.fit, run.fill):
        begin(lambda text: None)
    return run


def gradients(run):
    """Of every batch of two epochs, side by side."""
    found = []
    for run.epoch in (0, 1):
        for numbers in run.plan():
            loss = run.gradients(numbers, value=True)
            found.append(torch.cat([p.grad.flatten() for p in run.heads.parameters()] + [loss[None].float()]))
            run.stepper.clear()
    return torch.stack(found)


@pytest.mark.parametrize("inputs", [(-1,), (-1, 1)])
def test_gradients_are_the_same_with_and_without_the_store(tmp_path, inputs):
    states = int(some_answers().answer_len.sum())
    half = states / 2 * len(inputs) * 32 * 4 / 2**30  # GiB
    runs = [new_run(tmp_path, inputs, keep_gib=gib) for gib in (0.0, half, None)]
    kept = [int((run.store.first >= 0).sum()) for run in runs]
    assert kept[0] == 0
    assert 10 < kept[1] < 30  # batches of both kinds and mixed ones
    assert kept[2] == len(runs[2].numbers)
    fresh, *others = (gradients(run) for run in runs)
    assert fresh.abs().sum() > 0
    for other in others:
        torch.testing.assert_close(other, fresh, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gib", [0.0, 2e-5, None])
def test_a_batch_is_the_rows_of_its_sequences(tmp_path, gib):
    """Against one sequence at a time: states of the rows, of their teachers, tokens, places."""
    run = new_run(tmp_path, (-1, 1), keep_gib=gib)
    answers = run.answers
    batch, inputs, last = run.store.load(run.plan()[0])
    assert sorted(batch.sequence.tolist()) == sorted(run.plan()[0].tolist())
    start = 0
    for number in batch.sequence:
        alone = make_batch(answers, np.array([number]))
        states, final = run.teacher.hidden(alone.ids)
        rows = slice(start, start + len(alone.at))
        torch.testing.assert_close(inputs[rows], states[alone.at], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(last[rows], final[alone.at + 1], rtol=1e-4, atol=1e-5)
        assert torch.equal(batch.offset[rows], alone.offset)
        assert torch.equal(batch.left[rows], alone.left)
        inside = torch.arange(3) < alone.left[:, None]  # what stands behind the end does not count
        assert torch.equal(batch.tokens(3, first=2)[rows][inside], alone.tokens(3, first=2)[inside])
        start += len(alone.at)
    assert start == len(batch.at) == len(inputs) == len(last)


def test_what_is_kept_does_not_pass_through_the_base_again(tmp_path, monkeypatch):
    run = new_run(tmp_path)
    passes = []
    hidden = Teacher.hidden
    monkeypatch.setattr(Teacher, "hidden", lambda self, ids: passes.append(ids) or hidden(self, ids))
    for numbers in run.plan():
        run.store.load(numbers)
    assert passes == []
    away = run.plan()[0][:3]
    run.store.first[away] = -1
    run.store.load(run.plan()[0])
    assert [len(ids) for ids in passes] == [3]


def test_room_and_time_are_limits(tmp_path):
    run = new_run(tmp_path)
    store, order = run.store, run.numbers
    per_state = 32 * 4
    want = int(run.answers.answer_len[order[:5]].sum()) * per_state
    assert store.choose(order, want).tolist() == order[:5].tolist()
    assert store.choose(order, want - 1).tolist() == order[:4].tolist()
    assert store.choose(order, 1e12).tolist() == order.tolist()
    for part, seconds, kept in ((order, -1.0, 0), (order[:0], np.inf, 0), (order[:7], np.inf, 7)):
        store.keep(part, ROWS, seconds)
        assert (store.first >= 0).sum() == kept
    assert len(store.buffer) == store.spare + int(run.answers.answer_len[order[:7]].sum())


def test_what_there_was_no_time_for_is_kept_once_it_was_asked_for(tmp_path):
    run = new_run(tmp_path)
    store = run.store
    store.keep(run.numbers, ROWS, seconds=-1.0)
    assert (store.first >= 0).sum() == 0
    passes, write = [], store._write
    store._write = lambda chosen, place: passes.append(len(chosen)) or write(chosen, place)
    batch = run.plan()[0]
    first, again = store.load(batch), store.load(batch)
    assert sum(passes) == len(batch)
    order = [np.argsort(loaded[0].sequence, kind="stable") for loaded in (first, again)]
    assert np.array_equal(first[0].sequence[order[0]], again[0].sequence[order[1]])
    for one, other in zip(first[1:], again[1:], strict=True):
        torch.testing.assert_close(one.sum(0), other.sum(0))
    assert (store.first >= 0).sum() == len(batch)
    store.reserve(ROWS)  # no room
    assert (store.load(batch) and (store.first >= 0).sum()) == 0


def test_the_largest_batch_of_short_answers_has_room(tmp_path):
    """Each sequence needs one state more than it has rows; answers of two tokens are the worst case."""
    answers = pack([(i, i, 0.0, [3], [4, 5]) for i in range(100)], 97)
    store = HiddenStore(Teacher(tiny_model("llama", torch.float32)), answers)
    store.reserve(ROWS)
    for numbers in plan_epoch(answers, np.arange(100), ROWS, 0, 0):
        _, inputs, last = store.load(numbers)
        assert len(inputs) == len(last) == len(numbers)


def test_an_epoch_has_every_sequence_once_and_is_a_function_of_its_arguments():
    answers = some_answers(200)
    numbers = np.arange(0, 200, 2)
    plan = plan_epoch(answers, numbers, ROWS, 1, 3)
    assert sorted(np.concatenate(plan).tolist()) == numbers.tolist()
    sizes = [int((answers.answer_len[batch] - 1).sum()) for batch in plan]
    assert max(sizes) <= ROWS
    assert min(sizes[:-1]) > ROWS - 30
    again = plan_epoch(answers, numbers, ROWS, 1, 3)
    assert [batch.tolist() for batch in again] == [batch.tolist() for batch in plan]
    assert plan_epoch(answers, numbers, ROWS, 1, 4)[0].tolist() != plan[0].tolist()
    assert [len(batch) for batch in plan_epoch(answers, numbers, 1, 1, 3)] == [1] * 100  # one sequence at least


def test_training_learns_the_same_without_the_store(tmp_path):
    """But for the order of rows in a batch: the toy's states do not depend on their neighbours."""
    toy, states = Toy(), []
    for name, gib in (("a", None), ("b", 0.0)):
        (tmp_path / name).mkdir()
        config = TrainConfig(
            family="sequential", out=str(tmp_path / name / "h"), steps=20, num_heads=2, inner=16, readout=8,
            batch_rows=ROWS, draft_vocab=0, held_out=4, keep_gib=gib,
        )  # fmt: skip
        notes = []
        states.append(train(toy, toy_answers(toy), config, note=notes.append))
        assert any("once" in note for note in notes) == (gib is None)
        assert any("at each step again" in note for note in notes) == (gib == 0)
    assert states[0].loss == pytest.approx(states[1].loss, rel=1e-3)

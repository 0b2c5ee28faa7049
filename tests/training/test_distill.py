"""Answers: on disk once each, whatever interrupts.

pytest tests/training/test_distill.py
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medusa_serve.config import EngineConfig
from medusa_serve.engine.batch_manager import BatchManager
from medusa_serve.errors import InvalidConfig, LoadError
from medusa_serve.model.build import build_runner
from medusa_serve.training.distill import DistillConfig, Job, distill, engine_generate, first_loop, jobs
from medusa_serve.training.prompts import Prompt
from medusa_serve.training.shards import open_folder, read_answers, shard_files, write_shard
from tests.tiny import greedy, tiny_model, tiny_prompts


class Codec:
    """A prompt is its ids, written out."""

    def encode(self, text):
        return [int(word) for word in text.split()]

    def encode_many(self, prompts):
        return [self.encode(prompt) for prompt in prompts]


PROMPTS = [Prompt(f"{3 + i % 7} {4 + i % 5} {5 + i}") for i in range(20)]
CONFIG = DistillConfig(max_tokens=8, shard_answers=4)
FACTS = {"model_name": "tiny", "vocab_size": 97}


def echo(todo):
    """Answers at once, out of order: prompt i gets i, i + 1, …"""
    for pair in itertools.batched(todo, 3) if hasattr(itertools, "batched") else ([job] for job in todo):
        for job in reversed(pair):
            yield job, [job.prompt, job.prompt + 1, job.prompt + 2]


def run(out, generate=echo, config=CONFIG, prompts=PROMPTS, **options):
    return distill(generate, Codec(), prompts, out, config, **FACTS, **options)


def test_every_prompt_has_one_answer_on_disk(tmp_path):
    seen = []
    made = run(tmp_path / "a", progress=seen.append)
    answers = read_answers(tmp_path / "a")
    assert (made.answers, made.tokens, len(seen)) == (20, 60, 20)
    assert sorted(answers.index.tolist()) == list(range(20))
    assert len(shard_files(tmp_path / "a")) == 5
    for number, index in enumerate(answers.index):
        assert answers.sequence(number).tolist() == [*Codec().encode(PROMPTS[index].text), index, index + 1, index + 2]
    assert answers.answer_counts().sum() == 60
    assert {round(float(t), 1) for t in answers.temperature} == {0.0, 0.3, 0.7, 1.0}
    assert answers.tokens.dtype == np.uint32


class Kill(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 1, 4, 9, 18])
def test_an_interrupted_distillation_goes_on_without_loss_or_doubles(tmp_path, after):
    def killed(todo):
        yield from itertools.islice(echo(todo), after)
        raise Kill

    with pytest.raises(Kill):
        run(tmp_path / "a", killed)
    kept = len(read_answers(tmp_path / "a").index) if after else 0
    assert kept == after  # an interruption loses nothing; a killed process at most the shard in memory
    (tmp_path / "a" / "answers-00099.part").write_bytes(b"half a shard")
    assert run(tmp_path / "a").answers == 20 - after
    run(tmp_path / "whole")
    mine, whole = read_answers(tmp_path / "a"), read_answers(tmp_path / "whole")
    assert sorted(mine.index.tolist()) == list(range(20))
    for name in ("seed", "temperature", "prompt_len"):  # of each prompt the same, in whatever order
        a, b = (getattr(x, name)[np.argsort(x.index)] for x in (mine, whole))
        assert np.array_equal(a, b), name


def test_a_time_limit_keeps_what_is_there(tmp_path):
    made = run(tmp_path / "a", config=DistillConfig(max_tokens=8, seconds=1e-9))
    assert made.answers == 1
    assert run(tmp_path / "a").answers == 19


def test_answers_made_otherwise_are_not_mixed(tmp_path):
    run(tmp_path / "a")
    with pytest.raises(LoadError, match="max_tokens 8, asked is 9"):
        run(tmp_path / "a", config=DistillConfig(max_tokens=9))
    with pytest.raises(LoadError, match="prompts"):
        run(tmp_path / "a", prompts=PROMPTS[:3])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    with pytest.raises(LoadError, match="holds no answers"):
        run(tmp_path / "b")


def test_damaged_shards_are_named(tmp_path):
    run(tmp_path / "a")
    shard_files(tmp_path / "a")[1].write_bytes(b"PK rubbish")
    with pytest.raises(LoadError, match="answers-00001.npz is damaged"):
        read_answers(tmp_path / "a")
    with pytest.raises(LoadError, match="holds no answers"):
        read_answers(tmp_path)
    open_folder(tmp_path / "v", {"vocab_size": 5, "model": "m"})
    write_shard(tmp_path / "v", [(0, 0, 0.0, [1], [7])])
    with pytest.raises(LoadError, match="token 7, but its vocabulary ends at 4"):
        read_answers(tmp_path / "v")


def test_long_prompts_are_passed_over():
    prompts = [Prompt("1 2 3"), Prompt("1"), Prompt("")]
    assert [job.prompt for job in jobs(Codec(), prompts, DistillConfig(max_prompt=2), ())] == [1]


def test_loops_are_cut_where_a_run_stands_for_the_third_time(tmp_path):
    assert first_loop(list(range(100))) is None
    assert first_loop([*range(5), *[1, 2, 3, 4, 5, 6, 7, 8] * 2]) is None
    assert first_loop([0, *[1, 2, 3, 4, 5, 6, 7, 8] * 4]) == 17
    assert first_loop([5] * 12) == 2

    def looping(todo):
        for job in todo:
            yield job, [9] * 30

    run(tmp_path / "a", looping)
    assert set(read_answers(tmp_path / "a").answer_len.tolist()) == {2}


@pytest.mark.parametrize("field", ["temperatures", "max_tokens", "max_prompt", "seconds", "shard_answers", "seed"])
def test_nonsense_is_refused_by_name(field):
    with pytest.raises(InvalidConfig) as caught:
        DistillConfig(**{field: () if field == "temperatures" else -1})
    assert caught.value.param == field


# ---- who answers -----------------------------------------------------------------------------------------------------


def by_engine(model, todo, eos, max_tokens):
    config = EngineConfig(model="tiny", heads="none", tree="off", lookup=False, slots=3, max_context=120, max_queue=2)
    built = build_runner(model, config, eos_ids=eos, max_positions=512)
    manager = BatchManager(built.runner, None, config, model_name="tiny")
    manager.start()
    try:
        return {job.prompt: tuple(ids) for job, ids in engine_generate(manager, max_tokens)(iter(todo))}
    finally:
        manager.close()


def test_the_engine_answers_every_job_with_the_models_own_text():
    model = tiny_model("llama", torch.float64)
    todo = [Job(i, 31 * i, (0.0, 0.7)[i % 2], tuple(p)) for i, p in enumerate(tiny_prompts(9, 3))]
    made = by_engine(model, todo, [], 20)
    assert sorted(made) == list(range(9))
    for job in todo[::2]:
        assert list(made[job.prompt]) == greedy(model, list(job.prompt_ids), 20)


def test_an_engine_that_fails_says_so():
    class Failing:
        def submit(self, ids, params, sink):
            error = SimpleNamespace(message="no finite numbers")
            sink([("x", SimpleNamespace(error=LoadError(error.message), completion=None))])
            return "x"

        def cancel(self, id):
            pass

    with pytest.raises(LoadError, match="no finite numbers"):
        list(engine_generate(Failing(), 4)(iter([Job(0, 0, 0.0, (1, 2))])))

"""The report through the engine: its figures are those of the server's own engine, and it leaves nothing behind.

pytest tests/training/test_report.py
"""

import json

import numpy as np
import pytest
import torch

from medusa_serve.llm import LLM
from medusa_serve.model.drafting.files import save_heads
from medusa_serve.model.drafting.heads import HeadsInfo, SequentialHeads
from medusa_serve.model.loading.load import load_model
from medusa_serve.training import report
from medusa_serve.training.report import engine_report
from medusa_serve.training.train_config import TrainConfig
from medusa_serve.training.train_heads import train
from medusa_serve.types import SamplingParams
from tests.tiny import HIDDEN, POSITIONS, save_tiny_folder, tiny_model, tiny_prompts
from tests.training.conftest import TOKENS
from tests.training.toy import Toy, pack, toy_answers

COUNT = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def heads_folder(tmp_path):
    return saved(tmp_path / "heads")


def saved(path, depths=2, hidden=HIDDEN, vocab=267):
    torch.manual_seed(0)
    heads = SequentialHeads(hidden, inner=16, readout=16, max_depth=depths)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    info = HeadsInfo(
        family="sequential", num_heads=depths, num_layers=1, hidden_size=hidden, vocab_size=vocab, tied=True, bias=True
    )
    save_heads(heads, info, path)
    return path


def some_answers(count=COUNT):
    rows = [(i, 11 + i, 0.0, prompt, [5, 6, 7]) for i, prompt in enumerate(tiny_prompts(count))]
    return pack(rows, 267)


def test_its_figures_are_those_of_the_server(folder, heads_folder):
    """Acceptance = Σ (completion tokens - 1) / Σ steps, prompt by prompt, greedy and at T = 0.7."""
    config = {"device": "cpu", "dtype": "float32", "lookup": False, "slots": 1}
    answers, want = some_answers(), {}
    for nodes in (8, 16):
        with LLM(str(folder), heads=str(heads_folder), tree=str(nodes), max_context=100, **config) as llm:
            for temperature in (0.0, 0.7):
                done = []
                for i in range(COUNT):
                    params = SamplingParams(max_tokens=TOKENS, temperature=temperature, seed=11 + i)
                    done += llm.generate_ids([answers.sequence(i)[: answers.prompt_len[i]].tolist()], params)
                assert all(completion.drafted for completion in done)
                tokens = sum(completion.completion_tokens - 1 for completion in done)
                want[nodes, temperature] = tokens / sum(completion.steps for completion in done)
            loaded = load_model(llm.config, progress=False)
    before = loaded.model.config._attn_implementation
    made, said = engine_report(
        loaded.model, heads_folder, answers, np.arange(COUNT), eos_ids=loaded.eos_ids, max_positions=POSITIONS
    )
    assert made.greedy == {nodes: want[nodes, 0.0] for nodes in (8, 16)}
    assert made.sampled == {nodes: want[nodes, 0.7] for nodes in (8, 16)}
    assert made.prompts == {8: COUNT, 16: COUNT}
    assert made.provenance()["engine_greedy"] == {str(nodes): round(x, 3) for nodes, x in made.greedy.items()}
    assert said.endswith("3 with 8 nodes, 3 with 16 nodes")
    assert loaded.model.config._attn_implementation == before
    assert not loaded.model.get_output_embeddings()._forward_pre_hooks


def test_time_is_a_limit_and_prompts_that_are_too_long_are_left_out(heads_folder):
    model = tiny_model("llama", torch.float32, vocab=267)
    answers = some_answers()
    made, said = engine_report(model, heads_folder, answers, np.arange(COUNT), seconds=0.0)
    assert made.prompts == {8: 1, 16: 1}  # the first one is always answered
    assert set(made.greedy) == set(made.sampled) == {8, 16}
    assert "1 with 8 nodes" in said
    room = int(answers.prompt_len[0]) + TOKENS
    assert len(report.report_jobs(answers, np.arange(COUNT), room)) == 2
    made, said = engine_report(model, heads_folder, answers, np.arange(COUNT), max_positions=20)
    assert (made.prompts, made.provenance()) == ({}, {})
    assert "no prompt fits" in said


def test_answers_under_way_are_given_up_after_a_while(heads_folder, monkeypatch):
    monkeypatch.setattr(report, "PATIENCE", -60.0)  # 0.1 s, that is
    monkeypatch.setattr(report, "TOKENS", 400)
    model = tiny_model("llama", torch.float32, vocab=267)
    made, _ = engine_report(model, heads_folder, some_answers(), np.arange(COUNT), seconds=0.0)
    assert made.prompts == {}


def test_the_largest_tree_is_what_the_heads_fill(tmp_path):
    model = tiny_model("llama", torch.float32, vocab=267)
    made, _ = engine_report(model, saved(tmp_path / "h", depths=1), some_answers(), np.arange(COUNT))
    assert set(made.greedy) == {8, 9}  # eight candidates below the root


def test_what_cannot_be_measured_is_said_and_ends_nothing(tmp_path, heads_folder, monkeypatch):
    toy = Toy()  # whose attention cannot be replaced: it has none
    plain = saved(tmp_path / "toy", hidden=32, vocab=23)
    made, said = engine_report(toy, plain, toy_answers(toy), np.arange(3))
    assert made.provenance() == {}
    assert "decodes this model plainly" in said
    model = tiny_model("llama", torch.float32, vocab=267)

    def broken(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

    monkeypatch.setattr(report, "build_runner", broken)
    made, said = engine_report(model, heads_folder, some_answers(), np.arange(COUNT))
    assert made.provenance() == {}
    assert said.endswith("it failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.")


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("medusa", torch.bfloat16),
        ("sequential", torch.float32),
        ("sequential", torch.bfloat16),
        ("sequential", torch.float16),
    ],
)
def test_the_end_is_a_report_through_the_engine(tmp_path, family, dtype):
    model = tiny_model("llama", dtype)
    before = model.config._attn_implementation
    answers = pack([(i, i, 0.0, [3 + i, 4], list(range(5 + i, 30 + i))) for i in range(40)], 97)
    small = {"steps": 3, "num_heads": 3, "inner": 32, "readout": 16, "batch_rows": 128, "draft_vocab": 0, "held_out": 6}
    config, notes = TrainConfig(family=family, out=str(tmp_path / "heads"), **small), []
    measured = train(model, answers, config, max_positions=512, note=notes.append)
    assert set(measured.engine.greedy) == set(measured.engine.sampled) == {8, 16}
    assert min(*measured.engine.greedy.values(), *measured.engine.sampled.values()) >= 1
    assert "held-out prompts" in notes[-1]
    stored = json.loads((tmp_path / "heads" / "config.json").read_text())["provenance"]
    assert stored == json.loads(json.dumps(measured.provenance))
    assert stored["engine_greedy"]["8"] == round(measured.engine.greedy[8], 3)
    assert stored["engine_T0.7"]["16"] == round(measured.engine.sampled[16], 3)
    assert stored["engine_prompts"].keys() == {"8", "16"}
    assert "batch_tokens" not in stored
    assert measured.lines[2].startswith("  the engine, greedy")
    assert "static trees" in measured.lines[4]
    assert model.config._attn_implementation == before

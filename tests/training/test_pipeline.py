"""From a folder and a prompt file to heads, on a tiny model; and the campaign, all stages.

pytest tests/training/test_pipeline.py
"""

import json

import pytest
import torch

from medusa_serve.config import EngineConfig
from medusa_serve.errors import InvalidConfig, LoadError
from medusa_serve.model.loading.load import load_model
from medusa_serve.training import pipeline
from medusa_serve.training.distill import DistillConfig
from medusa_serve.training.pipeline import answering, make_answers, train_from_prompts
from medusa_serve.training.prompts import Prompt
from medusa_serve.training.shards import read_answers
from medusa_serve.training.train_heads import Run
from tests.campaigns import __main__ as campaigns
from tests.tiny import save_tiny_folder

SMALL = {"inner": 16, "readout": 8, "num_heads": 2, "draft_vocab": 100, "held_out": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def prompt_file(tmp_path):
    lines = [{"prompt": f"Tell me about {i}", "category": "ab"[i % 2]} for i in range(300)]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(line) for line in lines), "utf-8")
    return tmp_path / "p.jsonl"


def test_prompts_become_heads(folder, prompt_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(pipeline.DISTILL_SHARE, "cpu", 0.5)  # 20 answers on a busy machine too
    engine = EngineConfig(model=str(folder), device="cpu", dtype="float32")
    notes = []
    measured = train_from_prompts(
        engine,
        prompt_file,
        minutes=0.2,
        answer_tokens=12,
        out=tmp_path / "heads",
        note=notes.append,
        report_seconds=1.0,
        **SMALL,
    )
    assert (tmp_path / "heads" / "heads.safetensors").is_file()
    assert len(read_answers(tmp_path / "heads.answers")) > 20
    assert measured.greedy[4] >= 1.0
    assert min(*measured.engine.greedy.values(), *measured.engine.sampled.values()) >= 1.0
    assert notes[-1].startswith("the engine answered held-out prompts")
    assert "static forecast" in capsys.readouterr().err
    with pytest.raises(LoadError, match="exists"):
        train_from_prompts(engine, prompt_file, minutes=1, out=tmp_path / "heads")


def test_nonsense_is_refused_before_the_model_is_loaded(prompt_file, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "load_to_answer", None)
    for options in ({"minutes": 0}, {"minutes": 1, "layers": 3}, {"minutes": 1, "family": "hydra"}):
        with pytest.raises(InvalidConfig):
            train_from_prompts("x", prompt_file, out=tmp_path / "o", **options)
    with pytest.raises(LoadError, match="no file"):
        train_from_prompts("x", tmp_path / "none.txt", minutes=1, out=tmp_path / "o")


def test_memory_that_is_too_small_for_a_step_is_said_before_the_first(folder, prompt_file, tmp_path, monkeypatch):
    gradients = Run.gradients

    def limited(self, numbers, **options):
        if self.answers.answer_len[numbers].sum() > 300:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return gradients(self, numbers, **options)

    monkeypatch.setattr(Run, "gradients", limited)
    monkeypatch.setitem(pipeline.DISTILL_SHARE, "cpu", 0.8)  # 300 answer tokens on a busy machine too
    engine = EngineConfig(model=str(folder), device="cpu", dtype="float32")
    given = {"minutes": 0.07, "answer_tokens": 12, "out": tmp_path / "heads", "note": str, **SMALL}
    with pytest.raises(LoadError, match="2048 answer rows does not fit into memory; batch_rows 256 does") as caught:
        train_from_prompts(engine, prompt_file, batch_rows=2048, **given)
    assert "\n" not in caught.value.message
    assert len(read_answers(tmp_path / "heads.answers"))  # which are not made again
    assert train_from_prompts(engine, prompt_file, **given).provenance["batch_rows"] == 256


def test_slots_are_halved_until_they_fit(folder, tmp_path, monkeypatch):
    loaded = load_model(EngineConfig(model=str(folder), device="cpu", dtype="float32"), progress=False)
    asked = []

    def tight(loaded, config, slots):
        asked.append(slots)
        if slots > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return answering(loaded, config, slots)

    monkeypatch.setattr(pipeline, "answering", tight)
    notes = []
    config = DistillConfig(max_tokens=3, max_prompt=200)
    make_answers(loaded, [Prompt("a b")], tmp_path / "a", config, slots=8, note=notes.append)
    assert asked == [8, 4, 2]
    assert notes[0] == "8 sequences at once do not fit into memory; going on with 4"


ARGS = ["--device", "cpu", "--dtype", "float32", "--distill-seconds", "3", "--max-tokens", "12", "--max-prompt", "300",
        "--minutes-sequential", "0.02", "--minutes-medusa", "0.02", "--depth", "2", "--inner", "16", "--readout", "8",
        "--draft-vocab", "100", "--slots", "8", "--held-out", "8",
        "--hidden-inputs=-1,1", "--batch-rows", "64", "--width", "24"]  # fmt: skip


def test_the_campaign_makes_both_families_and_tables(folder, prompt_file, tmp_path, capsys):
    where = ["--model", str(folder), "--prompts", str(prompt_file), "--work", str(tmp_path / "w"), "--out"]
    out = tmp_path / "o"
    assert campaigns.main(["make_heads", *where, str(out), *ARGS]) == 0
    for family in ("medusa", "sequential"):
        assert (out / family / "heads.safetensors").is_file()
        result = json.loads((out / f"forecast-{family}.json").read_text())
        assert result["eval-greedy"]["all"]["all"]["answers"] >= 1
        assert result["eval-sampled"]["all"]["all"]["64"] >= 1.0
    assert len([path for path in out.rglob("*") if path.is_file()]) == 6  # few and small: they travel
    printed = capsys.readouterr().out
    assert "tokens per step with the best static tree" in printed
    # again: what is there is not made again, and a failing part does not end the others
    assert campaigns.main(["make_heads", *where, str(out), *ARGS, "--stage", "train,eval"]) == 1
    printed = capsys.readouterr().out
    assert "train sequential FAILED" in printed
    assert "exists; choose another" in printed
    assert printed.count("tokens per step with the best static tree") == 2


def test_a_killed_training_leaves_its_last_heads_in_out(folder, prompt_file, tmp_path, monkeypatch, capsys):
    where = ["--model", str(folder), "--prompts", str(prompt_file), "--work", str(tmp_path / "w")]
    where += ["--out", str(tmp_path / "o"), *ARGS, "--family", "medusa"]
    assert campaigns.main(["make_heads", *where, "--stage", "distill"]) == 0

    def broken(*args, **options):
        raise RuntimeError("no disk")

    with monkeypatch.context() as patch:
        patch.setattr("medusa_serve.training.train_heads.finish", broken)
        assert campaigns.main(["make_heads", *where, "--stage", "train"]) == 1
    assert (tmp_path / "o" / "medusa-interim" / "heads.safetensors").is_file()
    assert campaigns.main(["make_heads", *where, "--stage", "train"]) == 0  # goes on, and finishes
    assert "going on from step" in capsys.readouterr().out
    assert (tmp_path / "o" / "medusa" / "heads.safetensors").is_file()

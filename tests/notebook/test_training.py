"""Heads trained in a notebook, interrupted and again: python -m pytest tests/notebook/test_training.py"""

import json

import pytest

from medusa_serve.errors import InvalidConfig
from medusa_serve.notebook.training import heads_for
from medusa_serve.training import report
from medusa_serve.training.shards import read_answers
from medusa_serve.training.train_heads import Run
from tests.tiny import save_tiny_folder


def test_every_cell_can_run_again(tmp_path, monkeypatch, capsys):
    folder = save_tiny_folder(tmp_path / "tiny")
    lines = [json.dumps({"prompt": f"Tell me about {i}"}) for i in range(300)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines), "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "TOKENS", 8)
    training = heads_for(str(folder), minutes=0.1, prompts=str(tmp_path / "p.jsonl"), answer_tokens=8)
    assert training.out == tmp_path / "medusa_heads" / "tiny"
    assert training.forecast(seconds=0.5).rate > 0
    forecasted = len(read_answers(training.answers))
    assert forecasted > 2

    learn, steps = Run.learn, []

    def interrupted(run, numbers):
        steps.append(run.step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        learn(run, numbers)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "learn", interrupted)
        with pytest.raises(KeyboardInterrupt):
            training.run()
    begun = len(read_answers(training.answers))
    assert begun > forecasted
    assert not training.done

    forecast = training.forecast(seconds=0.5)
    assert "interrupted, and goes on" in forecast
    assert len(read_answers(training.answers)) == begun  # more would make it another training
    capsys.readouterr()
    assert training.run() == str(training.out)
    assert "going on from step 2" in capsys.readouterr().out
    assert training.done

    assert "already" in training.forecast()
    made = (training.out / "heads.safetensors").read_bytes()
    assert training.run() == str(training.out)
    assert "already trained" in capsys.readouterr().out
    assert (training.out / "heads.safetensors").read_bytes() == made


def test_nonsense_is_refused():
    with pytest.raises(InvalidConfig, match="minutes must be positive"):
        heads_for("smollm2-135m", minutes=0)

"""The command `train`: what it refuses, and that an interruption loses nothing. The rest is in test_pipeline.py.

pytest tests/training/test_command.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from medusa_serve.training import pipeline
from medusa_serve.training.shards import read_answers
from tests.inprocess import main_while, stop
from tests.test_cli import refused, run
from tests.tiny import save_tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_folder(tmp_path_factory.mktemp("command") / "tiny-llama")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no prompts"),
        (b" \n\n", "holds no prompts"),
        ("caf\xe9\n".encode("latin-1"), "not UTF-8"),
        (b"Tell me about 1\n", "too few prompts"),
        (None, "There is no file"),
    ],
)
def test_prompts_that_train_nothing_are_refused_before_the_model_is_loaded(
    content: bytes | None,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pipeline, "load_to_answer", None)
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    given = ["--prompts", str(tmp_path / "p.txt"), "--minutes", "1", "--out", str(tmp_path / "heads")]
    refused(capsys, says, "train", *given)
    assert not list(tmp_path.glob("heads*"))


def test_an_output_in_the_way_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "load_to_answer", None)
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    given = ["train", "--prompts", str(tmp_path / "p.txt"), "--minutes", "1", "--out"]
    (tmp_path / "heads").mkdir()
    refused(capsys, "exists; choose another", *given, str(tmp_path / "heads"))
    refused(capsys, "cannot be made", *given, str(tmp_path / "p.txt" / "heads"))


def test_an_interrupted_training_goes_on_when_the_same_command_is_given_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the middle of the answers, and again in the middle of training."""
    (tmp_path / "p.txt").write_text("\n".join(f"Tell me about {i}" for i in range(80)))
    given = ["train", "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "heads"), "--family", "medusa"]
    given += ["--model", str(folder), "--device", "cpu", "--minutes"]
    kept = []
    for seen in ("answers ", " step "):

        def interrupt(told: Iterator[str], seen: str = seen) -> None:
            assert any(seen in line for line in told)
            stop()

        code, err = main_while(interrupt, *given, "9", stream="stderr")
        assert code == 130
        lines = [line for line in err.splitlines() if line.startswith("medusa_serve: ")]
        assert lines == ["medusa_serve: interrupted, nothing is lost: the same command goes on from here"]
        assert "Traceback" not in err
        kept.append(read_answers(tmp_path / "heads.answers"))
    first, whole = kept
    assert 0 < len(first) < len(whole)
    assert len(set(whole.index.tolist())) == len(whole)
    for number, index in enumerate(first.index):  # what the first run made stands there unchanged
        (place,) = np.flatnonzero(whole.index == index)
        assert whole.sequence(int(place)).tolist() == first.sequence(number).tolist()
    assert (tmp_path / "heads.training" / "state.pt").is_file()
    assert run(*given, "0.02") == 0
    out, _ = capsys.readouterr()
    assert "going on from step" in out
    assert "the engine, greedy" in out
    assert out.endswith(f"--heads {tmp_path / 'heads'}\n")
    assert (tmp_path / "heads" / "heads.safetensors").is_file()
    assert len(read_answers(tmp_path / "heads.answers")) == len(whole)
    assert not (tmp_path / "heads.training").exists()

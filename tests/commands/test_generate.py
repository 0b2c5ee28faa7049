"""`medusa-serve generate`: its output, its errors, and one real run on a tiny folder."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medusa_serve.commands import serve as serve_command
from medusa_serve.commands.generate import figures
from medusa_serve.config import EngineConfig
from medusa_serve.errors import LoadError
from medusa_serve.types import Completion, Delta
from tests.test_cli import ROOT, environment, run


def completion(text: str = "Hello there", **changes: Any) -> Completion:
    fields = {
        "id": "gen-1",
        "model": "m",
        "text": text,
        "finish_reason": "stop",
        "seed": 7,
        "token_ids": (1, 2, 3),
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "steps": 1,
        "drafted": 4,
        "accepted": 1,
        "queue_ms": 0.0,
        "prefill_ms": 1.0,
        "decode_ms": 10.0,
    }
    return Completion(**{**fields, **changes})


class FakeLLM:
    """What the command line uses of LLM; remembers what it was given."""

    last: FakeLLM

    def __init__(self, config: Any) -> None:
        self.config, self.closed, self.codec = config, False, self
        self.has_chat_template = config.model != "bare"
        FakeLLM.last = self

    def stream(self, prompt: Any, params: Any) -> Iterator[Delta]:
        self.prompt, self.params = prompt, params
        yield Delta("Hello ", (1,), (0,))
        yield Delta("there", (2,), (1,), completion=completion())

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.closed = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    import medusa_serve.llm

    monkeypatch.setattr(medusa_serve.llm, "LLM", FakeLLM)
    return FakeLLM


def test_generate_streams_and_ends_with_figures(fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-tokens", "9", "--temperature", "0.5", "--top-k", "3", "--seed", "7", "--stop", "a", "--stop", "b"]
    assert run("generate", "Hi", "--system", "Be brief.", "--tree", "8", "--no-lookup", *options) == 0
    out, err = capsys.readouterr()
    assert out == "Hello there\n"
    assert err == "3 tokens, 200.0 tokens/s, 2.00 tokens per step, finish reason: stop\n"
    llm = fake.last
    assert llm.prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    params = llm.params
    assert (params.max_tokens, params.temperature, params.top_k, params.seed, params.stop) == (9, 0.5, 3, 7, ("a", "b"))
    assert (llm.config.tree, llm.config.lookup, llm.config.slots) == ("8", False, 1)
    assert llm.closed


def test_generate_json_is_the_object_of_generate(fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "Hi", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == completion().to_dict()
    assert err == ""


def test_raw_prompts(fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "Hi", "--raw") == 0
    assert fake.last.prompt == "Hi"
    assert run("generate", "Hi", "--model", "bare") == 0
    assert fake.last.prompt == "Hi"
    capsys.readouterr()
    assert run("generate", "Hi", "--model", "bare", "--system", "x") == 1
    assert "no chat template" in capsys.readouterr().err


def test_figures_without_steps() -> None:
    line = figures(completion(steps=0, completion_tokens=1, decode_ms=0.0, finish_reason="length"))
    assert line == "1 tokens, finish reason: length"


def test_errors_are_one_line_and_code_1(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: FakeLLM, config: Any) -> None:
        raise LoadError("There is no folder /nosuch.")

    monkeypatch.setattr(fake, "__init__", fail)
    assert run("generate", "Hi") == 1
    assert capsys.readouterr() == ("", "medusa_serve: There is no folder /nosuch.\n")


def test_ctrl_c_is_130(fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: FakeLLM, prompt: Any, params: Any) -> Iterator[Delta]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(fake, "stream", interrupted)
    assert run("generate", "Hi") == 130
    assert fake.last.closed


@pytest.mark.parametrize(("given", "reached"), [([], None), (["--draft-vocab", "0"], 0), (["--draft-vocab", "99"], 99)])
def test_the_draft_vocabulary_reaches_the_engine(
    given: list[str], reached: int | None, fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[EngineConfig] = []
    monkeypatch.setattr(serve_command, "serve_until_stopped", lambda engine, *server, **options: served.append(engine))
    assert run(*given) == 0
    assert [config.draft_vocab for config in served] == [reached]
    assert run("generate", "Hi", *given) == 0
    assert fake.last.config.draft_vocab == reached


def test_generate_for_real(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal without Unicode, which a process of its own has; then from a pipe, as JSON."""
    options = ["--model", str(folder), "--device", "cpu", "--max-tokens", "20", "--seed", "3", "--temperature", "0.8"]
    streamed = subprocess.run(
        [sys.executable, "-m", "medusa_serve", "generate", "hello", *options],
        cwd=ROOT, capture_output=True, text=True, env=environment(PYTHONIOENCODING="ascii", PYTHONUTF8="0"),
    )  # fmt: skip
    assert streamed.returncode == 0, streamed.stderr
    assert streamed.stderr.count("\n") == 1
    assert "tokens per step, finish reason: " in streamed.stderr
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert run("generate", "-", "--json", *options) == 0
    data = json.loads(capsys.readouterr().out)
    said = data["text"].encode("ascii", "replace").decode()
    assert streamed.stdout.removesuffix("\n") in (said, said.removesuffix("\n"))
    assert (data["model"], data["seed"]) == ("tiny-llama", 3)
    assert set(data) == {"id", "model", "text", "finish_reason", "seed", "usage", "medusa", "timings"}
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert run("generate", "-", *options) == 2

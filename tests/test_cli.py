"""The command line: its errors, its output, and one real run of each command on a tiny folder."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medusa_serve import cli
from medusa_serve.commands import serve as serve_command
from medusa_serve.commands.generate import figures
from medusa_serve.config import EngineConfig
from medusa_serve.errors import LoadError
from medusa_serve.types import Completion, Delta
from tests.inprocess import main_while, stop
from tests.tiny import save_tiny_folder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_folder(tmp_path_factory.mktemp("cli") / "tiny-llama")


def run(*arguments: str) -> int:
    """main's exit code, argparse's own exits included."""
    try:
        return cli.main(arguments)
    except SystemExit as leaving:
        return int(leaving.code or 0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--nosuch"], "--nosuch"),
        (["frobnicate"], "frobnicate"),
        (["serve", "--port", "x"], "--port"),
        (["--port", "99999"], "port must be"),
        (["--slots", "0"], "slots must be"),
        (["--max-context", "1"], "max_context must be"),
        (["--draft-vocab", "x"], "--draft-vocab"),
        (["--draft-vocab=-1"], "draft_vocab must be"),
        (["--tree", "1"], "tree must have"),
        (["--tree", ""], "tree must be"),
        (["--dtype", "int3"], "dtype must be"),
        (["--quantize", "int3"], "quantize must be"),
        (["--quantize", "int8", "--dtype", "float32"], "quantize int8 computes in bfloat16"),
        (["--device", "tpu"], "device must be"),
        (["--model", " "], "model must be"),
        (["--api-key", ""], "api_key must be"),
        (["--max-tokens", "4"], "--max-tokens"),  # an option of generate
        (["generate"], "PROMPT"),
        (["generate", ""], "empty"),
        (["generate", "hi", "there"], "there"),
        (["generate", "hi", "--temperature", "nan"], "temperature must be"),
        (["generate", "hi", "--temperature=-1"], "temperature must be"),
        (["generate", "hi", "--top-p", "0"], "top_p must be"),
        (["generate", "hi", "--seed=-1"], "seed must be"),
        (["generate", "hi", "--max-tokens", "0"], "max_tokens must be"),
        (["generate", "hi", "--stop", ""], "stop string"),
        (["generate", "hi", *["--stop", "a"] * 5], "at most 4"),
        (["generate", "hi", "--raw", "--system", "x"], "--system"),
        (["generate", "hi", "--max-tok", "4"], "--max-tok"),  # no abbreviations
        (["bench"], "WHAT"),
        (["bench", "frobnicate"], "frobnicate"),
        (["bench", "decode", "--rounds", "0"], "rounds must be"),
        (["bench", "peers", "--nodes", "4"], "--nodes"),  # an option of the others
        (["bench", "acceptance"], "--prompts"),
        (["bench", "step", "--tree", "8"], "--tree"),
        (["bench", "table", "x", "--nosuch"], "--nosuch"),
        (["heads"], "WHAT"),
        (["heads", "frobnicate"], "frobnicate"),
        (["heads", "check", "x", "--dtype", "int3"], "dtype must be"),
        (["heads", "convert", "x", "y"], "--to"),
    ],
)
def test_nonsense_is_one_line_and_code_2(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert says in err
    assert "Traceback" not in err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert "generate" in capsys.readouterr().out
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("medusa_serve ")
    assert run("generate", "--help") == 0
    assert "--top-p" in capsys.readouterr().out


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


# ---- heads that do not fit ---------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], says: str, *arguments: str) -> None:
    """One line, exit code 1, nothing on stdout."""
    assert run(*arguments) == 1
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("medusa_serve: ")]
    assert len(lines) == 1, err
    assert err.splitlines()[-1] == lines[0]
    assert says in lines[0]
    assert out == ""


@pytest.mark.parametrize("kind", ["hidden size", "vocabulary", "draft vocabulary"])
def test_heads_of_another_base_are_refused(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from medusa_serve.model.drafting.files import save_heads
    from medusa_serve.model.drafting.heads import HeadsInfo, MedusaHeads

    hidden, rows, ids = 32, 267, None
    if kind == "hidden size":
        hidden, says = 16, "hidden size 16, the base model 32"
    elif kind == "vocabulary":
        rows, says = 2000, "vocabulary of 2000, the base vocabulary has 267"
    else:
        rows, ids, says = 5, torch.tensor([0, 1, 2, 3, 900]), "token 900, the base vocabulary ends at 266"
    heads = MedusaHeads(hidden, 2, vocab_size=rows, token_map=ids)
    info = HeadsInfo(
        family="medusa", num_heads=2, num_layers=1, hidden_size=hidden, vocab_size=1000, tied=False, bias=True
    )
    path = str(save_heads(heads, info, tmp_path / "heads").parent)
    model = ["--model", str(folder), "--device", "cpu"]
    refused(capsys, says, "generate", "hi", *model, "--heads", path)
    refused(capsys, says, "heads", "check", path, *model)
    refused(capsys, says, "serve", "--port", "0", *model, "--heads", path, "--json")


# ---- real runs ---------------------------------------------------------------------------------------------------


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, **variables}


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


def send(line: str) -> dict[str, Any]:
    """Run a curl line, or what it says where there is no curl."""
    words = shlex.split(line)
    headers = dict(words[i + 1].split(": ", 1) for i, word in enumerate(words) if word == "-H")
    request = urllib.request.Request(words[2], words[words.index("-d") + 1].encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def test_serve_prints_a_line_that_works(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "medusa_serve", "--port", "0", "--device", "cpu", "--model", str(folder)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines = []
        while not lines or not lines[-1].startswith("curl"):
            lines.append(process.stdout.readline())
            assert lines[-1], process.communicate()
        assert "http://127.0.0.1:" in lines[0]
        assert lines[1] == "no key needed: loopback only\n"
        assert send(lines[-1])["usage"]["completion_tokens"] > 0
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[1] == ""
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("given", [None, "from-the-environment"])
def test_another_host_needs_a_key(folder: Path, given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDUSA_SERVE_API_KEY", given or "")

    def act(lines: Iterator[str]) -> None:
        ready = json.loads(next(lines))
        assert ready["api_key"] == given if given else len(ready["api_key"]) >= 40
        assert send(ready["curl"])["model"] == "tiny-llama"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            send(ready["curl"].replace(ready["api_key"], "wrong"))
        stop(signal.SIGTERM)

    options = ["--model", str(folder), "--device", "cpu", "--port", "0", "--host", "0.0.0.0", "--json"]
    code, out = main_while(act, *options)
    assert code == 0
    assert out.count("\n") == 1


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--port", "0", "--device", "cpu", "--model", str(tmp_path)) == 1
    out, err = capsys.readouterr()
    reason = f"The folder {tmp_path} holds no model: there is no config.json in it."
    assert err.splitlines()[-1] == f"medusa_serve: {reason}"
    assert "Traceback" not in err
    assert "curl" not in out

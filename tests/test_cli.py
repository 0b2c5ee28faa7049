"""The command line: its errors and its help. What the commands do is in tests/commands/."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from medusa_serve import cli
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


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, **variables}


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

"""Every bench of the developers is one command, and every stored result is shown by the command that made it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medusa_serve import cli
from tests.campaigns import __main__ as campaigns

HERE = Path(__file__).parent
RESULTS = sorted((HERE.parents[1] / "notebooks/results").glob("*.json"))
LIBRARIES = {"http_load", "invariants", "serving", "shapes"}
FOR_USERS = {"acceptance", "decode", "peers", "step"}


def test_every_file_is_a_bench_or_a_library() -> None:
    files = {path.stem for path in HERE.glob("*.py") if not path.stem.startswith(("test_", "__"))}
    assert files == set(campaigns.MEASURED | campaigns.OTHERS) | LIBRARIES


@pytest.mark.parametrize("name", [*campaigns.MEASURED, *campaigns.OTHERS])
def test_each_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        campaigns.main([name, "--help"])
    assert leaving.value.code == 0
    out = capsys.readouterr().out
    assert f"python -m tests.campaigns {name}" in out
    assert "--model" in out


@pytest.mark.parametrize("arguments", [[], ["nosuch"], ["serve", "--nosuch"], ["engine", "--rounds", "0"]])
def test_nonsense_is_one_line_and_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        campaigns.main(arguments)
    assert leaving.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_stored_result_is_shown(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = json.loads(path.read_text(encoding="utf-8"))["kind"]
    if kind in FOR_USERS:
        assert cli.main(["bench", kind, "--show", str(path)]) == 0
    else:
        assert campaigns.main([kind.replace("-", "_"), "--show", str(path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 1

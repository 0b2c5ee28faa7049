"""`python -m tests.campaigns drafting`, on a base that is small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medusa_serve.model.drafting.heads import MedusaHeads
from tests.campaigns import __main__ as campaigns
from tests.commands.test_heads import HIDDEN, chain_folder, chain_heads, saved

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> int:
    try:
        return campaigns.main(["drafting", *arguments])
    except SystemExit as leaving:
        return int(leaving.code or 0)


def test_drafting_has_a_price(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, heads = chain_folder(tmp_path / "chain"), MedusaHeads(HIDDEN, 3)
    right = saved(chain_heads(base, 2), tmp_path / "right")
    path = saved(heads, tmp_path / "tied")
    fixed = ["--model", str(base), "--device", "cpu", "--rounds", "2"]
    out = tmp_path / "d.json"
    assert run(*fixed, "--heads", path, "--nodes", "4,16", "--draft-vocab", "64", "--out", str(out)) == 0
    result = json.loads(out.read_text())
    assert [row["nodes"] for row in result["rows"]] == [4, 16]
    assert (result["draft_vocab"], result["depth"], result["engine"]["heads"]) == (64, 3, "medusa")
    for row in result["rows"]:
        assert row["draft_share"] == pytest.approx(row["draft_ms"] / row["plain_ms"], rel=0.01)
        assert row["step_ratio"] == pytest.approx(row["step_ms"] / row["plain_ms"], rel=0.01)
        assert 0 < row["draft_ms"] < row["step_ms"]
    assert "draft/plain" in capsys.readouterr().out

    def refused(says: str, *more: str, code: int) -> None:
        assert run(*fixed, *more) == code
        assert says in capsys.readouterr().err

    refused("draft_vocab cannot change", "--heads", right, "--draft-vocab", "0", code=1)
    refused("more than the", "--heads", path, "--draft-vocab", "9999", code=1)
    refused("no heads to measure", "--heads", "none", code=1)
    refused("nodes must be", "--nodes", "1", code=2)
    refused("rounds must be", "--rounds", "0", code=2)


def test_a_stored_result_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    results = ROOT / "notebooks/results"
    assert run("--show", str(results / "drafting_h200.json")) == 0
    assert "smollm2-135m in bfloat16 on NVIDIA H200" in capsys.readouterr().out
    assert run("--show", str(results / "acceptance_one_h200.json")) == 1
    assert "is no result of `bench drafting`" in capsys.readouterr().err


def test_drafting_costs_the_gpu_at_most_a_quarter_of_a_plain_step() -> None:
    result = json.loads((ROOT / "notebooks/results/drafting_h200.json").read_text())
    assert {row["nodes"]: row["draft_share"] <= 0.25 for row in result["rows"]} == {8: True, 64: True}

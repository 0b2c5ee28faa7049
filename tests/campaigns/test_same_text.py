"""`python -m tests.campaigns same_text`: float32 parts nowhere; where texts part it is seen, with the gap."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medusa_serve.bench.acceptance import Question
from medusa_serve.errors import InvalidConfig
from medusa_serve.types import TokenLogprob
from tests.campaigns import __main__ as campaigns
from tests.campaigns.same_text import SameTextConfig, parting, row_of, table, usual_gaps
from tests.tiny import save_tiny_folder

ROOT = Path(__file__).parents[2]


class Told:
    """Holds 7 and 8 almost equally likely behind any text, and 9 far behind."""

    def generate_ids(self, encoded: list[list[int]], params: Any) -> list[Any]:
        assert params.speculation is False
        top = ((7, -0.5), (8, -0.75), (9, -3.0))
        return [SimpleNamespace(logprobs=(TokenLogprob(-0.5, top),))]


def completions(*texts: tuple[int, ...]) -> list[Any]:
    return [SimpleNamespace(token_ids=text, logprobs=()) for text in texts]


def test_where_texts_part_and_by_how_much() -> None:
    questions = [Question("none", [1, 2], 0)] * 4
    plain = completions((5, 7), (5, 7), (5, 7), (5, 7))
    told = completions((5, 7), (5, 8), (5, 9), (5, 4))  # the same, a near-tie, no tie, a token out of nowhere
    row = row_of(Told(), questions, plain, told, near=0.375)
    assert row == {
        "answers": 4,
        "different": 3,
        "share": 0.75,
        "gaps": {"median": 1.375, "largest": 2.5},
        "no_tie": 2,
    }
    assert [parting(want.token_ids, got.token_ids) for want, got in zip(plain, told, strict=True)] == [None, 1, 1, 1]


def test_the_usual_gap_is_between_the_two_likeliest() -> None:
    places = (TokenLogprob(-1.0, ((1, -1.0), (2, -1.5))), TokenLogprob(-2.0, ((3, -0.5), (4, -3.5))))
    assert usual_gaps([SimpleNamespace(logprobs=places)]) == [0.5, 3.0]


def test_the_command_end_to_end_in_float32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = str(save_tiny_folder(tmp_path / "model", "llama")), tmp_path / "s.json"
    options = ["--model", folder, "--device", "cpu", "--dtype", "float32", "--concurrency", "1,3", "--tokens", "12"]
    assert campaigns.main(["same_text", *options, "--max-context", "256", f"--out={out}"]) == 0
    result = json.loads(out.read_text())
    modes = [(row["concurrency"], row["speculation"]) for row in result["rows"]]
    assert modes == [(1, True), (3, True), (3, False)]
    assert all((row["different"], row["gaps"]) == (0, None) for row in result["rows"])
    assert result["usual_gap"] > 1000 * result["near"] > 0
    assert capsys.readouterr().out.strip() == table(result)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_was_measured_on_a_gpu_parts_at_near_ties_alone(dtype: str) -> None:
    result = json.loads((ROOT / f"notebooks/results/same_text_{dtype}_h200.json").read_text())
    assert result["engine"]["dtype"] == dtype
    assert [row["no_tie"] for row in result["rows"]] == [0, 0, 0]
    assert all(row["gaps"]["largest"] <= result["near"] < result["usual_gap"] for row in result["rows"])
    place = {"bfloat16": "in {:.0f} and", "float16": "and {:.0f} % of answers of 64 tokens"}[dtype]
    assert place.format(100 * result["rows"][0]["share"]) in " ".join((ROOT / "README.md").read_text().split())


@pytest.mark.parametrize("given", [{"concurrency": ()}, {"tokens": 1}])
def test_nonsense_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig) as refused:
        SameTextConfig(**given)
    assert refused.value.param == next(iter(given))

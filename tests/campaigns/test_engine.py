"""The stored figures of `tests.campaigns engine` hold what was asked for."""

import json
from pathlib import Path

import pytest

from medusa_serve.bench.questions import read_prompts
from medusa_serve.errors import InvalidConfig
from tests.campaigns.engine import BenchConfig, table

ROOT = Path(__file__).parents[2]


def test_the_engine_reaches_what_was_asked_for():
    result = json.loads((ROOT / "notebooks/results/engine_cpu.json").read_text(encoding="utf-8"))
    assert "plain decoding over generate" in table(result)
    assert result["streams"]["ratio"] >= 3.0
    assert result["plain"]["ratio"] >= 1.0
    assert result["lookup"]["tokens_per_step"] > 1.3
    assert result["lookup"]["texts_equal_plain"] == result["lookup"]["prompts"]


def test_prompts_are_there():
    prompts = read_prompts()
    assert len(prompts.questions) >= 8
    assert len(prompts.rewrites) == len(prompts.tasks) * len(prompts.passages)


@pytest.mark.parametrize("field", ["tokens", "rounds", "streams"])
def test_nonsense_is_refused(field):
    with pytest.raises(InvalidConfig, match=field):
        BenchConfig(**{field: 0})

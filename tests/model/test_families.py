"""Tree steps of many decoder families equal plain forwards; the stored table says of each what a run says here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medusa_serve.errors import InvalidConfig
from tests.campaigns import __main__ as campaigns
from tests.campaigns.families import FAMILIES, FamiliesConfig, row_of, table

STORED = Path(__file__).parents[2] / "notebooks/results/families.json"
QUICK = ("llama", "qwen2", "gemma2", "phi", "gpt2", "opt", "falcon", "bloom", "mamba")  # the others are `-m slow`
pytestmark = pytest.mark.filterwarnings("ignore")  # some families warn at their own construction


def stored() -> dict[str, dict[str, Any]]:
    return {row["family"]: row for row in json.loads(STORED.read_text())["rows"]}


def test_at_least_20_families_run_with_trees() -> None:
    rows = stored()
    assert set(rows) == set(FAMILIES)
    assert sum(row["runs"] == "trees" for row in rows.values()) >= 20
    assert not [row for row in rows.values() if row["runs"] == "not"]


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_a_family_runs_as_the_table_says(family: str) -> None:
    row, told = row_of(family), stored()[family]
    assert (row["runs"], row["why"]) == (told["runs"], told["why"])
    if row["runs"] in ("trees", "mask"):
        assert row["error"] < 1e-5


def test_families_that_cannot_branch_say_why() -> None:
    rows = stored()
    assert "(ALiBi)" in rows["bloom"]["why"]
    assert "(ALiBi)" in rows["mpt"]["why"]
    for name in ("mamba", "mamba2", "recurrent_gemma"):
        assert rows[name]["runs"] == "plain"


def test_the_command_prints_the_stored_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert campaigns.main(["families", "--show", str(STORED)]) == 0
    printed = capsys.readouterr().out.rstrip("\n")
    assert printed == table(json.loads(STORED.read_text()))
    assert len(printed.splitlines()) == 1 + len(FAMILIES)
    with pytest.raises(InvalidConfig, match="no family 'x'"):
        FamiliesConfig(families=("x",))

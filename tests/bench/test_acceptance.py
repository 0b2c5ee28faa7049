"""`medusa-serve bench acceptance`, on a base whose every next token is known: figures are exact."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_serve import cli
from medusa_serve.bench import acceptance
from medusa_serve.bench.acceptance import Answer, heads_digest, rows_of, table
from medusa_serve.presets import FAMILIES, shipped_heads
from tests.commands.test_heads import LONG, SHORT, chain_folder, chain_heads, saved
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[2]
TOKENS, ROUND, LOOPING, LONG_ONE = 25, 4, 2, 1  # of an answer; evaluation prompts by kind


def held_out(make: Callable[[int], str], count: int) -> list[str]:
    texts = (make(number) for number in range(100_000))
    chosen = (text for text in texts if int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 == 0)
    return [next(chosen) for _ in range(count)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base, heads, and prompts whose last letter decides the answer: a long cycle for those that end in "A"; for
    others a cycle of four tokens, which is a loop."""
    home = tmp_path_factory.mktemp("world")
    base = chain_folder(home / "chain")
    ending = tiny_tokenizer().convert_ids_to_tokens(SHORT[0])
    assert len(ending) == 1
    lines = [{"prompt": text, "category": "round"} for text in held_out(lambda i: f"Say {i} A", ROUND)]
    lines += [{"prompt": text, "category": "short"} for text in held_out(lambda i: f"Say {i}{ending}", LOOPING)]
    lines += [{"prompt": text, "category": "round"} for text in held_out(lambda i: f"{i} " * 200 + "A", LONG_ONE)]
    lines += [{"prompt": f"No {i} A", "category": "round"} for i in range(5)]
    (home / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return {
        "base": str(base),
        "prompts": str(home / "prompts.jsonl"),
        "right": saved(chain_heads(base, 2), home / "right"),
        "wrong": saved(chain_heads(base, 2, right=()), home / "wrong"),
        "mixed": saved(chain_heads(base, 2, right=LONG), home / "mixed"),
    }


def run(*arguments: str) -> int:
    try:
        return cli.main(["bench", *arguments])
    except SystemExit as leaving:
        return int(leaving.code or 0)


def accept(world: dict[str, str], heads: str, out: Path, *more: str, tokens: int = TOKENS) -> int:
    fixed = ["--prompts", world["prompts"], "--model", world["base"], "--heads", world.get(heads, heads)]
    return run(
        "acceptance", *fixed, "--device", "cpu", "--max-tokens", str(tokens), "--out", str(out),
        *(more or ("--nodes", "4", "--temperatures", "0")),
    )  # fmt: skip


def figures(out: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    rows = json.loads(out.read_text())["rows"]
    found = {(row["nodes"], row["temperature"], row["category"], row["kind"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def test_right_heads_emit_depth_plus_one_and_wrong_ones_one(
    world: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "right.json"
    assert accept(world, "right", out, "--nodes", "8,4", "--temperatures", "0,0.7") == 0
    shown, progress = capsys.readouterr()
    rows = figures(out)
    assert {key[:2] for key in rows} == {(n, t) for n in (4, 8) for t in (0, 0.7)}
    for (_, temperature, category, kind), row in rows.items():
        count = {"round": ROUND, "short": LOOPING, "all": ROUND + LOOPING}[category]
        count -= 0 if kind == "all" else {"round": 0}.get(category, LOOPING)
        assert (row["answers"], row["tokens"], row["steps"]) == (count, count * TOKENS, count * (TOKENS - 1) / 3)
        assert row["acceptance"] == (3.0 if count else None)
        assert ("decode_ms" in row) == (temperature == 0)
        if temperature == 0 and count:
            assert row["decode_ms"] > 0
    assert f"4 nodes, T 0: {ROUND + LOOPING}/{ROUND + LOOPING} answers, 3.00 tokens per step" in progress
    assert "tokens per step at T = 0.7" in shown
    result = json.loads(out.read_text())
    assert result["evaluation"] == {"prompts": ROUND + LOOPING + LONG_ONE, "left_out": LONG_ONE}
    assert (result["engine"]["heads"], result["engine"]["dtype"], result["heads"]) == (
        "medusa",
        "float32",
        world["right"],
    )
    assert set(result["machine"]) >= {"device", "threads", "torch"}
    assert len(result["options"]["prompts_sha256"]) == 64
    assert "at most 25 of a category" in result["rule"]
    assert accept(world, "wrong", tmp_path / "wrong.json") == 0
    assert {row["acceptance"] for row in figures(tmp_path / "wrong.json").values() if row["answers"]} == {1.0}


def test_figures_do_not_depend_on_how_many_are_answered_at_once(world: dict[str, str], tmp_path: Path) -> None:
    found = []
    for sequences in ("1", "3"):
        out = tmp_path / f"{sequences}.json"
        sizes = ("--nodes", "4,8", "--temperatures", "0,0.7", "--sequences", sequences)
        assert accept(world, "mixed", out, *sizes, tokens=12) == 0
        assert f"{sequences} at once" in json.loads(out.read_text())["rule"]
        found.append({key: {n: x for n, x in row.items() if n != "decode_ms"} for key, row in figures(out).items()})
    assert found[0] == found[1]


def test_loops_are_counted_apart(world: dict[str, str], tmp_path: Path) -> None:
    """Heads that are right on the long cycle and wrong on the short one: the loops hold all that is wrong."""
    assert accept(world, "mixed", tmp_path / "m.json", "--nodes", "4", "--temperatures", "0") == 0
    rows = figures(tmp_path / "m.json")
    gained = TOKENS - 1
    assert rows[4, 0, "short", "all"]["acceptance"] == 1.0
    assert rows[4, 0, "short", "no loops"]["acceptance"] is None
    mean = round((ROUND + LOOPING) * gained / (ROUND * gained / 3 + LOOPING * gained), 4)
    assert rows[4, 0, "all", "all"]["acceptance"] == mean
    assert rows[4, 0, "all", "no loops"]["acceptance"] == 3.0
    assert "-" in table([json.loads((tmp_path / "m.json").read_text())])


def test_seeds_come_from_the_prompts(world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    answers = acceptance._answers

    def spy(llm: Any, questions: Any, temperature: float, config: Any) -> Any:
        asked.append((temperature, [question.seed for question in questions]))
        return answers(llm, questions, temperature, config)

    monkeypatch.setattr(acceptance, "_answers", spy)
    assert accept(world, "right", tmp_path / "s.json", "--nodes", "4", "--temperatures", "0.5", tokens=3) == 0
    lines = [json.loads(line)["prompt"] for line in Path(world["prompts"]).read_text().splitlines()]
    known = {int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11 for text in lines}
    ((temperature, seeds),) = asked
    assert temperature == 0.5
    assert len(set(seeds)) == ROUND + LOOPING
    assert set(seeds) <= known


# ---- going on ----------------------------------------------------------------------------------------------------


def test_a_killed_run_keeps_what_it_has_and_goes_on(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "k.json", ("--nodes", "4,8", "--temperatures", "0,0.7")
    count = 0

    def killed(answers: Any, nodes: int, temperature: float) -> Any:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt
        return rows_of(answers, nodes, temperature)

    with monkeypatch.context() as patch:
        patch.setattr(acceptance, "rows_of", killed)
        assert accept(world, "right", out, *whole, tokens=4) == 130
    kept = figures(out)
    assert {key[:2] for key in kept} == {(4, 0)}
    assert accept(world, "right", out, *whole, tokens=4) == 0
    after = figures(out)
    assert {key[:2] for key in after} == {(4, 0), (4, 0.7), (8, 0), (8, 0.7)}
    assert all(after[key] == row for key, row in kept.items())  # measured once: the times are the same
    monkeypatch.setattr(acceptance, "_measure", None)  # nothing is missing, so nothing is loaded
    assert accept(world, "right", out, *whole, tokens=4) == 0
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_of_other_options_is_refused(
    world: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "o.json"
    assert accept(world, "right", out, tokens=4) == 0
    before = out.read_text()
    capsys.readouterr()

    def refused(says: str, heads: str, *more: str, tokens: int = 4, code: int = 1) -> None:
        assert accept(world, heads, out, *more, tokens=tokens) == code
        shown, err = capsys.readouterr()
        assert shown == ""
        assert says in err
        assert err.count("\n") == 1
        assert out.read_text() == before

    refused("max_tokens 4, not 5", "right", tokens=5)
    refused("heads_sha256", "wrong")
    refused("per_category 25, not 2", "right", "--per-category", "2")
    refused("dtype float32, not float64", "right", "--dtype", "float64", "--nodes", "8")
    out.write_text(before := "[]")
    refused("no result of `bench acceptance`", "right")
    out.write_text(before := "{")
    refused("cannot be read as JSON", "right")


def test_heads_are_known_by_what_drafts(world: dict[str, str], tmp_path: Path) -> None:
    """Another word about where they come from is no other heads; another calibration or tensor is."""
    folder = tmp_path / "copy"
    shutil.copytree(Path(world["right"]), folder)
    digest = heads_digest(folder)
    assert digest == heads_digest(Path(world["right"])) != heads_digest(Path(world["wrong"]))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"provenance": {"base": "another word"}}))
    assert heads_digest(folder) == digest
    (folder / "config.json").write_text(json.dumps(config | {"calibration": {"tau": [0.5, 0.5]}}))
    assert heads_digest(folder) != digest


def test_what_cannot_be_measured_is_refused(
    world: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(says: str, *arguments: str, code: int) -> None:
        assert run(*arguments) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert says in err
        assert err.count("\n") == 1

    some = ["acceptance", "--model", world["base"], "--device", "cpu", "--prompts", world["prompts"]]
    refused("--prompts", "acceptance", code=2)
    refused("must be numbers with commas", *some, "--nodes", "4;8", code=2)
    refused("nodes must be different numbers from 2 to 64", *some, "--nodes", "4,65", code=2)
    refused("nodes must be different", *some, "--nodes", "4,4", code=2)
    refused("temperatures must be different numbers from 0 to 100", *some, "--temperatures=-1", code=2)
    refused("temperatures must be", *some, "--temperatures", "nan", code=2)
    refused("max_tokens must be", *some, "--max-tokens", "1", code=2)
    refused("per_category must be", *some, "--per-category", "0", code=2)
    refused("unrecognized arguments: --tree", *some, "--tree", "8", code=2)
    refused("--nodes means nothing", "acceptance", "--show", "x", "--nodes", "4", code=2)
    refused("no heads to measure", *some, code=1)
    refused("no heads to measure", *some, "--heads", "none", code=1)
    refused("no file or folder", *some, "--heads", str(tmp_path / "none"), code=1)
    refused("There is no folder for", *some, "--heads", world["right"], "--out", str(tmp_path / "a" / "b"), code=1)
    refused("There is no file", *some[:-1], str(tmp_path / "none.txt"), "--heads", world["right"], code=1)
    (tmp_path / "p.txt").write_text("No 1 A\n")
    refused("no evaluation prompt", *some[:-1], str(tmp_path / "p.txt"), "--heads", world["right"], code=1)
    text = held_out(lambda i: f"{i} " * 200, 1)[0]
    (tmp_path / "p.txt").write_text(text)
    refused("fits into the context", *some[:-1], str(tmp_path / "p.txt"), "--heads", world["right"], code=1)


# ---- tables ------------------------------------------------------------------------------------------------------


def test_stored_files_are_shown_and_merged(
    world: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, other = (str(tmp_path / f"{name}.json") for name in ("one", "two", "other"))
    assert accept(world, "mixed", Path(one), "--nodes", "4", "--temperatures", "0") == 0
    assert accept(world, "mixed", Path(two), "--nodes", "8", "--temperatures", "0,0.7") == 0
    assert accept(world, "right", Path(other)) == 0
    capsys.readouterr()
    assert run("acceptance", "--show", one, two) == 0
    lines = capsys.readouterr().out.splitlines()
    head = lines.index(next(line for line in lines if line.startswith("tokens per step at T = 0 ")))
    assert lines[head].split()[-3:] == ["4", "8", "answers"]
    cells = [line.split() for line in lines[head + 1 : head + 7]]
    assert cells[0] == ["round", "all", "3.00", "3.00", str(ROUND)]
    assert cells[2] == ["short", "all", "1.00", "1.00", str(LOOPING)]
    assert cells[3] == ["short", "no", "loops", "-", "-", "0"]
    assert cells[5] == ["all", "no", "loops", "3.00", "3.00", str(ROUND)]
    assert lines[head + 7].startswith("ms per step")
    assert lines[head + 9].split()[-2:] == ["8", "answers"]  # T = 0.7 was measured with 8 nodes alone
    assert "medusa heads, chain in float32" in lines[0]
    assert run("acceptance", "--show", one, other) == 1
    assert "Not measured alike" in capsys.readouterr().err
    assert run("acceptance", "--show", str(tmp_path / "none")) == 1


def test_rows_of_answers() -> None:
    answers = [Answer("a", 11, 5, 50.0, False), Answer("b", 1, 0, 0.0, False), Answer("b", 21, 20, 100.0, True)]
    rows = {(row["category"], row["kind"]): row for row in rows_of(answers, 8, 0.0)}
    assert rows["a", "all"] | {} == {
        "nodes": 8, "temperature": 0.0, "category": "a", "kind": "all",
        "answers": 1, "tokens": 11, "steps": 5, "acceptance": 2.0, "decode_ms": 10.0,
    }  # fmt: skip
    assert rows["b", "no loops"]["acceptance"] is None
    assert rows["b", "no loops"]["decode_ms"] is None
    assert rows["all", "all"]["acceptance"] == round(30 / 25, 4)
    assert rows["all", "all"]["decode_ms"] == 7.5
    assert rows["all", "no loops"]["steps"] == 5


# ---- what ships --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_readme_shows_what_the_shipped_heads_reach(family: str) -> None:
    result = json.loads((ROOT / f"notebooks/results/acceptance_{family}_h200.json").read_text())
    heads = shipped_heads("smollm2-135m", family)
    assert heads is not None
    assert result["options"]["heads_sha256"] == heads_digest(heads)  # other heads: measure again
    found = {
        (row["temperature"], row["nodes"]): row["acceptance"]
        for row in result["rows"]
        if (row["category"], row["kind"]) == ("all", "all")
    }
    greedy = ", ".join(f"{found[0, nodes]:.2f}" for nodes in (4, 8, 24, 64))
    assert greedy in (ROOT / "README.md").read_text("utf-8")
    assert all(found[0.7, nodes] <= found[0, nodes] for nodes in (4, 8, 24, 64))


def test_one_sequence_reaches_what_was_asked_for() -> None:
    """The figures that the default heads have to hold, one sequence at a time; loops included."""
    result = json.loads((ROOT / "notebooks/results/acceptance_one_h200.json").read_text())
    assert result["options"]["heads_sha256"] == heads_digest(shipped_heads("smollm2-135m", "auto"))
    assert result["options"]["sequences"] == 1
    least = {(0, 4): 2.0, (0, 8): 2.3, (0, 24): 2.7, (0, 64): 3.1, (0.7, 8): 2.1, (0.7, 64): 2.7}
    for row in result["rows"]:
        if (row["category"], row["kind"]) == ("all", "all"):
            assert row["answers"] == 225
            assert row["acceptance"] >= least.pop((row["temperature"], row["nodes"]))
    assert not least

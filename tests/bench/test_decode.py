"""`medusa-serve bench decode`, on a base whose every next token is known: tokens per step are exact.

pytest tests/bench/test_decode.py
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from medusa_serve import cli
from medusa_serve.bench import decode
from medusa_serve.bench.decode import DecodeConfig, Mode, Sample, Span, Turn, modes, ratios_of, row_of, together, turns
from medusa_serve.config import EngineConfig
from medusa_serve.errors import GenerationFailed, InvalidConfig, LoadError
from medusa_serve.model.loading.load import Codec
from medusa_serve.types import Completion, Delta
from tests.commands.test_heads import chain_folder, chain_heads, saved
from tests.tiny import tiny_tokenizer

TOKENS = 16  # of an answer: the first comes from prefill, 15 from decode steps of 1 or 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base, and heads that draft its next two tokens rightly."""
    home = tmp_path_factory.mktemp("world")
    base = chain_folder(home / "chain")
    return {"base": str(base), "right": saved(chain_heads(base, 2), home / "right")}


def run(*arguments: str) -> int:
    try:
        return cli.main(["bench", "decode", *arguments])
    except SystemExit as leaving:
        return int(leaving.code or 0)


def common(world: dict[str, str]) -> list[str]:
    fixed = ["--model", world["base"], "--heads", world["right"], "--device", "cpu", "--max-context", "256"]
    return [*fixed, "--no-lookup", "--tokens", str(TOKENS), "--nodes", "4", "--rounds", "1"]


def test_every_mode_has_the_tokens_per_step_that_its_drafts_are_worth(
    world: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "d.json"
    arguments = [*common(world), "--concurrency", "2,1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["medusa-serve", "bench", "decode", *arguments])
    assert run(*arguments) == 0
    shown = capsys.readouterr().out
    text = out.read_text()
    result = json.loads(text)
    rows = {(row["concurrency"], row["mode"]): row for row in result["rows"]}
    assert list(rows) == [(count, mode) for count in (1, 2) for mode in ("plain", "off", "auto", "4")]
    for (_, mode), row in rows.items():
        speculates = mode not in ("plain", "off")
        assert row["tokens_per_step"] == (3.0 if speculates else 1.0)
        assert (row["nodes_per_step"] >= 3) == speculates  # the root and two drafts at least
        assert row["nodes_per_step"] <= (int(mode) if mode.isdigit() else 64)
        assert row["same_text"] == 1.0
        assert row["whole_tokens_per_second"] > 0
    for row in result["ratios"]:
        others = {mode for (count, mode) in rows if count == row["concurrency"] and mode != "auto"}
        assert row["best"] in others
        assert row["auto_over_best"] <= row["auto_over_off"] * 10
    assert [row["concurrency"] for row in result["ratios"]] == [1, 2]
    assert (result["kind"], result["engine"]["slots"], result["engine"]["heads"]) == ("decode", 2, "medusa")
    assert set(result["machine"]) >= {"device", "threads", "torch", "transformers", "medusa_serve"}
    assert result["command"].endswith("--concurrency 2,1 --out d.json")
    assert "--model chain" in result["command"]
    assert str(Path(world["base"]).parent) not in text
    assert str(tmp_path) not in text
    assert "chain in float32, medusa heads" in shown
    assert "auto over the best of the others" in shown


def test_evaluation_prompts_of_a_file_with_seeds_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"Say {i} A" for i in range(2000)]
    held = {text for text in texts if int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 == 0}
    (tmp_path / "p.txt").write_text("\n".join(texts))
    asked: list[tuple[Turn, list[int]]] = []

    def spy(llm: Any, turn: Turn, prompts: Any, config: Any) -> Sample:
        asked.append((turn, [prompt.seed for prompt in prompts]))
        assert {llm.codec.decode(prompt.ids) for prompt in prompts} <= held
        return sample([completion(4, 3)], 1.0, None)

    monkeypatch.setattr(decode, "_measure", spy)

    class Fake:
        codec = Codec(tiny_tokenizer(chat_template=None))

        def describe(self) -> dict[str, Any]:
            return {"drafts": ["lookup"], "max_context": 100}

    monkeypatch.setattr(decode.Engines, "get", lambda self, tree: Fake())
    config = DecodeConfig(concurrency=(1,), nodes=(4,), rounds=1, prompts=str(tmp_path / "p.txt"), tokens=8)
    result = decode.bench_decode(EngineConfig(), config)
    assert result["options"]["prompts"] == "p.txt"
    assert len(asked) == 2 * 4
    assert len({tuple(seeds) for _, seeds in asked}) == 1
    seeds = asked[0][1]
    assert len(set(seeds)) == len(seeds) == min(25, len(held))
    (tmp_path / "p.txt").write_text("No evaluation prompt\n" * 2)
    with pytest.raises(LoadError, match="None of the 0"):
        decode.bench_decode(EngineConfig(), config)


# ---- what is timed -----------------------------------------------------------------------------------------------


def completion(tokens: int, steps: int, drafted: int = 0, ids: tuple[int, ...] = ()) -> Completion:
    return Completion(
        id="x", model="m", text="", finish_reason="length", seed=0, token_ids=ids, prompt_tokens=1,
        completion_tokens=tokens, steps=steps, drafted=drafted, accepted=0, queue_ms=0, prefill_ms=0, decode_ms=0,
    )  # fmt: skip


def sample(answers: list[Completion], seconds: float, span: Span | None) -> Sample:
    return Sample(answers, seconds, span)


def news(**tokens: int) -> list[tuple[str, Delta]]:
    """Of each sequence so many tokens; a negative number ends it with so many."""
    made = []
    for name, count in tokens.items():
        last = completion(1, 1) if count < 0 else None
        made.append((name, Delta("", tokens=(abs(count),), accepted=(0,), completion=last)))
    return made


def test_only_the_time_counts_in_which_all_decode() -> None:
    deliveries = [
        (1.0, news(a=1)),
        (2.0, news(a=3, b=1)),  # b's first token: from here on both decode
        (2.5, news(a=2, b=1)),
        (3.5, news(a=1, b=4)),
        (4.0, news(a=3, b=-2)),  # still a step of both
        (9.0, news(a=-1)),
    ]
    assert together(deliveries, 2) == Span(tokens=13, seconds=2.0, steps=3)
    assert together(deliveries, 3) is None
    assert together([(1.0, news(a=1)), (2.0, news(a=-5)), (3.0, news(b=1)), (4.0, news(b=-5))], 2) is None
    assert together([(1.0, news(a=1)), (2.0, news(a=2)), (4.0, news(a=-3))], 1) == Span(5, 3.0, 2)


def test_rows_and_ratios_are_medians() -> None:
    def one(rate: float, whole: float, ids: tuple[int, ...] = (7,)) -> Sample:
        return sample([completion(11, 4, drafted=12, ids=ids)], 11 / whole, Span(int(rate * 10), 10.0, 20))

    taken = {
        (2, "plain"): [one(10, 8), one(20, 8), one(90, 8)],
        (2, "off"): [one(12, 8), one(12, 8), one(12, 8, ids=(8,))],
        (2, "auto"): [one(30, 8), one(20, 10), one(45, 8)],
        (1, "auto"): [one(1, 1)],
    }
    row = row_of(taken, 2, "auto")
    assert row == {
        "concurrency": 2, "mode": "auto", "tokens_per_second": 30.0, "whole_tokens_per_second": 8.0, "step_ms": 500.0,
        "tokens_per_step": 2.5, "nodes_per_step": 4.0, "same_text": 0.6667,
    }  # fmt: skip
    assert ratios_of(taken, 2) == {
        "concurrency": 2, "whole": False, "best": "plain",
        "auto_over_best": 1.0, "auto_over_off": 2.5, "auto_over_plain": 1.0,
    }  # fmt: skip
    taken[2, "off"][0] = taken[2, "off"][0]._replace(span=None)
    assert row_of(taken, 2, "off")["tokens_per_second"] is None
    assert row_of(taken, 2, "off")["step_ms"] is None
    assert ratios_of(taken, 2) == {
        "concurrency": 2, "whole": True, "best": "plain",
        "auto_over_best": 1.0, "auto_over_off": 1.0, "auto_over_plain": 1.0,
    }  # fmt: skip


def test_a_rounds_modes_are_neighbours_and_take_turns_to_be_first() -> None:
    config = DecodeConfig(concurrency=(4, 1), nodes=(8,), rounds=3)
    found = list(turns(config))
    assert [turn.concurrency for turn in found] == [1] * 16 + [4] * 16
    for start in range(0, 32, 4):
        four = found[start : start + 4]
        assert {turn.mode for turn in four} == set(modes(config))
        assert {(turn.number, turn.counts) for turn in four} == {(start // 4 % 4, start // 4 % 4 > 0)}
    assert [found[start].mode.name for start in (0, 4, 8, 12)] == ["plain", "off", "auto", "8"]


def test_one_engine_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DecodeConfig(concurrency=(1, 2), nodes=(8,), rounds=2, one_at_a_time=True)
    found = list(turns(config))
    counted = [(turn.number, turn.concurrency, turn.mode.name) for turn in found if turn.counts]
    assert sorted(counted) == sorted(
        (number, count, mode.name) for number in (1, 2) for count in (1, 2) for mode in modes(config)
    )
    opened: list[str] = []
    held: set[str] = set()

    class Fake:
        def __init__(self, config: EngineConfig) -> None:
            self.tree = config.tree

        def __enter__(self) -> Fake:
            opened.append(self.tree)
            held.add(self.tree)
            return self

        def __exit__(self, *exc: object) -> None:
            held.discard(self.tree)

    monkeypatch.setattr("medusa_serve.llm.LLM", Fake)
    warm: set[tuple[int, str]] = set()
    with decode.Engines(EngineConfig(), True) as engines:
        for turn in found:
            before = len(opened)
            assert engines.get(turn.mode.tree).tree == turn.mode.tree
            assert held == {turn.mode.tree}
            warm = warm if len(opened) == before else set()
            assert turn.counts == ((turn.concurrency, turn.mode.name) in warm)  # each opening warms up anew
            warm.add((turn.concurrency, turn.mode.name))
    assert opened == ["off", "auto", "8"] * 2
    assert not held
    opened.clear()
    with decode.Engines(EngineConfig(), False) as engines:
        for turn in found:
            engines.get(turn.mode.tree)
        assert held == {"off", "auto", "8"}
    assert len(opened) == 3


def test_a_failed_answer_ends_the_run_and_leaves_nothing_open() -> None:
    cancelled: list[str] = []

    class Manager:
        def submit(self, ids: Any, params: Any, sink: Any, *, key: str) -> str:
            name = f"gen-{len(ids)}"
            sink([(name, Delta("", error=GenerationFailed("It broke.")) if len(ids) > 1 else Delta("", (1,), (0,)))])
            return name

        def cancel(self, name: str) -> None:
            cancelled.append(name)

    class Fake:
        manager = Manager()

    prompts: Any = [decode.Question("", [1] * size, 0) for size in (1, 2)]
    llm: Any = Fake()
    with pytest.raises(GenerationFailed, match="It broke"):
        decode._measure(llm, Turn(2, Mode("auto", "auto"), 0, True), prompts, DecodeConfig())
    assert cancelled == ["gen-1", "gen-2"]


# ---- nonsense ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("concurrency", ()),
        ("concurrency", (0, 1)),
        ("concurrency", (1, 1)),
        ("nodes", (1,)),
        ("nodes", (65,)),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("tokens", 1),
        ("rounds", 0),
    ],
)
def test_nonsense_is_refused_by_name(field: str, value: Any) -> None:
    options: dict[str, Any] = {field: value}
    with pytest.raises(InvalidConfig, match=field):
        DecodeConfig(**options)


def test_what_cannot_be_measured_is_refused(
    world: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(says: str, *more: str, code: int) -> None:
        assert run(*common(world), *more) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert says in err
        assert err.count("\n") == 1

    refused("concurrency must be", "--concurrency", "0", code=2)
    refused("must be numbers with commas", "--nodes", "a", code=2)
    refused("max_context must be", "--max-context", "1", code=2)
    refused("neither heads nor lookup", "--heads", "none", code=1)
    refused("fits into the context", "--concurrency", "1", "--tokens", "250", code=1)
    refused("There is no folder for", "--out", str(tmp_path / "a" / "b"), code=1)

"""`medusa-serve bench peers`: equal work for all, figures from known times, and a reason for whoever cannot run.

pytest tests/bench/test_peers.py
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from medusa_serve import cli
from medusa_serve.bench import contestants, facts, peers
from medusa_serve.bench.contestants import CONTESTANTS, LeftOut, Match, Ours
from medusa_serve.bench.peers import Entry, PeersConfig, batches_of, contest, rows_of, table
from medusa_serve.config import EngineConfig
from medusa_serve.errors import InvalidConfig, LoadError
from medusa_serve.model.loading import load as loader
from medusa_serve.model.loading.default_model import SMOLLM2
from tests.commands.test_heads import chain_folder, chain_heads, saved
from tests.tiny import save_tiny_folder

TOKENS = 13  # 12 after the first: four steps of three


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose every next token is known, in any dtype."""
    return chain_folder(tmp_path_factory.mktemp("base") / "chain")


def run(*arguments: str) -> int:
    try:
        return cli.main(["bench", "peers", *arguments])
    except SystemExit as leaving:
        return int(leaving.code or 0)


def engine_of(base: Path, heads: str = "none") -> EngineConfig:
    return EngineConfig(model=str(base), heads=heads, device="cpu")


# ---- the contest -----------------------------------------------------------------------------------------------------


def test_all_give_the_same_answers_and_the_others_their_reasons(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contestants, "compiler", lambda: None)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    heads, out = saved(chain_heads(base, 2), tmp_path / "heads"), tmp_path / "peers.json"
    options = ("--tokens", str(TOKENS), "--rounds", "2", "--prompts", "3", "--out", str(out))
    assert run("--model", str(base), "--heads", heads, "--device", "cpu", *options) == 0
    result = json.loads(out.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == list(CONTESTANTS)
    for name in ("speculative", "plain", "generate", "generate-lookup"):
        row = rows[name]
        assert row["left_out"] is None
        assert len(row["rounds"]) == 2
        assert min(row["rounds"]) <= row["tokens_per_second"] <= max(row["rounds"])
        assert (row["answers"], row["same_as_plain"]) == (3, 3)
        assert row["ratio"] == pytest.approx(rows["speculative"]["tokens_per_second"] / row["tokens_per_second"], 0.01)
    assert rows["speculative"]["tokens_per_step"] == 3.0
    assert (rows["plain"]["tokens_per_step"], rows["plain"]["drafts"]) == (1.0, [])
    tried = rows["generate"]["tried"]
    assert set(tried) == {"float32", "bfloat16"}
    assert tried[rows["generate"]["dtype"]] == max(tried.values())
    assert {name: row["left_out"] for name, row in rows.items() if row["left_out"]} == {
        "generate-static": "compiling needs a C++ compiler, and none is here",
        "generate-batch": "generate_batch needs a GPU",
        "llama-cpp": "llama-cpp-python is not installed",
    }
    shown = capsys.readouterr().out
    assert all(row["label"] in shown for row in result["rows"])
    assert shown.count("left out: ") == 3
    assert "llama-cpp-python" in result["machine"]
    assert set(result["machine"]) >= {"cpu", "cores", "torch", "transformers", "medusa_serve", "threads"}
    assert result["command"].startswith("python -m medusa_serve")
    assert result["options"] == {"prompts": 3, "concurrency": 1, "tokens": TOKENS, "rounds": 2}


def test_ours_answers_together_and_forgets(base: Path, tmp_path: Path) -> None:
    heads = saved(chain_heads(base, 2), tmp_path / "heads")
    prompts = [[5] * 40, [6] * 40, [7] * 40]
    ours = Ours(Match(engine_of(base, heads), TOKENS, 3, prompts[0]), engine_of(base, heads))
    try:
        first, again = ours.answer(prompts), ours.answer(prompts)
        assert first == again
        assert [len(answer) for answer in first] == [TOKENS] * 3
        assert ours.facts["slots"] == 3
        assert ours._llm.manager.metrics.snapshot()["reused"] == 0
        for _ in range(2):  # what would be without a key for each prompt
            assert list(ours._llm.generate_ids(prompts[:1], ours._params)[0].token_ids) == first[0]
        assert ours._llm.manager.metrics.snapshot()["reused"] > 0
    finally:
        ours.close()


@pytest.mark.parametrize("name", ["generate", "generate-lookup", "generate-static", "llama-cpp"])
def test_who_answers_one_at_a_time_is_left_out_of_many(base: Path, name: str) -> None:
    with pytest.raises(LeftOut, match="one request at a time"):
        CONTESTANTS[name][1](Match(engine_of(base), TOKENS, 2, [5]))


def test_generate_goes_on_past_an_end_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_folder(tmp_path / "ends", eos_token_id=2)
    match = Match(EngineConfig(model=str(folder), device="cpu", heads="none"), 20, 1, [9, 10])
    monkeypatch.setattr(loader, "_end_ids", lambda *args: frozenset(range(200)))  # whatever it says ends a text
    alone = CONTESTANTS["generate"][1](match)
    assert [len(answer) for answer in alone.answer([[9, 10], [11, 12, 13]])] == [20, 20]


# ---- figures ---------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0


class Scripted:
    """Answers each call after a known time; an exception instead of a time is raised."""

    def __init__(self, clock: Clock, seconds: Sequence[Any], tokens: int = 10, log: list[Any] | None = None) -> None:
        self.clock, self.seconds, self.tokens, self.closed = clock, list(seconds), tokens, 0
        self.log, self.facts = [] if log is None else log, {"dtype": "float32"}

    def answer(self, prompts: Any) -> list[list[int]]:
        self.log.append(self)
        took = self.seconds.pop(0)
        if isinstance(took, Exception):
            raise took
        self.clock.now += took
        return [[sum(ids)] * self.tokens for ids in prompts]

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(peers.time, "perf_counter", lambda: clock.now)
    return clock


def test_figures_are_medians_of_rounds_and_the_first_is_thrown_away(clock: Clock) -> None:
    ours, other, log = (
        [99.0, 99.0, 1.0, 1.0, 2.0, 2.0, 0.5, 0.5],
        [5.0, 5.0, 4.0, 4.0, 2.0, 6.0, 1.0, 9.0],
        list[Any](),
    )
    entries = [Entry("speculative", Scripted(clock, ours, log=log)), Entry("plain", Scripted(clock, other, log=log))]
    scripted = [entry.contestant for entry in entries]
    rows = contest(entries, [[[1]], [[2]]], PeersConfig(prompts=2, tokens=10, rounds=3))
    assert [row["rounds"] for row in rows] == [[10.0, 5.0, 20.0], [2.5, 2.5, 2.0]]
    assert [row["tokens_per_second"] for row in rows] == [10.0, 2.5]
    assert [row["ratio"] for row in rows] == [1.0, 4.0]
    assert [(row["same_as_plain"], row["answers"]) for row in rows] == [(2, 2), (2, 2)]
    a, b = scripted
    assert log == [a, b, a, b, b, a, b, a, a, b, a, b, b, a, b, a]  # in turn, and each begins as often
    assert [s.closed for s in scripted] == [1, 1]  # type: ignore[union-attr]


def test_several_at_once_count_together(clock: Clock) -> None:
    entries = [Entry("plain", Scripted(clock, [7.0, 2.0]))]
    rows = contest(entries, [[[1], [2], [3]]], PeersConfig(tokens=10, rounds=1, concurrency=3))
    assert (rows[0]["tokens_per_second"], rows[0]["answers"], rows[0]["ratio"]) == (15.0, 3, None)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"seconds": [1.0, 1.0, RuntimeError("no\nroom")]}, "RuntimeError: no"),
        ({"seconds": [1.0, 1.0, 1.0], "tokens": 9}, "it made 9 tokens where 10 were asked for"),
    ],
)
def test_who_fails_on_the_way_is_a_line_and_the_others_go_on(clock: Clock, broken: dict[str, Any], says: str) -> None:
    failing, good = Scripted(clock, **broken), Scripted(clock, [1.0] * 3)
    entries = [Entry("generate", failing), Entry("plain", good)]
    rows = contest(entries, [[[1]]], PeersConfig(tokens=10, rounds=2))
    assert rows[0] == {"name": "generate", "label": "transformers generate", "left_out": says}
    assert rows[1]["rounds"] == [10.0, 10.0]
    assert (failing.closed, good.closed) == (1, 1)


def test_other_answers_are_counted() -> None:
    entries = [
        Entry(name, rounds=[1.0], answers={0: [[1, 2], ids]}) for name, ids in (("plain", [3]), ("generate", [4]))
    ]
    assert [row["same_as_plain"] for row in rows_of(entries, {})] == [2, 1]


def test_nobody_ran(base: Path) -> None:
    with pytest.raises(LoadError, match="generate_batch needs a GPU"):
        peers.bench_peers(engine_of(base), PeersConfig(contestants=("generate-batch",)))


def test_batches() -> None:
    prompts = [[1], [2], [3]]
    assert batches_of(prompts, PeersConfig(prompts=2)) == [[[1]], [[2]]]
    assert batches_of(prompts, PeersConfig(prompts=3, concurrency=2)) == [[[1], [2]], [[3], [1]]]
    assert batches_of(prompts, PeersConfig(prompts=4, concurrency=7)) == [[[1], [2], [3], [1], [2], [3], [1]]]


# ---- llama.cpp -------------------------------------------------------------------------------------------------------


class FakeLlama:
    """Says the number of tokens it would evaluate, as long as it is asked; keeps what it has read until it is reset."""

    last: FakeLlama

    def __init__(self, path: str, **options: Any) -> None:
        self.path, self.options, self.kept, self.closed = path, options, 0, False
        FakeLlama.last = self

    def reset(self) -> None:
        self.kept = 0

    def generate(self, tokens: list[int], *, temp: float, top_k: int, repeat_penalty: float) -> Iterator[int]:
        assert (temp, repeat_penalty) == (0.0, 1.0)
        fresh, self.kept = len(tokens) - self.kept, len(tokens)
        while True:
            yield fresh

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    module: Any = types.ModuleType("llama_cpp")
    module.Llama, module.llama_supports_gpu_offload = FakeLlama, lambda: False
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    monkeypatch.setenv("MEDUSA_SERVE_CACHE", str(tmp_path))
    (tmp_path / SMOLLM2.gguf).touch()
    return tmp_path / SMOLLM2.gguf


def test_llama_runs_the_same_file_and_keeps_no_prefix(llama: Path) -> None:
    made = contestants.LlamaCpp(Match(EngineConfig(device="cpu"), 6, 1, [1] * 50))
    fake = FakeLlama.last
    assert fake.path == str(llama)
    assert fake.options["n_threads"] == fake.options["n_threads_batch"] == torch.get_num_threads()
    assert fake.options["n_ctx"] >= 56
    assert fake.options["n_gpu_layers"] == 0
    assert made.facts["dtype"] == "Q4_1"
    assert made.answer([[1] * 5]) == made.answer([[1] * 5]) == [[5] * 6]
    made.close()
    assert fake.closed


def test_llama_without_its_file_or_a_gpu(llama: Path, base: Path) -> None:
    def why(config: EngineConfig) -> str:
        with pytest.raises(LeftOut) as caught:
            contestants.LlamaCpp(Match(config, 6, 1, [1]))
        return str(caught.value)

    assert why(engine_of(base)) == "only the default model was made from a GGUF file"
    assert "without support for a GPU" in why(EngineConfig(device="cuda"))
    llama.unlink()
    assert why(EngineConfig(device="cpu")) == f"there is no {llama}"


# ---- options and lines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("contestants", ()),
        ("contestants", ("plain", "plain")),
        ("contestants", ("plain", "vllm")),
        ("prompts", 0),
        ("tokens", 1),
        ("rounds", 0),
        ("concurrency", True),
    ],
)
def test_nonsense_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidConfig, match=field) as caught:
        PeersConfig(**{field: value})
    assert caught.value.param == field


def test_nonsense_on_the_command_line(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--contestants", "plain,vllm") == 2
    assert "contestants must be" in capsys.readouterr().err
    assert run("--model", str(base), "--contestants", "generate-batch", "--device", "cpu") == 1
    assert "No contestant could run" in capsys.readouterr().err


def test_the_command_is_told_without_keys_and_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [
        "bench",
        "serve",
        "--api-key",
        "se cret",
        "--out=/home/me/a b.json",
        "--model",
        "/tmp/x/model",
        "--rate",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/medusa-serve", *said])
    shown = "python -m medusa_serve bench serve --api-key KEY '--out=a b.json' --model model --rate 2"
    assert facts.command() == shown
    monkeypatch.setattr(sys, "argv", ["x", "--api-key=abc"])
    assert facts.command() == "python -m medusa_serve --api-key=KEY"


def test_the_table_has_the_quickest_first() -> None:
    machine = facts.facts() | {"device": "H200", "llama-cpp-python": "0.3", "others_cores": 0.5}
    rows: list[dict[str, Any]] = [
        {"name": "plain", "label": "P", "left_out": None, "tokens_per_second": 5.0, "ratio": 2.0, "dtype": "d"},
        {"name": "speculative", "label": "S", "left_out": None, "tokens_per_second": 10.0, "ratio": 1.0, "dtype": "d"},
        {"name": "llama-cpp", "label": "L", "left_out": "not here"},
    ]
    for row in rows[:2]:
        row |= {"same_as_plain": 1, "answers": 2}
    options = {"concurrency": 1, "tokens": 9}
    lines = table({"engine": {"model": "m"}, "machine": machine, "options": options, "rows": rows}).splitlines()
    assert "H200" in lines[0]
    assert "llama-cpp-python 0.3" in lines[0]
    assert [line[0] for line in lines[2:]] == ["S", "P", "O", "L"]
    assert "2.00x" in lines[3]
    assert "0.5 cores" in lines[4]
    assert lines[5].endswith("left out: not here")


def test_what_others_take_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(10.0, 1.0, 100.0), (16.0, 3.0, 104.0), None])
    monkeypatch.setattr(facts.Others, "_read", staticmethod(lambda: next(readings)))
    others = facts.Others()
    assert (others.cores(), others.cores()) == (1.0, None)
    monkeypatch.undo()
    mine = facts.Others()
    busy = sum(n * n for n in range(300_000))
    assert busy
    seen = mine.cores()
    assert seen is None or seen >= 0.0

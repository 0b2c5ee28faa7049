"""`medusa-serve bench step`, also on models of random weights, which `python -m tests.campaigns step` makes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from medusa_serve import cli
from medusa_serve.bench import step
from medusa_serve.bench.floor import memory_of, num_bytes, read_bytes, read_rates
from medusa_serve.bench.step import Block, StepConfig, fixed_drafter, plain_runner, rows_of, step_ms
from medusa_serve.config import EngineConfig
from medusa_serve.errors import InvalidConfig, LoadError
from medusa_serve.model.build import build_runner
from medusa_serve.model.weights.int4 import use_few_bits
from medusa_serve.types import StepOutput
from tests.campaigns import __main__ as campaigns
from tests.campaigns.shapes import SHAPES, random_drafter, random_model
from tests.commands.test_heads import chain_folder, chain_heads, saved
from tests.model.test_exact import on_steps
from tests.tiny import tiny_model

CPU = torch.device("cpu")


def run(*arguments: str) -> int:
    try:
        return cli.main(["bench", "step", *arguments])
    except SystemExit as leaving:
        return int(leaving.code or 0)


def built(nodes: int, slots: int, context: int, drafter: Any = None) -> Any:
    model = random_model("tiny", EngineConfig(device="cpu")).model
    plan = EngineConfig(device="cpu", tree=str(nodes), lookup=False, slots=slots, max_context=context)
    drafter = drafter or random_drafter(model)
    return build_runner(model, plan, eos_ids=[], max_positions=2048, drafter=drafter).runner


def test_every_cell_against_the_floor_and_one_node(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times are made up here: a step of B rows and N nodes takes 1 + B N ms, and the memory reads 1 GB/s."""
    asked = []

    def made_up(runner: Any, batch: int, nodes: int, config: StepConfig) -> tuple[float, None]:
        asked.append((runner.node_choices, batch, nodes))
        assert runner.num_slots == 3
        return 1.0 + batch * nodes, None

    monkeypatch.setattr(step, "step_ms", made_up)
    monkeypatch.setattr(step, "read_rates", lambda device: [1e9, 3e9, 0.5e9])
    out = tmp_path / "s.json"
    arguments = ["--random", "tiny", "--device", "cpu", "--rows", "3,1", "--nodes", "16,4", "--rounds", "2"]
    monkeypatch.setattr("sys.argv", ["campaigns", "step", *arguments, f"--out={out}"])
    assert campaigns.main(["step", *arguments, f"--out={out}"]) == 0
    one_round = [((1,), 1), ((1, 4), 4)], [((1,), 1), ((1, 16), 16)]
    expected = []
    for each in one_round:
        expected.append((each[1][0], 3, each[1][1]))  # of which the memory is asked
        expected += [(choices, batch, n) for _ in range(3) for batch in (1, 3) for choices, n in each]
    assert asked == expected
    result = json.loads(out.read_text())
    shape = SHAPES["tiny"]
    hidden, inner, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    layer = 4 * hidden * hidden + 3 * hidden * inner + 2 * hidden
    weights = 4 * (2 * layer + vocab * hidden + hidden)  # fp32; the embedding is only looked up
    floor = result["floor"]
    assert abs(floor["weight_bytes"] - weights) <= 128  # and the rotary frequencies
    assert floor["bytes_per_second"] == 1e9
    assert floor["ms"] == pytest.approx(floor["weight_bytes"] / 1e6, abs=1e-4)
    assert [(row["batch"], row["nodes"]) for row in result["rows"]] == [(b, n) for b in (1, 3) for n in (1, 4, 16)]
    for row in result["rows"]:
        ms = 1 + row["batch"] * row["nodes"]
        assert (row["ms"], row["device_ms"]) == (ms, None)
        assert row["to_plain"] == pytest.approx(ms / (1 + row["batch"]), abs=1e-4)
        assert row["to_floor"] == pytest.approx(ms / (floor["weight_bytes"] / 1e6), rel=1e-3)
    assert (result["kind"], result["engine"]["heads"]) == ("step", "random sequential")
    assert result["command"].endswith("--rounds 2 --out=s.json")
    assert str(tmp_path) not in out.read_text()
    assert "random tiny in float32, random sequential heads" in capsys.readouterr().out


def test_rows_are_medians_and_ratios_of_the_same_round() -> None:
    blocks = [
        Block(2, 8, 6.0, 4.0, 3.0, 9.0),
        Block(2, 8, 9.0, 5.0, 9.0, 9.0),
        Block(2, 8, 8.0, 1.0, 1.0, 10.0),
        Block(1, 1, 5, None, 5),
    ]
    one = {"batch": 1, "nodes": 1, "ms": 5, "device_ms": None, "to_floor": 2.5, "to_plain": 1.0}
    two = {"batch": 2, "nodes": 8, "ms": 8.0, "device_ms": 4.0, "to_floor": 4.0, "to_plain": 2.0}
    assert rows_of(blocks, 2.0) == [one | {"sampled_to_greedy": None}, two | {"sampled_to_greedy": 1.25}]


def test_steps_begin_with_the_asked_history_and_are_whole() -> None:
    config = StepConfig(length=40, steps=3)
    runner = built(8, slots=4, context=40 + 5 * 5)
    seen = []
    real = runner.decode

    def spy(slots: Any, nodes: int) -> Any:
        seen.append(([int(runner.tables.length[slot]) for slot in slots], nodes))
        return real(slots, nodes)

    runner.decode = spy
    for _ in range(2):  # the second block finds the slots as the first one did
        seen.clear()
        ms, device_ms = step_ms(runner, 3, 8, config)
        assert ms > 0
        assert device_ms is None
        assert len(seen) == 1 + config.steps  # one is not timed
        assert seen[0] == ([40] * 3, 8)
        for (before, _), (after, _) in zip(seen, seen[1:], strict=False):
            assert all(1 <= b - a <= 6 for a, b in zip(before, after, strict=True))
    plain = plain_runner(runner)
    assert (plain.node_choices, plain.num_slots, plain.drafter) == ((1,), 4, None)
    step_ms(plain, 4, 1, config)
    runner.close()


class Sleeper:
    """A runner whose steps take a while, and end a sequence if told so."""

    max_context, vocab_size, overlaps = 64, 100, False

    def __init__(self, seconds: float, finished: bool = False) -> None:
        self.seconds, self.finished, self.freed = seconds, finished, list[int]()

    def admit(self, *arguments: Any) -> None: ...

    def prefill(self, chunks: Any) -> Any:
        return self

    def decode(self, slots: Any, nodes: int) -> Any:
        time.sleep(self.seconds)
        return self

    def outputs(self) -> list[StepOutput]:
        return [StepOutput(0, (1,), finished=self.finished)]

    def free(self, slot: int) -> None:
        self.freed.append(slot)


def test_milliseconds_are_those_of_one_step() -> None:
    runner: Any = Sleeper(0.02)
    ms, _ = step_ms(runner, 2, 4, StepConfig(steps=5))
    assert 20 <= ms < 60
    assert runner.freed == [0, 1]
    ended: Any = Sleeper(0.0, finished=True)
    with pytest.raises(LoadError, match="a sequence ended"):
        step_ms(ended, 1, 1, StepConfig(steps=1))


def test_bytes_are_counted_once() -> None:
    whole = torch.zeros(100)
    assert num_bytes([whole, whole[10:20], whole[90:], torch.zeros(3, dtype=torch.int8)]) == 403
    assert num_bytes([whole[10:30], whole[20:40]]) == 120
    assert num_bytes([]) == 0
    tied, own = tiny_model("qwen2", torch.float32), tiny_model("llama", torch.float32)
    rows = own.get_input_embeddings().weight.nbytes
    everything = num_bytes([*own.parameters(), *own.buffers()])
    assert read_bytes(own) == everything - rows
    assert read_bytes(tied) == num_bytes([*tied.parameters(), *tied.buffers()])
    assert sum(p.nbytes for p in tied.parameters()) <= read_bytes(tied)
    small = on_steps(tiny_model("llama", torch.float32, vocab=96))  # its output layer becomes one of int4
    use_few_bits(small)
    few = num_bytes([*small.parameters(), *small.buffers()])
    assert read_bytes(small) == few - small.get_input_embeddings().weight.nbytes


def test_the_rate_of_a_read_is_that_of_a_memory() -> None:
    rates = read_rates(CPU, size=1 << 26, count=2)
    assert len(rates) == 2
    assert all(1e8 < rate < 1e13 for rate in rates)


def test_fixed_drafts_fill_the_tree_without_heads() -> None:
    runner = built(16, slots=2, context=64, drafter=fixed_drafter())
    config = StepConfig(length=32, steps=2)
    outputs = []
    real = runner.decode

    def spy(slots: Any, nodes: int) -> Any:
        flight = real(slots, nodes)
        outputs.extend(flight.outputs())
        return flight

    runner.decode = spy
    step_ms(runner, 2, 16, config)
    assert {out.num_drafted for out in outputs[2:]} == {15}
    assert memory_of(runner.forward.model, runner) == {}
    runner.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rows", ()),
        ("rows", (0,)),
        ("rows", (2, 2)),
        ("nodes", (0,)),
        ("nodes", (65,)),
        ("length", 1),
        ("rounds", 0),
        ("steps", 0),
    ],
)
def test_nonsense_is_refused_by_name(field: str, value: Any) -> None:
    options: dict[str, Any] = {field: value}
    with pytest.raises(InvalidConfig, match=field):
        StepConfig(**options)


def test_real_heads_and_what_they_cannot_fill(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "read_rates", lambda device: [1e9])
    base = chain_folder(tmp_path / "chain")
    right = saved(chain_heads(base, 2), tmp_path / "right")
    some = ["--model", str(base), "--device", "cpu", "--rows", "1", "--length", "16", "--rounds", "1", "--steps", "2"]
    out = tmp_path / "s.json"
    assert run(*some, "--heads", right, "--nodes", "4", "--out", str(out)) == 0
    result = json.loads(out.read_text())
    assert [row["nodes"] for row in result["rows"]] == [1, 4]
    assert (result["engine"]["model"], result["engine"]["heads"]) == ("chain", "medusa")
    assert run(*some, "--heads", "none", "--nodes", "1") == 0
    capsys.readouterr()

    def refused(says: str, *more: str, code: int) -> None:
        assert run(*some, *more) == code
        shown, err = capsys.readouterr()
        assert shown == ""
        assert says in err
        assert err.count("\n") == 1

    shallow = saved(chain_heads(base, 1), tmp_path / "shallow")
    refused("fill at most", "--heads", shallow, "--nodes", "64", code=1)
    refused("more than the model's own", "--heads", right, "--nodes", "4", "--length", "600", code=1)
    refused("--random", "--random", "tiny", code=2)  # the developers' bench has that
    refused("rows must be", "--rows", "0", code=2)
    refused("There is no folder for", "--out", str(tmp_path / "a" / "b"), code=1)

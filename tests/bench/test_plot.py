"""`medusa-serve bench plot`, and the tables of decode and step.

pytest tests/bench/test_plot.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medusa_serve import cli
from medusa_serve.bench import plot
from medusa_serve.bench.plot import PlotConfig, decode_table, draw_step, pictures_of, step_table, title
from medusa_serve.errors import InvalidConfig

MACHINE = {"device": "x86_64 CPU", "cpu": "Some CPU", "threads": "2", "torch": "2.13.0", "date": "2026-01-02"}
ENGINE = {"model": "smollm2-135m", "heads": "sequential", "dtype": "float32", "device": "cpu"}


def rate(count: int, mode: str, tokens_per_second: float | None, whole: float) -> dict[str, Any]:
    return {
        "concurrency": count, "mode": mode, "tokens_per_second": tokens_per_second, "whole_tokens_per_second": whole,
        "step_ms": 12.5, "tokens_per_step": 2.5, "nodes_per_step": 7.25, "same_text": 0.5,
    }  # fmt: skip


RESULTS: dict[str, dict[str, Any]] = {
    "decode": {
        "kind": "decode", "machine": MACHINE, "engine": ENGINE, "options": {"tokens": 96, "temperature": 0.7},
        "rows": [
            rate(1, "off", 20.0, 18.0), rate(1, "auto", 50.0, 40.0), rate(1, "8", 45.0, 41.0),
            rate(4, "off", 70.0, 60.0), rate(4, "auto", 90.0, 80.0), rate(4, "8", None, 77.0),
        ],
        "ratios": [
            {"concurrency": 1, "whole": False, "best": "8", "auto_over_best": 1.1, "auto_over_off": 2.5,
             "auto_over_plain": 2.25},
            {"concurrency": 4, "whole": True, "best": "off", "auto_over_best": 1.2, "auto_over_off": 1.2,
             "auto_over_plain": 1.25},
        ],
    },
    "step": {
        "kind": "step", "machine": {**MACHINE, "device": "Some GPU"}, "engine": {**ENGINE, "device": "cuda:0"},
        "options": {"length": 256},
        "floor": {"weight_bytes": 538_000_000, "bytes_per_second": 17_000_000_000, "ms": 31.65},
        "memory": [
            {"nodes": 4},
            {"nodes": 8, "weights": 2**30, "heads": 0, "slab": 2**31, "rest": 2**29, "peak": 2**32},
        ],
        "rows": [
            {"batch": b, "nodes": n, "ms": 40.0 * b + n, "device_ms": 3.25, "to_floor": 1.5, "to_plain": 1.25}
            for b in (1, 8) for n in (1, 16)
        ],
    },
    "acceptance": {
        "kind": "acceptance", "machine": MACHINE, "engine": ENGINE,
        "rows": [
            {"nodes": n, "temperature": t, "category": c, "kind": "all", "acceptance": value}
            for n, t, c, value in (
                (16, 0.0, "all", 2.6), (4, 0.0, "all", 1.9), (4, 0.7, "all", 1.5), (4, 0.0, "code", 9.0),
                (8, 0.7, "all", None),
            )
        ],
    },
    "peers": {
        "kind": "peers", "machine": MACHINE, "engine": {**ENGINE, "model": "/somewhere/else/model"},
        "options": {"concurrency": 1},
        "rows": [
            {"name": "a", "label": "the slow one", "left_out": None, "tokens_per_second": 10.0},
            {"name": "b", "label": "the fast one", "left_out": None, "tokens_per_second": 30.0},
            {"name": "c", "label": "the absent one", "left_out": "it is not installed"},
        ],
    },
}  # fmt: skip


def run(*arguments: str) -> int:
    try:
        return cli.main(["bench", "plot", *arguments])
    except SystemExit as leaving:
        return int(leaving.code or 0)


def stored(folder: Path, kind: str) -> str:
    path = folder / f"{kind}.json"
    path.write_text(json.dumps(RESULTS[kind]))
    return str(path)


# ---- tables ------------------------------------------------------------------------------------------------------


def test_decode_table() -> None:
    lines = decode_table(RESULTS["decode"]).splitlines()
    assert lines[0] == (
        "smollm2-135m in float32, sequential heads, Some CPU, 2 threads, torch 2.13.0, 2026-01-02; "
        "96 tokens each, T = 0.7"
    )
    assert lines[2].split() == ["1", "off", "20.00", "18.00", "12.50", "2.50", "7.2", "50%"]
    assert lines[7].split() == ["4", "8", "-", "77.00", "12.50", "2.50", "7.2", "50%"]
    assert lines[9].split() == ["1", "1.10", "(8)", "2.50", "2.25"]
    assert lines[10].split() == ["4", "1.20", "(off)", "1.20", "1.25", "of", "the", "whole", "time"]
    assert len({len(line) for line in lines[2:8]}) == 1


def test_step_table() -> None:
    lines = step_table(RESULTS["step"]).splitlines()
    assert "Some GPU, torch" in lines[0]  # a GPU's threads say nothing
    assert lines[0].endswith("256 tokens in each sequence")
    assert lines[1] == "reading 0.54 GB of weights at 17.0 GB/s takes 31.65 ms"
    assert lines[6].split() == ["8", "16", "336.00", "3.25", "1.500", "1.250", "-"]
    assert lines[7:] == [
        "GiB of memory with trees of 8: weights 1.00, heads 0.00, slab 2.00, rest 0.50, peak 4.00"
    ]  # fmt: skip
    assert title(RESULTS["peers"]).startswith("model in float32")  # and not where it lies


# ---- pictures ----------------------------------------------------------------------------------------------------


@pytest.fixture
def axes() -> Any:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; pip install medusa-serve[bench]")
    from matplotlib.figure import Figure

    return Figure().subplots()


def points(axes: Any) -> dict[str, list[list[float]]]:
    return {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}


def test_decode_shows_every_mode(axes: Any) -> None:
    plot.draw_decode(axes, [RESULTS["decode"]])
    assert points(axes) == {
        "off": [[1, 20], [4, 70]], "auto": [[1, 50], [4, 90]], "8 nodes": [[1, 45], [4, 77]],
    }  # fmt: skip
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "4"]
    assert axes.get_ylim()[0] == 0


def test_step_shows_every_batch_above_the_floor(axes: Any) -> None:
    draw_step(axes, [RESULTS["step"]])
    found = points(axes)
    assert found["batch 8"] == [[1, 321], [16, 336]]
    assert found["batch 1"] == [[1, 41], [16, 56]]
    assert {y for _, y in found["reading the weights: 31.65 ms"]} == {31.65}
    assert len(found) == 3


def test_acceptance_of_several_files_is_one_picture(axes: Any) -> None:
    other = {**RESULTS["acceptance"], "engine": {**ENGINE, "heads": "medusa"}}
    pictures = pictures_of([RESULTS["acceptance"], RESULTS["decode"], other])
    assert [len(results) for _, results in pictures] == [2, 1]
    draw, results = pictures[0]
    draw(axes, results)
    mine = {"T = 0": [[4, 1.9], [16, 2.6]], "T = 0.7": [[4, 1.5]]}
    expected = {f"{heads} heads, {t}": xy for heads in ("sequential", "medusa") for t, xy in mine.items()}
    assert points(axes) == expected


def test_peers_are_bars_with_the_quickest_on_top(axes: Any) -> None:
    plot.draw_peers(axes, [RESULTS["peers"]])
    assert [bar.get_width() for bar in axes.patches] == [10, 30]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["the slow one", "the fast one"]


def test_pictures_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; pip install medusa-serve[bench]")
    files = [stored(tmp_path, kind) for kind in RESULTS]
    svg, png = str(tmp_path / "all.svg"), str(tmp_path / "one.png")
    assert run(*files, "--out", svg) == 0
    assert capsys.readouterr().out == f"{svg}\n"
    text = Path(svg).read_text()
    for words in ("tokens per second", "reading the weights: 31.65 ms", "sequential heads, T = 0.7", "the fast one"):
        assert words in text
    assert str(tmp_path) not in text
    assert "the absent one" not in text
    assert run(*files, "--out", svg) == 0
    assert Path(svg).read_text() == text  # no date in it: the same figures are the same file
    assert run(files[1], "--out", png) == 0
    assert Path(png).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(plot, "import_module", missing)
    assert run(stored(tmp_path, "step"), "--out", str(tmp_path / "x.svg")) == 1
    assert "pip install medusa-serve[bench]" in capsys.readouterr().err


def test_nonsense_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidConfig, match="files"):
        PlotConfig(files=(), out="x.svg")
    with pytest.raises(InvalidConfig, match="out must end"):
        PlotConfig(files=("x",), out="x.pdf")

    def refused(says: str, *arguments: str, code: int) -> None:
        assert run(*arguments) == code
        shown, err = capsys.readouterr()
        assert shown == ""
        assert says in err
        assert err.count("\n") == 1

    out = ["--out", str(tmp_path / "x.svg")]
    refused("out must end in .svg or .png", stored(tmp_path, "step"), "--out", "x.jpg", code=2)
    refused("--out", stored(tmp_path, "step"), code=2)
    refused("There is no folder for", stored(tmp_path, "step"), "--out", str(tmp_path / "a" / "x.svg"), code=1)
    refused("cannot be read as JSON", str(tmp_path / "none.json"), *out, code=1)
    for content in ("[]", '{"kind": "drafting"}', '{"kind": ["step"]}'):
        (tmp_path / "odd.json").write_text(content)
        refused("no result that can be drawn", str(tmp_path / "odd.json"), *out, code=1)
    assert not (tmp_path / "x.svg").exists()


def test_a_cut_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; pip install medusa-serve[bench]")
    (tmp_path / "half.json").write_text('{"kind": "step", "rows": []}')
    assert run(str(tmp_path / "half.json"), "--out", str(tmp_path / "x.svg")) == 1
    assert "is incomplete" in capsys.readouterr().err
    assert not (tmp_path / "x.svg").exists()

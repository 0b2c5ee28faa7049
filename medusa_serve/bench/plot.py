"""Results for a person: tables of `bench decode` and `bench step`, and pictures of those, of `bench acceptance` and of
`bench peers` by `medusa-serve bench plot`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import InvalidConfig, LoadError
from .command import check_folder

Row = dict[str, Any]
WIDTH, HEIGHT = 6.4, 4.2  # inches of a picture
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "medusa", "font.size": 9, "axes.spines.top": False}
STYLE |= {"axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """files: results as the other commands wrote them · out: ends in .svg or .png"""

    files: tuple[str, ...]
    out: str

    def __post_init__(self) -> None:
        if not self.files:
            raise InvalidConfig("files must name one result at least.", param="files")
        if Path(self.out).suffix not in (".svg", ".png"):
            raise InvalidConfig(f"out must end in .svg or .png, not {self.out!r}.", param="out")


# ---- tables ------------------------------------------------------------------------------------------------------


def decode_table(result: dict[str, Any]) -> str:
    options = result["options"]
    lines = [
        f"{title(result)}; {options['tokens']} tokens each, T = {options['temperature']:g}",
        "at once  mode   tokens/s    whole  ms/step  tokens/step  nodes  text as off",
    ]
    for row in result["rows"]:
        rates = "".join(number(row[name], 9) for name in ("tokens_per_second", "whole_tokens_per_second", "step_ms"))
        steps = f"{row['tokens_per_step']:13.2f}{row['nodes_per_step']:7.1f}{row['same_text']:13.0%}"
        lines.append(f"{row['concurrency']:7}  {row['mode']:6}{rates}{steps}")
    lines.append("at once  auto over the best of the others, over off, over plain")
    for row in result["ratios"]:
        over = f"{row['auto_over_best']:.2f} ({row['best']})  {row['auto_over_off']:.2f}  {row['auto_over_plain']:.2f}"
        lines.append(f"{row['concurrency']:7}  {over}{'  of the whole time' if row['whole'] else ''}")
    return "\n".join(lines)


def step_table(result: dict[str, Any]) -> str:
    floor = result["floor"]
    lines = [
        f"{title(result)}; {result['options']['length']} tokens in each sequence",
        f"reading {floor['weight_bytes'] / 1e9:.2f} GB of weights at {floor['bytes_per_second'] / 1e9:.1f} GB/s takes "
        f"{floor['ms']:.2f} ms",
        f"{'batch':>5}{'nodes':>7}{'ms':>10}{'device ms':>11}{'over floor':>12}{'over 1 node':>13}{'sampled':>10}",
    ]
    for row in result["rows"]:
        times = f"{number(row['ms'], 10)}{number(row['device_ms'], 11)}"
        hot = number(row.get("sampled_to_greedy"), 10)
        lines.append(f"{row['batch']:5}{row['nodes']:7}{times}{row['to_floor']:12.3f}{row['to_plain']:13.3f}{hot}")
    for row in result["memory"]:
        if "peak" in row:
            sizes = [f"{name} {row[name] / 2**30:.2f}" for name in ("weights", "heads", "slab", "rest", "peak")]
            lines.append(f"GiB of memory with trees of {row['nodes']}: {', '.join(sizes)}")
    return "\n".join(lines)


def number(value: float | None, width: int) -> str:
    return f"{'-' if value is None else f'{value:.2f}':>{width}}"


def title(result: dict[str, Any]) -> str:
    """Model, heads and machine, in words."""
    engine, facts = result["engine"] or {}, result["machine"]
    on_cpu = facts["device"].endswith("CPU") or engine.get("device") == "cpu"
    device = f"{facts.get('cpu', facts['device'])}, {facts['threads']} threads" if on_cpu else facts["device"]
    model = Path(str(engine.get("model"))).name
    heads = {"none": "without heads"}.get(str(engine.get("heads")), f"{Path(str(engine.get('heads'))).name} heads")
    return f"{model} in {engine.get('dtype')}, {heads}, {device}, torch {facts['torch']}, {facts['date']}"


# ---- pictures ----------------------------------------------------------------------------------------------------


def plot(config: PlotConfig) -> None:
    """One picture for each file below one another; those of `acceptance` share one. Raises LoadError: no matplotlib, a
    file that is no such result."""
    pictures = pictures_of([_read(path) for path in config.files])
    matplotlib, figures = _matplotlib(""), _matplotlib(".figure")
    with matplotlib.rc_context(STYLE):
        figure = figures.Figure(figsize=(WIDTH, HEIGHT * len(pictures)), layout="constrained")
        for axes, (draw, results) in zip(figure.subplots(len(pictures), squeeze=False)[:, 0], pictures, strict=True):
            try:
                draw(axes, results)
            except (LookupError, TypeError, ValueError) as error:  # JSON that was cut or changed by hand
                raise LoadError(f"A result of `bench {results[0]['kind']}` is incomplete: {error!r}.") from error
        figure.savefig(config.out, dpi=150, metadata={"Date": None} if config.out.endswith("svg") else None)


def pictures_of(
    results: Sequence[dict[str, Any]],
) -> list[tuple[Callable[[Any, list[dict[str, Any]]], None], list[Any]]]:
    """What is drawn of which results, in their order."""
    found: list[tuple[Any, list[dict[str, Any]]]] = []
    together: list[dict[str, Any]] = []
    for result in results:
        draw = DRAW[result["kind"]]
        if draw is not draw_acceptance:
            found.append((draw, [result]))
            continue
        if not together:
            found.append((draw, together))
        together.append(result)
    return found


def _read(path: str) -> dict[str, Any]:
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(result, dict) or str(result.get("kind")) not in DRAW:
        raise LoadError(f"{path} is no result that can be drawn; {', '.join(DRAW)} can.")
    return result


def _matplotlib(module: str) -> Any:
    try:
        return import_module(f"matplotlib{module}")
    except ImportError as error:
        raise LoadError("Pictures need matplotlib: pip install medusa-serve[bench]") from error


def draw_decode(axes: Any, results: list[dict[str, Any]]) -> None:
    """Tokens per second over the number of sequences, a line for each mode."""
    (result,) = results
    for mode in dict.fromkeys(row["mode"] for row in result["rows"]):
        mine = [row for row in result["rows"] if row["mode"] == mode]
        rates = [row["tokens_per_second"] or row["whole_tokens_per_second"] for row in mine]
        style = {"linewidth": 2.5, "zorder": 3} if mode == "auto" else {"linewidth": 1, "linestyle": "--"}
        label = f"{mode} nodes" if mode.isdigit() else mode
        _line(axes, [row["concurrency"] for row in mine], rates, label, **style)
    counts = {row["concurrency"] for row in result["rows"]}
    _finish(axes, result, "sequences that decode together", "tokens per second", counts)


def draw_step(axes: Any, results: list[dict[str, Any]]) -> None:
    """Milliseconds over nodes, a line for each batch, above the time in which the weights can be read."""
    (result,) = results
    for batch in sorted({row["batch"] for row in result["rows"]}):
        mine = [row for row in result["rows"] if row["batch"] == batch]
        _line(axes, [row["nodes"] for row in mine], [row["ms"] for row in mine], f"batch {batch}")
    floor = result["floor"]["ms"]
    axes.axhline(floor, color="black", linestyle=":", label=f"reading the weights: {floor:.2f} ms")
    _finish(axes, result, "nodes of each sequence's tree", "ms per step", {row["nodes"] for row in result["rows"]})


def draw_acceptance(axes: Any, results: list[dict[str, Any]]) -> None:
    """Tokens per step over nodes, all categories together, a line for each file and temperature."""
    for result in results:
        rows = [row for row in result["rows"] if (row["category"], row["kind"]) == ("all", "all")]
        rows = [row for row in rows if row["acceptance"] is not None]
        for temperature in sorted({row["temperature"] for row in rows}):
            mine = sorted((row for row in rows if row["temperature"] == temperature), key=lambda row: row["nodes"])
            label = f"{(result['engine'] or {}).get('heads')} heads, T = {temperature:g}"
            _line(axes, [row["nodes"] for row in mine], [row["acceptance"] for row in mine], label)
    sizes = {row["nodes"] for result in results for row in result["rows"]}
    _finish(axes, results[0], "nodes of the tree", "tokens per step", sizes)


def draw_peers(axes: Any, results: list[dict[str, Any]]) -> None:
    """A bar for each contestant, the quickest on top."""
    (result,) = results
    rows = sorted((row for row in result["rows"] if not row["left_out"]), key=lambda row: row["tokens_per_second"])
    bars = axes.barh([row["label"] for row in rows], [row["tokens_per_second"] for row in rows])
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_xlabel(f"tokens per second, {result['options']['concurrency']} at once")
    axes.set_title(title(result), fontsize=8, wrap=True)
    axes.grid(False)


def _line(axes: Any, x: list[float], y: list[float], label: str, **style: Any) -> None:
    axes.plot(x, y, marker="o", markersize=4, label=label, **style)


def _finish(axes: Any, result: dict[str, Any], below: str, left: str, ticks: set[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)], minor=False)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(below)
    axes.set_ylabel(left)
    axes.set_title(title(result), fontsize=8, wrap=True)
    axes.legend(frameon=False)


DRAW: dict[str, Callable[[Any, list[dict[str, Any]]], None]] = {
    "decode": draw_decode,
    "step": draw_step,
    "acceptance": draw_acceptance,
    "peers": draw_peers,
}

# ---- the command -------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="results of decode, step, acceptance or peers")
    parser.add_argument("--out", required=True, metavar="FILE", help="the picture: a name that ends in .svg or .png")
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    try:
        config = PlotConfig(files=tuple(options.files), out=options.out)
    except InvalidConfig as error:
        options.parser.error(error.message.rstrip("."))
    check_folder(config.out)
    plot(config)
    print(config.out)
    return 0

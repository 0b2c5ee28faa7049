"""The README's speed table, from stored results of `bench peers`: `medusa-serve bench table FILE…`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from .command import read


def speed_table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each contestant of any result, a column for each result, tokens/s with the dtype where it is
    not the engine's; then a line that says how they were measured."""
    labels = list(dict.fromkeys(row["label"] for result in results for row in result["rows"]))
    lines = ["| tokens/s | " + " | ".join(map(_heading, results)) + " |", "|---" * (1 + len(results)) + "|"]
    for label in labels:
        cells = [_cell(result, label) for result in results]
        if any(cells):
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    versions = "; ".join(dict.fromkeys(_versions(result) for result in results))
    return "\n".join([*lines, "", f"{results[0]['engine']['model']}, greedy, prefill counted. {versions}."])


def _heading(result: dict[str, Any]) -> str:
    facts, together = result["machine"], result["options"]["concurrency"]
    where = f"{facts['cores']} CPU cores" if facts["device"].endswith("CPU") else facts["device"]
    compiled = ", `--compile`" if where.endswith("cores") and result["engine"]["compile"] else ""
    return f"{where}{compiled}, {together} at once"


def _cell(result: dict[str, Any], label: str) -> str:
    for row in result["rows"]:
        if row["label"] == label and not row["left_out"]:
            rate = row["tokens_per_second"]
            return f"{rate:,.0f} ({row['dtype']})" if rate >= 10 else f"{rate:.1f} ({row['dtype']})"
    return ""


def _versions(result: dict[str, Any]) -> str:
    facts, options = result["machine"], result["options"]
    device = facts["cpu"] if facts["device"].endswith("CPU") else facts["device"]
    llama = f", llama-cpp-python {facts['llama-cpp-python']}" if facts["llama-cpp-python"] else ""
    torch = facts["torch"].partition("+")[0]
    return (
        f"{device}: {options['tokens']} tokens each, torch {torch}, transformers {facts['transformers']}{llama}, "
        f"{facts['date']}"
    )


# ---- the command -----------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="what `bench peers --out` wrote; a column each")
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    print(speed_table([read(path, "peers") for path in options.files]))
    return 0

"""What the bench commands share: from options to configs, and from a result to its file and table."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..config import EngineConfig
from ..errors import InvalidConfig, LoadError

Config = TypeVar("Config")


def numbers(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """For argparse: numbers with commas between them."""

    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be numbers with commas between them, not {text!r}") from None

    return parse


def check_numbers(config: Any, name: str, low: float, high: float) -> None:
    """Raise InvalidConfig unless the field holds different numbers in [low, high]."""
    values = getattr(config, name)
    if not values or len(set(values)) < len(values) or not all(low <= value <= high for value in values):
        raise InvalidConfig(f"{name} must be different numbers from {low} to {high}.", param=name)


def end_options(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    """The options that every such command ends with; `run` is called with what was given."""
    parser.add_argument("--out", metavar="FILE", help="write the figures there as JSON")
    parser.add_argument("--show", metavar="FILE", help="only print the table of such a file")
    parser.set_defaults(run=run, parser=parser)


def run_bench(
    options: argparse.Namespace,
    name: str,
    kind: Callable[..., Config],
    bench: Callable[[EngineConfig, Config], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> int:
    """Measure, write the result where `--out` says, and print it. name: of the bench, as in its results · kind: its
    config dataclass. Both configs take the options that are named as their fields; a value that either refuses ends the
    program. Returns the exit code."""
    if options.show:
        print(table(read(options.show, name)))
        return 0
    given = {name: value for name, value in vars(options).items() if value is not None}

    def made(config: Callable[..., Any]) -> Any:
        return config(**{name: given[name] for name in config.__dataclass_fields__ if name in given})  # type: ignore[attr-defined]

    try:
        engine, config = made(EngineConfig), made(kind)
    except InvalidConfig as error:
        options.parser.error(error.message.rstrip("."))
    if options.out:
        check_folder(options.out)
    result = bench(engine, config)
    if options.out:
        write(options.out, result)
    print(table(result))
    return 0


# ---- files -------------------------------------------------------------------------------------------------------


def check_folder(out: str) -> None:
    """Raise LoadError before minutes of work, if the result could not be written."""
    if not Path(out).absolute().parent.is_dir():
        raise LoadError(f"There is no folder for {out}.")


def read(path: str, kind: str) -> dict[str, Any]:
    """A stored result of `bench KIND`. Raises LoadError."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(result, dict) or result.get("kind") != kind:
        raise LoadError(f"{path} is no result of `bench {kind}`.")
    return result


def write(path: str, result: dict[str, Any]) -> None:
    """By a rename, so that a killed run leaves the last complete file."""
    part = Path(f"{path}.part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)

"""What the bench commands share: from options to configs, and from a result to its file and table."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, TypeVar

from ..config import EngineConfig
from ..errors import InvalidConfig
from .acceptance import check_folder, write

Config = TypeVar("Config")


def end_options(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    """The options that every such command ends with; `run` is called with what was given."""
    parser.add_argument("--out", metavar="FILE", help="write the figures there as JSON")
    parser.set_defaults(run=run, parser=parser)


def run_bench(
    options: argparse.Namespace,
    kind: Callable[..., Config],
    bench: Callable[[EngineConfig, Config], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> int:
    """Measure, keep the result where `--out` says, and print it. kind: the bench's config dataclass; both configs take
    the options that are named as their fields, and nonsense in either ends the program. → the exit status"""
    told = {name: value for name, value in vars(options).items() if value is not None}

    def made(config: Callable[..., Any]) -> Any:
        return config(**{name: told[name] for name in config.__dataclass_fields__ if name in told})  # type: ignore[attr-defined]

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

"""`bench step` on models of known shapes and random weights: what a step costs does not depend on the numbers."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from medusa_serve.bench import step
from medusa_serve.bench.command import run_bench
from medusa_serve.bench.plot import step_table
from medusa_serve.bench.step import StepConfig, Subject, bench_step, fixed_drafter
from medusa_serve.config import DEFAULT_MODEL, EngineConfig
from medusa_serve.errors import InvalidConfig

from .shapes import SHAPES, random_drafter, random_model


@dataclass(frozen=True, kw_only=True)
class RandomStepConfig(StepConfig):
    """As StepConfig. random: a key of SHAPES, built of random weights"""

    random: str = "llama-7b"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.random not in SHAPES:
            raise InvalidConfig(f"random must be one of {', '.join(SHAPES)}, not {self.random!r}.", param="random")


def bench_random_step(engine: EngineConfig, config: RandomStepConfig) -> dict[str, Any]:
    """bench_step of that shape, with random heads or, where the engine asks for none, fixed drafts."""
    from medusa_serve.bench.facts import command

    loaded = random_model(config.random, engine)
    subject = Subject(loaded, fixed_drafter(), "none")
    if engine.heads != "none":
        subject = Subject(loaded, random_drafter(loaded.model), "random sequential")
    result = bench_step(engine, config, subject)
    options = result["options"] | {"random": config.random}
    return result | {"command": command("tests.campaigns"), "options": options}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--random", metavar="SHAPE", help=f"of the model: {', '.join(SHAPES)} (llama-7b)")
    step.add_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if options.model != DEFAULT_MODEL or options.heads not in ("auto", "none"):
        options.parser.error("--random makes its own model and heads, so --model and --heads NAME mean nothing")
    return run_bench(options, "step", RandomStepConfig, bench_random_step, step_table)

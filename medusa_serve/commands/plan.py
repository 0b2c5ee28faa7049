"""`medusa-serve plan`: what fits into a GPU's memory, from the model's config alone."""

from __future__ import annotations

import argparse
import json

from ..errors import InvalidConfig
from .options import add_engine_options, engine_config, refuse


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "What a model would take of a GPU's memory, from its config alone; needs no GPU."
    parser.add_argument("--memory", required=True, metavar="SIZE", help="of the GPU, as 15GiB")
    add_engine_options(parser)
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Exit code 1 where not one slot fits."""
    try:
        config = engine_config(options)
    except InvalidConfig as error:
        refuse(options, error)
    from ..model.loading.gpu_memory import plan_of

    plan = plan_of(config, options.memory)
    print(json.dumps(plan.to_dict()) if options.json else "\n".join(plan.lines()))
    return 0 if plan.slots else 1

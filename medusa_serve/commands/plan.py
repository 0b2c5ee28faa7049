"""`medusa-serve plan`: what fits into a GPU's memory, from the model's config alone."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from ..config import EngineConfig
from ..errors import InvalidConfig, LoadError
from .options import add_engine_options, engine_config, refuse

if TYPE_CHECKING:
    from ..model.loading.gpu_memory import MemoryPlan


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
    plan = plan_of(config, options.memory)
    print(json.dumps(plan.to_dict()) if options.json else "\n".join(plan.lines()))
    return 0 if plan.slots else 1


def plan_of(config: EngineConfig, memory: str) -> MemoryPlan:
    """For a GPU of this memory ("15GiB"), in half precision unless the config asks for another dtype. Raises
    LoadError."""
    from ..model.loading.gpu_memory import itemsize_of, plan_memory, sizes_of
    from ..model.loading.source import hf_config_of

    size = parse_memory(memory)
    return plan_memory(sizes_of(hf_config_of(config.model)), size, itemsize_of(config.dtype), config)


def parse_memory(text: str) -> int:
    """Bytes of "15GiB", "16GB" or "15" (GiB). Raises LoadError."""
    units = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6, "g": 2**30, "": 2**30}
    number = text.strip().lower().rstrip("abgim")
    unit = text.strip().lower()[len(number) :]
    try:
        value = float(number) * units[unit]
    except (ValueError, KeyError):
        raise LoadError(f"{text!r} is no size of memory; write it as 15GiB.") from None
    if not 2**20 <= value <= 2**50:
        raise LoadError(f"{text!r} is no size of memory; write it as 15GiB.")
    return int(value)

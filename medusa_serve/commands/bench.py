"""`medusa-serve bench`: the measurements that a user runs. The developers' own are in tests/campaigns/."""

from __future__ import annotations

import argparse

from ..bench import acceptance, decode, peers, plot, speed_table, step
from .options import add_model_options

MEASURED = (
    (acceptance, "acceptance", "tokens per step by category of prompt and size of tree"),
    (peers, "peers", "tokens per second of this engine, transformers and llama.cpp, in one run"),
    (decode, "decode", "tokens per second by number of sequences, with and without speculation"),
    (step, "step", "a decode step by rows and nodes, and the time that reading the weights takes"),
)
SHOWN = (
    (plot, "plot", "draw a picture of what other benches wrote"),
    (speed_table, "table", "the README's table of speeds, in Markdown, from what `bench peers` wrote"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "measure this machine; takes minutes"
    kinds = parser.add_subparsers(required=True, metavar="WHAT", title="what")
    for module, name, about in MEASURED:
        one = kinds.add_parser(name, help=about, description=f"Measure {about}.")
        add_model_options(one)
        module.add_options(one)
    for module, name, about in SHOWN:
        module.add_options(kinds.add_parser(name, help=about, description=about))

"""`python -m tests.campaigns NAME …`: one of the developers' benches, with the exit codes of `medusa-serve`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from medusa_serve import cli
from medusa_serve.commands.options import Parser, add_model_options

MEASURED = {  # a module of this folder that takes the options of a model → what it measures
    "engine": "plain decoding over generate, concurrent streams, lookup",
    "serve": "an HTTP server under load: first token, time per token, percentiles",
    "load": "a server under more load than it can take, and what must hold then",
    "replicas": "several copies of the model at one address, and what happens when one dies",
    "step": "a decode step by rows and nodes, as `bench step`, on random weights of a known shape",
    "drafting": "what drafting costs, as a share of a plain step",
    "quant": "half precision and NF4 on a GPU: the planned memory, a step's time by nodes",
    "same_text": "how often a greedy answer parts from plain decoding, and at which ties",
    "families": "which families of models run with trees, on tiny random ones",
}
OTHERS = {"make_heads": "make the heads that the package ships, on one GPU"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one bench; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="python -m tests.campaigns", description="The developers' own benches.")
    names = parser.add_subparsers(required=True, metavar="NAME", title="names")
    for name, about in (MEASURED | OTHERS).items():
        one = names.add_parser(name, help=about, description=f"Measure {about}." if name in MEASURED else about)
        if arguments[:1] != [name]:
            continue  # its options are not asked for
        if name in MEASURED:
            add_model_options(one)
        one.set_defaults(parser=one)
        import_module(f".{name}", __package__).add_options(one)
    return cli.run(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())

"""`medusa-serve train`: train heads on the model's own answers to prompts."""

from __future__ import annotations

import argparse
import sys

from ..config import EngineConfig
from ..errors import InvalidConfig
from .options import add_model_options, refuse


def add_options(parser: argparse.ArgumentParser) -> None:
    about = "Train heads on the model's own answers to prompts; given again after an interruption, it goes on."
    parser.description = about
    parser.add_argument("--prompts", required=True, metavar="FILE", help="one a line, JSONL, or a datasets id")
    parser.add_argument("--minutes", required=True, type=float, metavar="T", help="for answers and training together")
    parser.add_argument("--out", required=True, metavar="DIR", help="a folder that does not exist yet")
    parser.add_argument("--family", default="sequential", help="sequential (the default) or medusa")
    add_model_options(parser, heads=False)
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Exit code 130 after Ctrl-C."""
    from ..training.pipeline import train_from_prompts

    try:
        config = EngineConfig(model=options.model, device=options.device, dtype=options.dtype, quantize="none")
        made = train_from_prompts(config, **{x: getattr(options, x) for x in ("prompts", "minutes", "out", "family")})
    except InvalidConfig as error:
        refuse(options, error)
    except KeyboardInterrupt:
        print("medusa_serve: interrupted, nothing is lost: the same command goes on from here", file=sys.stderr)
        return 130
    serve_them = f"Serve them: python -m medusa_serve --model {options.model} --heads {options.out}"
    print(*made.lines, serve_them, sep="\n", flush=True)
    return 0

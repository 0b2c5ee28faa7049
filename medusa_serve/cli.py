"""The command line: `serve` (the default), `generate`, `plan`, `train`, `heads`, `bench`, each in commands/.

Only the command that is asked for is imported; torch comes with the first model.
Exit codes: 0; 1 for an error (one line on stderr); 2 for a nonsense option (one line); 130 after Ctrl-C.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__
from .commands.options import Parser
from .errors import MedusaServeError

ABOUT = "An LLM server for notebooks that emits several tokens in one pass of the model."
COMMANDS = {  # a module of commands/ → what --help says of it
    "serve": "serve a model over HTTP (the default command)",
    "generate": "answer one prompt here",
    "plan": "what fits into a GPU's memory",
    "train": "train heads for a model",
    "heads": "look into files of heads, convert them, try them on a model",
    "bench": "measure this machine; takes minutes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")):
        arguments.insert(0, "serve")
    parser = _parser(arguments[0])
    if not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        parser.error(f"there is no command {arguments[0]!r}; the commands are {', '.join(COMMANDS)}")
    return run(parser, arguments)


def _parser(asked: str) -> Parser:
    """All commands by name, and the options of the one that is asked for."""
    parser = Parser(prog="python -m medusa_serve", description=ABOUT)
    parser.add_argument("--version", action="version", version=f"medusa_serve {__version__}")
    commands = parser.add_subparsers(required=True, metavar="[COMMAND]", title="commands (serve is the default)")
    for name, about in COMMANDS.items():
        command = commands.add_parser(name, help=about)
        if name == asked:
            import_module(f".commands.{name}", __package__).add_options(command)
    return parser


def run(parser: Parser, arguments: Sequence[str]) -> int:
    """Call what the parser finds under `run`, with the options; returns the exit code. A parser under `parser` reports
    unknown options: it is the command's own, and its help lists the options there are."""
    logging.basicConfig(level=logging.WARNING, format="medusa_serve: %(message)s")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return int(options.run(options))
    except MedusaServeError as error:
        print(f"medusa_serve: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `… | head`: the reader is gone; keep the interpreter from flushing into it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1

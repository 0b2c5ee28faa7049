"""What the commands share: the parser, the options of a model and of an engine, and the config made from them."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from ..config import DEFAULT_MODEL, DTYPES, EngineConfig
from ..errors import InvalidConfig, InvalidRequest


class Parser(argparse.ArgumentParser):
    """Without abbreviations of options; an error is one line, without the usage, and exit code 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def refuse(options: argparse.Namespace, error: InvalidConfig | InvalidRequest) -> NoReturn:
    """End the program as the command's parser does, for a value that a config or SamplingParams refused."""
    parser: Parser = options.parser
    parser.error(error.message.rstrip("."))


def add_model_options(parser: argparse.ArgumentParser, *, heads: bool = True) -> Any:
    """The options that say which model is loaded, and how. heads: False for commands that train heads or check them,
    which take the model's own weights and no heads. Returns their group."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME", help=f"{DEFAULT_MODEL}, a hub id or a folder")
    if heads:
        about = "auto, none, a file or folder of heads, or a hub id"
        group.add_argument("--heads", default="auto", metavar="NAME", help=about)
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, or split (over all GPUs)")
    group.add_argument("--dtype", default="auto", help="auto, " + ", ".join(d for d in DTYPES[1:] if d != "float64"))
    if heads:
        about = "auto, none; on a CPU int8, int4; on a GPU nf4"
        group.add_argument("--quantize", default="auto", help=about)
        about = "on a GPU the decoder layers (the default); on a CPU small passes as C++, a minute each, then kept"
        group.add_argument("--compile", action=argparse.BooleanOptionalAction, help=about)
        about = "on a CPU: the same text, bit for bit, whatever the tree and the batch (default: where it holds)"
        group.add_argument("--exact", action=argparse.BooleanOptionalAction, help=about)
    return group


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """The options of a model and of how it is run, and `--json`."""
    group = add_model_options(parser)
    group.add_argument("--slots", type=int, metavar="N", help="sequences that decode together (default: from memory)")
    about = "tokens of prompt and completion (default: the model's, capped)"
    group.add_argument("--max-context", type=int, metavar="N", help=about)
    group.add_argument("--tree", default="auto", help="auto, off, a number of nodes, or a JSON file of medusa_choices")
    about = "tokens that heads draft from; 0: the whole vocabulary (default: the heads' own, on a CPU the 16,384 most "
    group.add_argument("--draft-vocab", type=int, metavar="N", help=f"{about}frequent)")
    group.add_argument("--prefill-chunk", type=int, default=512, metavar="N", help="prompt tokens of one pass at most")
    group.add_argument("--no-lookup", action="store_true", help="do not draft from the sequence's own tokens")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """Of the options that add_engine_options adds; also of `--max-queue`, which `serve` has. Raises InvalidConfig."""
    return EngineConfig(
        model=options.model,
        heads=options.heads,
        device=options.device,
        dtype=options.dtype,
        quantize=options.quantize,
        slots=options.slots,
        max_context=options.max_context,
        tree=options.tree,
        lookup=not options.no_lookup,
        draft_vocab=options.draft_vocab,
        compile=options.compile,
        exact=options.exact,
        prefill_chunk=options.prefill_chunk,
        max_queue=getattr(options, "max_queue", EngineConfig.max_queue),
    )

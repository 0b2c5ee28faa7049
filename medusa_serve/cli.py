"""The command line: `serve` (the default), `generate`, `train`, `heads`, `bench`. torch comes with the first model.

Exit codes: 0; 1 for an error (one line on stderr); 2 for a nonsense option (one line); 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any, NoReturn

from . import __version__
from .bench import acceptance, decode, peers, plot, speed_table, step
from .commands import heads as heads_commands
from .commands import serve as serve_command
from .config import DEFAULT_MODEL, DTYPES, EngineConfig
from .errors import InvalidConfig, InvalidRequest, MedusaServeError
from .types import Completion, SamplingParams

if TYPE_CHECKING:
    from .llm import LLM

COMMANDS = ("serve", "generate", "plan", "train", "heads", "bench")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        parser.error(f"there is no command {arguments[0]!r}; the commands are {', '.join(COMMANDS)}")
    if not arguments or arguments[0] not in (*COMMANDS, "-h", "--help", "--version"):
        arguments.insert(0, "serve")
    logging.basicConfig(level=logging.WARNING, format="medusa_serve: %(message)s")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:  # reported by the command's own parser, whose help lists the options there are
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return int(options.run(options))
    except MedusaServeError as error:
        print(f"medusa_serve: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `… | head`: nobody reads on; keep the interpreter from flushing into it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


# ---- options -----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line and exit code 2, without the usage lines."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    about = "An LLM server for notebooks that emits several tokens per pass of the model."
    parser = _Parser(prog="python -m medusa_serve", description=about, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"medusa_serve {__version__}")
    commands = parser.add_subparsers(required=True, metavar="[COMMAND]", title="commands (serve is the default)")
    serve = commands.add_parser(
        "serve", help="serve a model over HTTP (the default command)", description=about, allow_abbrev=False
    )
    _add_engine_options(serve)
    serve_command.add_options(serve)
    serve.set_defaults(run=_serve, parser=serve)
    generate = commands.add_parser(
        "generate", help="answer one prompt here", description="Answer one prompt.", allow_abbrev=False
    )
    _add_engine_options(generate)
    _add_sampling_options(generate)
    generate.set_defaults(run=_generate, parser=generate)
    _add_plan(commands)
    _add_train(commands)
    _add_heads(commands)
    _add_bench(commands)
    return parser


def _add_plan(commands: Any) -> None:
    about = "What a model would take of a GPU's memory, from its config alone; needs no GPU."
    plan = commands.add_parser("plan", help="what fits into a GPU's memory", description=about, allow_abbrev=False)
    plan.add_argument("--memory", required=True, metavar="SIZE", help="of the GPU, as 15GiB")
    _add_engine_options(plan)
    plan.set_defaults(run=_plan, parser=plan)


def _add_heads(commands: Any) -> None:
    about = "look into files of heads, convert them, try them on a model"
    heads = commands.add_parser("heads", help=about, description=about, allow_abbrev=False)
    check = heads_commands.add_parsers(heads.add_subparsers(required=True, metavar="WHAT", title="what"))
    _add_model_options(check, heads=False)


def _add_bench(commands: Any) -> None:
    about = "measure this machine; takes minutes"
    bench = commands.add_parser("bench", help=about, description=about, allow_abbrev=False)
    kinds = bench.add_subparsers(required=True, metavar="WHAT", title="what")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return kinds.add_parser(name, help=text, description=f"Measure {text}.", allow_abbrev=False)

    engine = add("engine", "plain decoding, concurrent streams, lookup")
    engine.add_argument("--tokens", type=int, default=96, metavar="N", help="of each answer")
    engine.add_argument("--rounds", type=int, default=5, metavar="N", help="repetitions, of which the median counts")
    engine.add_argument("--out", metavar="FILE", help="write the figures there as JSON")
    _add_engine_options(engine)
    engine.set_defaults(run=_bench, parser=engine)
    for module, name, text in (
        (acceptance, "acceptance", "tokens per step by category of prompt and size of tree"),
        (peers, "peers", "tokens per second beside transformers and llama.cpp, in one run"),
        (decode, "decode", "tokens per second by number of sequences, with and without speculation"),
        (step, "step", "a decode step by rows and nodes, beside the time that reading the weights takes"),
    ):
        _add_model_options(parser := add(name, text))
        module.add_options(parser)
    about = "draw a picture of what other benches wrote"
    plot.add_options(kinds.add_parser("plot", help=about, description=about, allow_abbrev=False))
    about = "the README's table of speeds, in Markdown, from what `bench peers` wrote"
    speed_table.add_options(kinds.add_parser("table", help=about, description=about, allow_abbrev=False))


def _add_train(commands: Any) -> None:
    about = "Train heads on the model's own answers to prompts; given again after an interruption, it goes on."
    train = commands.add_parser("train", help="train heads for a model", description=about, allow_abbrev=False)
    train.add_argument("--prompts", required=True, metavar="FILE", help="one a line, JSONL, or a datasets id")
    train.add_argument("--minutes", required=True, type=float, metavar="T", help="for answers and training together")
    train.add_argument("--out", required=True, metavar="DIR", help="a folder that does not exist yet")
    train.add_argument("--family", default="sequential", help="sequential (the default) or medusa")
    _add_model_options(train, heads=False)
    train.set_defaults(run=_train, parser=train)


def _add_model_options(parser: argparse.ArgumentParser, *, heads: bool = True) -> Any:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME", help=f"{DEFAULT_MODEL}, a hub id or a folder")
    if heads:
        group.add_argument(
            "--heads", default="auto", metavar="NAME", help="auto, none, a file or folder of heads, or a hub id"
        )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, or split (over all GPUs)")
    group.add_argument("--dtype", default="auto", help="auto, " + ", ".join(d for d in DTYPES[1:] if d != "float64"))
    if heads:  # whoever learns from the model, or checks heads against it, wants its own weights
        about = "auto, none; on a CPU int8, int4; on a GPU nf4"
        group.add_argument("--quantize", default="auto", help=about)
        about = "on a GPU the decoder layers (the default); on a CPU small passes as C++, a minute each, then kept"
        group.add_argument("--compile", action=argparse.BooleanOptionalAction, help=about)
        about = "on a CPU: the same text, bit for bit, whatever the tree and the company (default: where it holds)"
        group.add_argument("--exact", action=argparse.BooleanOptionalAction, help=about)
    return group


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    group = _add_model_options(parser)
    group.add_argument("--slots", type=int, metavar="N", help="sequences that decode together (default: from memory)")
    group.add_argument(
        "--max-context", type=int, metavar="N", help="tokens of prompt and completion (default: the model's, capped)"
    )
    group.add_argument("--tree", default="auto", help="auto, off, a number of nodes, or a JSON file of medusa_choices")
    group.add_argument(
        "--draft-vocab",
        type=int,
        metavar="N",
        help="tokens that heads draft from; 0: the whole vocabulary (default: the heads' own, on a CPU the 16,384 most "
        "frequent)",
    )
    group.add_argument("--prefill-chunk", type=int, default=512, metavar="N", help="prompt tokens of one pass at most")
    group.add_argument("--no-lookup", action="store_true", help="do not draft from the sequence's own tokens")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="the prompt, or - to read it from stdin")
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, metavar="N", help="of the answer (default: 256, or what fits)")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (the default) is greedy")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="likeliest tokens of this mass (1: all)")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="likeliest K tokens (0: all)")
    group.add_argument("--min-p", type=float, default=0.0, metavar="P", help="at least P times the likeliest (0: all)")
    group.add_argument("--seed", type=int, metavar="N", help="of the sampling (default: drawn, and reported)")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="may be given several times")
    group.add_argument("--system", metavar="TEXT", help="system message")
    group.add_argument("--raw", action="store_true", help="the prompt as it is, without the chat template")


def _engine_config(options: argparse.Namespace) -> EngineConfig:
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


def _refuse(options: argparse.Namespace, error: InvalidConfig | InvalidRequest) -> NoReturn:
    """A value that a config or SamplingParams refuses, as the parser's own error."""
    parser: _Parser = options.parser
    parser.error(error.message.rstrip("."))


# ---- generate ----------------------------------------------------------------------------------------------------


def _generate(options: argparse.Namespace) -> int:
    try:
        if options.slots is None:
            options.slots = 1  # there is one prompt; more slots would only hold memory
        config = _engine_config(options)
        params = SamplingParams(
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            min_p=options.min_p,
            seed=options.seed,
            stop=tuple(options.stop),
        )
        text = _read_prompt(options)
    except (InvalidConfig, InvalidRequest) as error:
        _refuse(options, error)
    from .llm import LLM

    with LLM(config) as llm:
        completion = _answer(llm, _as_prompt(text, options, llm.codec.has_chat_template), params, echo=not options.json)
    if options.json:
        print(json.dumps(completion.to_dict(), ensure_ascii=False), flush=True)
    else:
        print("" if completion.text.endswith("\n") else "\n", end="", flush=True)
        print(_figures(completion), file=sys.stderr)
    return 0


def _read_prompt(options: argparse.Namespace) -> str:
    if options.raw and options.system is not None:
        raise InvalidRequest("--system needs the chat template, which --raw turns off.")
    text = options.prompt
    if text == "-":
        try:
            text = sys.stdin.read().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"The prompt on stdin is not {error.encoding} text.") from None
    if not text:
        raise InvalidRequest("The prompt is empty.")
    return str(text)


def _as_prompt(text: str, options: argparse.Namespace, has_chat_template: bool) -> str | list[dict[str, str]]:
    if options.raw:
        return text
    if not has_chat_template:
        if options.system is not None:
            raise InvalidRequest("This model has no chat template, so --system cannot be used.")
        return text
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    return [*system, {"role": "user", "content": text}]


def _answer(llm: LLM, prompt: str | list[dict[str, str]], params: SamplingParams, *, echo: bool) -> Completion:
    """Run one prompt to its end; with `echo`, print its text as it comes."""
    if echo:
        _forgive(sys.stdout)
    completion = None
    for delta in llm.stream(prompt, params):
        if echo and delta.text:
            print(delta.text, end="", flush=True)
        completion = delta.completion or completion
    assert completion is not None  # a stream ends with a completion or raises
    return completion


def _forgive(stream: IO[str]) -> None:
    """A terminal that cannot show a character shows a question mark; it does not end the answer."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


def _figures(completion: Completion) -> str:
    parts = [f"{completion.completion_tokens} tokens"]
    if completion.tokens_per_second is not None:
        parts.append(f"{completion.tokens_per_second:.1f} tokens/s")
    if completion.acceptance is not None:
        parts.append(f"{completion.acceptance:.2f} tokens per step")
    return ", ".join([*parts, f"finish reason: {completion.finish_reason}"])


# ---- plan --------------------------------------------------------------------------------------------------------


def _plan(options: argparse.Namespace) -> int:
    try:
        config = _engine_config(options)
    except InvalidConfig as error:
        _refuse(options, error)
    from .model.loading.gpu_memory import plan_of

    plan = plan_of(config, options.memory)
    print(json.dumps(plan.to_dict()) if options.json else "\n".join(plan.lines()))
    return 0 if plan.slots else 1


# ---- serve -------------------------------------------------------------------------------------------------------


def _serve(options: argparse.Namespace) -> int:
    from .cluster.config import ReplicasConfig

    try:
        engine = _engine_config(options)
        server, key_is_ours = serve_command.server_config(options)
        ReplicasConfig(replicas=options.replicas)
    except InvalidConfig as error:
        _refuse(options, error)
    if options.replicas > 1:
        from .cluster.command import serve_replicas

        serve_replicas(engine, server, options.replicas, as_json=options.json, key_is_ours=key_is_ours)
        return 0
    serve_command.serve_until_stopped(engine, server, as_json=options.json, key_is_ours=key_is_ours)
    return 0


# ---- train -------------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> int:
    from .training.pipeline import train_from_prompts

    try:
        config = EngineConfig(model=options.model, device=options.device, dtype=options.dtype, quantize="none")
        made = train_from_prompts(config, **{x: getattr(options, x) for x in ("prompts", "minutes", "out", "family")})
    except InvalidConfig as error:
        _refuse(options, error)
    except KeyboardInterrupt:
        print("medusa_serve: interrupted, nothing is lost: the same command goes on from here", file=sys.stderr)
        return 130
    serve_them = f"Serve them: python -m medusa_serve --model {options.model} --heads {options.out}"
    print(*made.lines, serve_them, sep="\n", flush=True)
    return 0


# ---- bench -------------------------------------------------------------------------------------------------------


def _bench(options: argparse.Namespace) -> int:
    from tests.campaigns.engine import BenchConfig, bench_engine, table

    try:
        config, bench = _engine_config(options), BenchConfig(tokens=options.tokens, rounds=options.rounds)
    except InvalidConfig as error:
        _refuse(options, error)
    result = bench_engine(config, bench)
    text = json.dumps(result, indent=1)
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    print(text if options.json else table(result))
    return 0

"""`medusa-serve generate`: answer one prompt here."""

from __future__ import annotations

import argparse
import json
import sys
from typing import IO, TYPE_CHECKING

from ..errors import InvalidConfig, InvalidRequest
from ..types import Completion, Number, SamplingParams, sampling_numbers
from .options import add_engine_options, engine_config, refuse

if TYPE_CHECKING:
    from ..llm import LLM


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "Answer one prompt."
    add_engine_options(parser)
    _add_sampling_options(parser)
    parser.set_defaults(run=run, parser=parser)


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="the prompt, or - to read it from stdin")
    group = parser.add_argument_group("sampling")
    for name, number in _numbers().items():
        default = "" if number.default is None else f" (default: {number.default:g})"
        about = {"type": number.kind, "default": number.default, "metavar": number.metavar}
        group.add_argument("--" + name.replace("_", "-"), help=number.help + default, **about)  # type: ignore[arg-type]
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="may be given several times")
    group.add_argument("--system", metavar="TEXT", help="system message")
    group.add_argument("--raw", action="store_true", help="the prompt as it is, without the chat template")


def _numbers() -> dict[str, Number]:
    """The numbers of SamplingParams that are options here."""
    return {name: number for name, number in sampling_numbers().items() if number.metavar is not None}


def run(options: argparse.Namespace) -> int:
    try:
        if options.slots is None:
            options.slots = 1  # there is one prompt; more slots would only hold memory
        config = engine_config(options)
        given = {name: getattr(options, name) for name in _numbers()}
        params = SamplingParams(**given, stop=tuple(options.stop))
        text = _read_prompt(options)
    except (InvalidConfig, InvalidRequest) as error:
        refuse(options, error)
    from ..llm import LLM

    with LLM(config) as llm:
        completion = _answer(llm, _as_prompt(text, options, llm.codec.has_chat_template), params, echo=not options.json)
    if options.json:
        print(json.dumps(completion.to_dict(), ensure_ascii=False), flush=True)
    else:
        print("" if completion.text.endswith("\n") else "\n", end="", flush=True)
        print(figures(completion), file=sys.stderr)
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
        _show_what_it_can(sys.stdout)
    completion = None
    for delta in llm.stream(prompt, params):
        if echo and delta.text:
            print(delta.text, end="", flush=True)
        completion = delta.completion or completion
    assert completion is not None  # a stream ends with a completion or raises
    return completion


def _show_what_it_can(stream: IO[str]) -> None:
    """A terminal that cannot show a character shows a question mark; it does not end the answer."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


def figures(completion: Completion) -> str:
    """The line below an answer: tokens, speed, acceptance, why it ended."""
    words = [f"{completion.completion_tokens} tokens"]
    if completion.tokens_per_second is not None:
        words.append(f"{completion.tokens_per_second:.1f} tokens/s")
    if completion.acceptance is not None:
        words.append(f"{completion.acceptance:.2f} tokens per step")
    return ", ".join([*words, f"finish reason: {completion.finish_reason}"])

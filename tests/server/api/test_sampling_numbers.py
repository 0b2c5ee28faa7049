"""Bounds, defaults and help of a sampling option are written once: a change there is seen everywhere."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("httpx", reason="the server's tests need httpx: pip install -e '.[test]'")

# Changes every number of SamplingParams before anything is made from them, then looks at what is made.
SCRIPT = """
    import argparse, json
    from dataclasses import fields, replace
    from types import MappingProxyType
    from medusa_serve.types import SamplingParams

    def changed(place, number):
        default = None if number.default is None else number.kind(1)  # within all bounds
        return replace(number, low=number.low - 100 - place, high=100 + place, default=default, help=f"Help {place}.")

    for place, field in enumerate(fields(SamplingParams)):
        if "number" in field.metadata:
            number = changed(place, field.metadata["number"])
            field.metadata = MappingProxyType({"number": number, "check": number.check})

    from medusa_serve.commands import generate
    from medusa_serve.server.app import create_app
    from medusa_serve.server.config import ServerConfig
    from medusa_serve.types import sampling_numbers
    from tests.server.standins import HandLLM, ask, error_of

    parser = argparse.ArgumentParser()
    generate.add_options(parser)
    llm, numbers = HandLLM(), sampling_numbers()
    above = [{"prompt": "a", name: number.high + 1} for name, number in numbers.items() if name != "seed"]
    print(json.dumps({
        "numbers": {name: [n.low, n.high, n.open_low, n.default, n.help] for name, n in numbers.items()},
        "options": {action.dest: [action.default, action.help] for action in parser._actions},
        "page": create_app(llm, ServerConfig()).openapi()["components"]["schemas"],
        "sentences": [error_of(reply)["message"] for reply in ask(llm, *({"json": body} for body in above))],
    }))
"""
ROOT = Path(__file__).parents[3]
BODIES = ("GenerateRequest", "CompletionRequest", "ChatRequest", "TgiParameters")
NOT_SAMPLING = {"n"}  # of the API alone: how many answers


@pytest.fixture(scope="module")
def made() -> dict:
    script = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    return json.loads(subprocess.run(script, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def numeric(schema: dict) -> dict:
    """The branch of a field's schema that has bounds, or {}."""
    return next((b for b in schema.get("anyOf", [schema]) if b.get("type") in ("integer", "number")), {})


@pytest.mark.parametrize("body", BODIES)
def test_each_body_shows_what_the_params_check(made: dict, body: str) -> None:
    by_help = {help: (name, *rest) for name, (*rest, help) in made["numbers"].items()}
    found = set()
    for field, schema in made["page"][body]["properties"].items():
        bounds = numeric(schema)
        if not bounds or field in NOT_SAMPLING:
            continue
        name, low, high, open_low, default = by_help[schema["description"]]  # every bound is a SamplingParams' one
        found.add(name)
        assert bounds["exclusiveMinimum" if open_low else "minimum"] == low
        assert bounds["maximum"] == high or name == "seed"  # HTTP rounds seeds that doubles rounded up
        if body == "GenerateRequest":  # the other APIs have defaults of their own
            assert schema.get("default") == default
    missing = set(made["numbers"]) - found
    assert missing == ({"min_p", "presence_penalty"} if body == "TgiParameters" else set())


def test_the_command_line_has_their_defaults_and_help(made: dict) -> None:
    found = set(made["numbers"]) & set(made["options"])
    assert {"max_tokens", "temperature", "top_p", "top_k", "min_p", "seed"} <= found
    for name in found:
        _, _, _, default, help = made["numbers"][name]
        assert made["options"][name][0] == default
        assert made["options"][name][1].startswith(help)


def test_a_value_above_a_bound_is_refused_with_the_bound(made: dict) -> None:
    names = [name for name in made["numbers"] if name != "seed"]
    for name, sentence in zip(names, made["sentences"], strict=True):
        low, high, *_ = made["numbers"][name]
        assert sentence.startswith(f"{name} must be ")
        assert str(low) in sentence
        assert str(high) in sentence


def test_the_command_line_refuses_with_the_same_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    from medusa_serve.cli import main
    from medusa_serve.errors import InvalidRequest
    from medusa_serve.types import SamplingParams, sampling_numbers

    for name, number in sampling_numbers().items():
        if number.metavar is not None:
            with pytest.raises(InvalidRequest) as refused:
                SamplingParams(**{name: number.high + 1})
            with pytest.raises(SystemExit):
                main(["generate", "hi", f"--{name.replace('_', '-')}", str(number.high + 1)])
            assert refused.value.message.rstrip(".") in capsys.readouterr().err

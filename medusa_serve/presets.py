"""Models by short names, as plain data: heads ship for some, are published for others, and do not exist for the rest.

The ids are a model hub's. model/drafting/layouts.py explains the letters of the heads' layouts.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from .errors import LoadError

FAMILIES = ("sequential", "medusa")  # the better family first; `auto` takes it

# FastChat's "vicuna_v1.1" chat template: the published heads were trained with it, and the tokenizers have none
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% set rest = messages[1:] %}{% else %}"
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions.{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if message['role'] == 'user' %} USER: {{ message['content'] }}"
    "{% else %} ASSISTANT: {{ message['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """base: the model's id · heads: an id, or None: only the lookup drafts until heads are trained (`medusa-serve
    train`) · joint: one repository holds base and heads, trained together, and its base differs from the original model
    · chat: a chat template, where the tokenizer has none · tree: as --tree"""

    base: str
    heads: str | None = None
    layout: str = ""
    num_heads: int = 0
    num_layers: int = 1
    tied: bool = False
    joint: bool = False
    chat: str | None = None
    tree: str = "auto"


def _v1_3(size: str) -> Preset:
    base, heads = f"lmsys/vicuna-{size}-v1.3", f"FasterDecoding/medusa-vicuna-{size}-v1.3"
    return Preset(base=base, heads=heads, layout="A", num_heads=5, chat=VICUNA)  # their configs say 2 heads


def _v1_0(name: str, chat: str | None = None) -> Preset:
    repo = f"FasterDecoding/medusa-1.0-{name}"
    return Preset(base=repo, heads=repo, layout="D", num_heads=5, joint=True, chat=chat)


PRESETS = {
    "vicuna-7b-v1.3": _v1_3("7b"),
    "vicuna-13b-v1.3": _v1_3("13b"),
    "vicuna-33b-v1.3": _v1_3("33b"),
    "vicuna-7b-v1.5": _v1_0("vicuna-7b-v1.5", VICUNA),
    "vicuna-13b-v1.5": _v1_0("vicuna-13b-v1.5", VICUNA),
    "zephyr-7b": _v1_0("zephyr-7b-beta"),
    "zephyr-7b-tied": Preset(
        base="HuggingFaceH4/zephyr-7b-beta", heads="real-jiakai/zephyr_medusa_demo", layout="C", num_heads=3, tied=True
    ),
    "mistral-7b-v0.2": Preset(
        base="mistralai/Mistral-7B-Instruct-v0.2",
        heads="text-generation-inference/Mistral-7B-Instruct-v0.2-medusa",
        layout="B",
        num_heads=3,
    ),
    "mistral-7b-v0.3": Preset(
        base="mistralai/Mistral-7B-Instruct-v0.3", heads="leptonai/Mistral-7B-Instruct-v0.3-4heads", num_heads=4
    ),
    "llama-3.1-8b": Preset(
        base="meta-llama/Llama-3.1-8B-Instruct",
        heads="philschmid/llama-3-1-8b-instruct-medusa",
        layout="C",
        num_heads=3,
        tied=True,
    ),
    "llama-3.1-8b-4heads": Preset(
        base="meta-llama/Llama-3.1-8B-Instruct", heads="leptonai/Meta-Llama-3.1-8B-Instruct-4heads", num_heads=4
    ),
    "tinyllama-1.1b": Preset(
        base="TinyLlama/TinyLlama-1.1B-Chat-v1.0", heads="leptonai/TinyLlama-1.1B-Chat-v1.0-4heads", num_heads=4
    ),
    # small, current, without published heads
    "smollm2-360m": Preset(base="HuggingFaceTB/SmolLM2-360M-Instruct"),
    "smollm2-1.7b": Preset(base="HuggingFaceTB/SmolLM2-1.7B-Instruct"),
    "smollm3-3b": Preset(base="HuggingFaceTB/SmolLM3-3B"),
    "qwen2.5-0.5b": Preset(base="Qwen/Qwen2.5-0.5B-Instruct"),
    "qwen2.5-1.5b": Preset(base="Qwen/Qwen2.5-1.5B-Instruct"),
    "qwen2.5-3b": Preset(base="Qwen/Qwen2.5-3B-Instruct"),
    "qwen3-0.6b": Preset(base="Qwen/Qwen3-0.6B"),
    "qwen3-1.7b": Preset(base="Qwen/Qwen3-1.7B"),
    "llama-3.2-1b": Preset(base="meta-llama/Llama-3.2-1B-Instruct"),
    "llama-3.2-3b": Preset(base="meta-llama/Llama-3.2-3B-Instruct"),
    "gemma-3-1b": Preset(base="google/gemma-3-1b-it"),
}


def shipped_heads(model: str, heads: str) -> Path | None:
    """The folder of the shipped heads of the family `heads` for `model`; with "auto", of the better family.

    With "auto", None where no heads ship. Raises LoadError where the family that is asked for does not ship."""
    home = Path(__file__).parent / "heads" / model
    wanted = FAMILIES if heads == "auto" else (heads,)
    found = [home / family for family in wanted if (home / family / "config.json").is_file()]
    if not found and heads != "auto":
        raise LoadError(f"no {heads} heads ship for {model}; give --heads a file or folder, or auto, or none.")
    return found[0] if found else None


def nearest(model: str) -> str:
    """The end of an error sentence about an unknown name: the presets that are spelt like it, or ""."""
    found = difflib.get_close_matches(model.lower(), [*PRESETS, "smollm2-135m"], n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(found)}?" if found else ""

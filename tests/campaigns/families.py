"""Which families of transformers' decoders run with trees (by attention of ours, or by a mask for their own):
`python -m tests.campaigns families`. Tiny random models go through the self-test of every load, in float32: a tree
pass, a commit and the pass after it against plain forwards."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from medusa_serve.bench.command import end_options, run_bench
from medusa_serve.config import EngineConfig
from medusa_serve.errors import InvalidConfig

Row = dict[str, Any]
SIZES: dict[str, Any] = {  # where a family calls a size otherwise, its config takes the other name too
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OLD: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 32},
    "qwen3_moe": MOE,
    "gemma": {},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
    "phi": {},
    "phi3": {},
    "gpt2": OLD,
    "gpt_neox": {},
    "gpt_bigcode": OLD,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "stablelm": {},
    "cohere": {},
    "cohere2": {"sliding_window": 4},
    "olmo": {},
    "olmo2": {},
    "granite": {},
    "starcoder2": {},
    "smollm3": {},
    "glm": {},
    "glm4": {},
    "nemotron": {},
    "exaone4": {"sliding_window": 4},
    "persimmon": {},
    "helium": {},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "falcon": {"alibi": False, "without": ("head_dim",)},
    "gptj": OLD,
    "codegen": OLD,
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 4, "lru_width": 32},
}


@dataclass(frozen=True, kw_only=True)
class FamiliesConfig:
    """families: keys of FAMILIES; None: all"""

    families: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        unknown = set(self.families or ()) - set(FAMILIES)
        if unknown:
            raise InvalidConfig(f"There is no family {sorted(unknown)[0]!r} in the list.", param="families")


def bench_families(engine: EngineConfig, config: FamiliesConfig) -> Row:
    from transformers.utils import logging

    from medusa_serve.bench.facts import command, facts

    logging.set_verbosity_error()  # what matters of their advice is in the table
    rows = [row_of(name) for name in config.families or FAMILIES]
    return {"kind": "families", "machine": facts(), "command": command("tests.campaigns"), "rows": rows}


def row_of(name: str) -> Row:
    """runs: "trees" or "mask" (error: the self-test's), "plain" (why) or "not" (why)."""
    from medusa_serve.model.build import build_runner

    try:
        model = tiny(name)
        config = EngineConfig(slots=2, max_context=64)
        built = build_runner(model, config, eos_ids=[], max_positions=256)
    except Exception as error:  # of a family's own code: whatever it raises
        return {"family": name, "runs": "not", "error": None, "why": f"{type(error).__name__}: {error}"[:160]}
    built.runner.close()
    if built.tree_error is not None:
        runs = "mask" if any(note.startswith("the tree is a mask") for note in built.notes) else "trees"
        return {"family": name, "runs": runs, "error": float(f"{built.tree_error:.1e}"), "why": None}
    why = next(note.split("because ", 1)[1] for note in built.notes if "decodes plainly" in note)
    return {"family": name, "runs": "plain", "error": None, "why": why}


def tiny(name: str) -> Any:
    """A random model of the family, in float32; the same weights each time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = SIZES | FAMILIES[name]
    without = ("without", *options.get("without", ()))
    config = AutoConfig.for_model(name, **{key: value for key, value in options.items() if key not in without})
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() > 1:  # as they are initialised, tiny models hardly look at what came before
                parameter.normal_(0.0, 0.2)
    return model


def table(result: Row) -> str:
    rows, facts = result["rows"], result["machine"]
    lines = [f"transformers {facts['transformers']}, torch {facts['torch']}, {facts['date']}; {counts(rows)}"]
    for row in rows:
        note = f"self-test {row['error']:.0e}" if row["why"] is None else row["why"]
        lines.append(f"{row['family']:18}{row['runs']:8}{note}")
    return "\n".join(lines)


def counts(rows: Iterable[Row]) -> str:
    kinds = [row["runs"] for row in rows]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("trees", "mask", "plain", "not") if kind in kinds)


def add_options(parser: argparse.ArgumentParser) -> None:
    about = "some of the list (all)"
    parser.add_argument("--families", type=lambda text: tuple(text.split(",")), metavar="NAME,…", help=about)
    end_options(parser, run)


def run(options: argparse.Namespace) -> int:
    return run_bench(options, "families", FamiliesConfig, bench_families, table)

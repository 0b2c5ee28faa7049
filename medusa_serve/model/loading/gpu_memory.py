"""How much GPU memory a model will take: from its config alone, before anything is loaded.

memory = context (CUDA's own) + weights + heads + slots × columns of keys and values + rest (graphs, activations,
logits, what the allocator keeps) + what is left. The same numbers choose the quantisation and the slots at start.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...config import EngineConfig
from ...presets import FAMILIES, PRESETS, shipped_heads
from ..drafting.tensors import find_files
from ..forward.hidden_tap import decoder_layers
from .slots import GPU_CONTEXT, GPU_SLOTS, LEAST_REST, for_slots

SLACK = 64  # columns after the end of a full slot, for the largest tree
CONTEXT = 450 * 2**20  # bytes that CUDA and its libraries take in every process
NF4_BYTES = 0.5 + 4 / 64  # of a weight: four bits, and a float32 for every 64 weights
WANTED_SLOTS = 4  # where memory allows fewer, `auto` quantises
LEAST_CONTEXT = 512
GiB = 2**30


@dataclass(frozen=True)
class Sizes:
    """How many numbers a model has: in the linear weights of its decoder layers, in the largest of these, in all other
    weights, and in the keys and values of one token (column)."""

    linear: int
    largest: int
    other: int
    column: int
    hidden: int
    vocab: int
    max_positions: int | None

    def weight_bytes(self, quantize: str, itemsize: int) -> int:
        per = NF4_BYTES if quantize == "nf4" else itemsize
        return int(self.linear * per) + self.other * itemsize

    def spread_bytes(self, quantize: str, itemsize: int) -> int:
        """Of four-bit weights in half precision: a pass of many tokens converts them one after the other."""
        return self.largest * itemsize if quantize == "nf4" else 0


@dataclass(frozen=True)
class HeadSizes:
    """K heads of L layers; tied ones borrow the base's output layer. known: their numbers, where those were counted"""

    num_heads: int = 0
    num_layers: int = 1
    tied: bool = False
    known: int | None = None

    def numbers(self, sizes: Sizes) -> int:
        if self.known is not None:
            return self.known
        blocks = self.num_layers * (sizes.hidden + 1) * sizes.hidden
        return self.num_heads * (blocks + (0 if self.tied else sizes.vocab * sizes.hidden))


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each part. slots 0: it does not fit, and `advice` says which options would."""

    memory: int
    quantize: str
    why: str
    weights: int
    heads: int
    slots: int
    context: int
    slot: int
    rest: int
    spread: int = 0
    asked: str = "not one slot"
    advice: tuple[str, ...] = ()

    @property
    def left(self) -> int:
        return self.memory - CONTEXT - self.weights - self.heads - self.slots * self.slot - self.rest

    @property
    def expected(self) -> int:
        """Bytes that PyTorch will hold; of `rest` only what graphs and activations are known to take."""
        return self.weights + self.heads + self.slots * self.slot + LEAST_REST + self.spread

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "context_bytes": CONTEXT, "left": self.left, "fits": self.slots > 0}

    def lines(self) -> list[str]:
        """For a person."""
        rows = [
            ("CUDA and its libraries", CONTEXT, ""),
            ("weights", self.weights, f"quantize {self.quantize}: {self.why}"),
            ("heads", self.heads, "half precision" if self.heads else "none"),
            ("keys and values", self.slots * self.slot, f"{self.slots} slots of {self.context} tokens"),
            ("rest", self.rest, "graphs, activations, logits"),
            ("left", self.left, ""),
        ]
        lines = [f"{name:24}{size / GiB:8.2f} GiB  {what}".rstrip() for name, size, what in rows]
        return [*lines, f"{'of':24}{self.memory / GiB:8.2f} GiB", *self.verdict()]

    def verdict(self) -> list[str]:
        if self.slots:
            return ["it fits"]
        lines = [f"it does not fit: {self.asked} of {self.context} tokens"]
        return lines + ([f"it would with {way}" for way in self.advice] or ["no option helps: choose a smaller model"])


def sizes_of(hf_config: Any) -> Sizes:
    """Counted on a model of this config on the meta device, which takes no memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    layers = decoder_layers(model)
    linear = [m.weight.numel() for m in layers.modules() if isinstance(m, torch.nn.Linear)]
    text = hf_config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Sizes(
        linear=sum(linear),
        largest=max(linear, default=0),
        other=sum(parameter.numel() for parameter in model.parameters()) - sum(linear),
        column=2 * kv_heads * dim * len(layers),
        hidden=text.hidden_size,
        vocab=text.vocab_size,
        max_positions=getattr(text, "max_position_embeddings", None),
    )


def plan_memory(sizes: Sizes, memory: int, itemsize: int, config: EngineConfig) -> MemoryPlan:
    """memory: bytes that are free before the process touches the GPU · itemsize: bytes of a number that is not
    quantised · config: quantize (auto, none or nf4), heads, slots and max_context"""
    heads, slots = head_sizes(config), config.slots
    quantize = config.quantize if itemsize <= 2 else "none"
    wanted = config.max_context or min(GPU_CONTEXT, sizes.max_positions or GPU_CONTEXT)

    def at(quantize: str, why: str, slots: int | None, context: int, heads: HeadSizes) -> MemoryPlan:
        weights, head_bytes = sizes.weight_bytes(quantize, itemsize), heads.numbers(sizes) * itemsize
        free = memory - CONTEXT - weights - head_bytes
        slot = (context + SLACK) * sizes.column * itemsize
        for_kv = for_slots(max(0, free))
        fits = min(for_kv // slot, slots or GPU_SLOTS)
        fits = 0 if slots is not None and fits < slots else fits
        asked = f"{slots} slots" if slots and slots > 1 else "not one slot"
        rest, spread = max(0, free) - for_kv, sizes.spread_bytes(quantize, itemsize)
        return MemoryPlan(memory, quantize, why, weights, head_bytes, fits, context, slot, rest, spread, asked)

    if quantize == "auto":
        plain = at("none", "it fits as it is", slots, wanted, heads)
        if plain.slots >= min(WANTED_SLOTS, slots or WANTED_SLOTS):
            return plain
        have = f"{plain.slots} slots" if plain.slots else "no slot"
        small = at("nf4", f"in half precision {have} of {wanted} tokens would fit", slots, wanted, heads)
        if small.slots > plain.slots:
            return small
        plan, quantize = (plain, "none") if plain.slots else (small, "nf4")
    else:
        plan = at(quantize, "as asked", slots, wanted, heads)
    return plan if plan.slots else _advised(plan, at, quantize, slots, wanted, heads)


def itemsize_of(dtype: str) -> int:
    """Bytes of a number of this EngineConfig.dtype on a GPU."""
    return 2 if dtype == "auto" else int(getattr(torch, dtype).itemsize)


def _advised(plan: MemoryPlan, at: Any, quantize: str, slots: int | None, context: int, heads: HeadSizes) -> MemoryPlan:
    """The plan, with each single change that would make it fit."""
    ways = []
    if quantize == "none" and at("nf4", "", slots, context, heads).slots:
        ways.append("--quantize nf4")
    if slots and slots > 1 and (fewer := at(quantize, "", None, context, heads).slots):
        ways.append(f"--slots {min(fewer, slots - 1)}")
    shorter = next((n for n in _halves(context) if at(quantize, "", slots, n, heads).slots), None)
    if shorter:
        ways.append(f"--max-context {shorter}")
    if heads.num_heads and not heads.tied:
        tied = HeadSizes(heads.num_heads, heads.num_layers, tied=True)
        if at(quantize, "", slots, context, tied).slots:
            ways.append(
                "heads tied to the base's output layer, which draft from a short list of tokens (--draft-vocab)"
            )
    if heads.num_heads and at(quantize, "", slots, context, HeadSizes()).slots:
        ways.append("--heads none")
    if not ways and quantize == "none":
        both = next((n for n in _halves(context) if at("nf4", "", slots, n, heads).slots), None)
        ways += [f"--quantize nf4 --max-context {both}"] if both else []
    return replace(plan, advice=tuple(ways))


def _halves(context: int) -> list[int]:
    found = []
    while (context := context // 2) >= LEAST_CONTEXT:
        found.append(context)
    return found


def head_sizes(config: EngineConfig) -> HeadSizes:
    """Sizes of the heads that this config will load, from the preset or the size of their file."""
    if config.heads == "none" or config.tree == "off":
        return HeadSizes()
    if config.heads not in ("auto", *FAMILIES):
        return _of_files(Path(config.heads))
    preset = PRESETS.get(config.model)
    if preset is not None and preset.heads is not None:
        return HeadSizes(preset.num_heads, preset.num_layers, preset.tied)
    shipped = shipped_heads(config.model, config.heads)
    return HeadSizes() if shipped is None else _of_files(shipped)


def _of_files(path: Path) -> HeadSizes:
    return HeadSizes(known=sum(file.stat().st_size for file in find_files(path.expanduser())) // 2)

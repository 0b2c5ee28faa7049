"""Two ways to make drafting cheap where memory is slow: fewer tokens to rank, and smaller numbers. They can change the
drafts, never the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...errors import LoadError
from ..weights.int4 import Int4Linear, int4_kind_of
from ..weights.int8 import quantize_linears
from ..weights.machine_cache import machine_key, measured_once
from ..weights.number_format import best_format, format_times
from .heads import Heads, HeadsInfo

CPU_VOCAB = (
    16384  # the output layer is most of what a draft reads; these tokens are 97 % of the default model's answers
)
WORTH_IT = 1 << 20  # numbers in an output layer; a smaller one takes no time worth saving


def as_served(heads: Heads, info: HeadsInfo, model: Any, cache: Path, draft_vocab: int | None = None) -> list[str]:
    """Prepare heads attached to `model` for drafting: limit_vocabulary, make_fast. → notes. Raises LoadError."""
    output, ordered = model.get_output_embeddings(), info.layout == "native"
    return [
        *limit_vocabulary(heads, output, draft_vocab, ordered=ordered),
        *make_fast(heads, cache, int4_kind_of(model)),
    ]


def limit_vocabulary(heads: Heads, base_output: Any, wanted: int | None, *, ordered: bool) -> list[str]:
    """Let tied heads draft from the first `wanted` tokens of their list, or from the base's full vocabulary (0). None:
    from CPU_VOCAB tokens on a CPU, if the list is `ordered` by frequency and longer. → notes. Raises LoadError."""
    output, own = heads.output, heads.token_map
    assert output.weight is not None
    have, on_cpu = output.vocab_size, output.weight.device.type == "cpu"
    if wanted is None:
        wanted = CPU_VOCAB if ordered and own is not None and on_cpu else have
        if wanted >= have:
            return []
    if not output.tied:
        raise LoadError("these heads have their own output layer, so draft_vocab cannot change its size.")
    if wanted > have:
        raise LoadError(f"draft_vocab {wanted} is more than the {have} tokens that these heads draft from.")
    if wanted == 0:
        output.token_map = None
        output.attach(base_output)
    else:
        output.keep_first(wanted)
    return [f"drafts from {output.vocab_size} tokens, {have} without draft_vocab"]


def make_fast(heads: Heads, cache: Path, int4: type[Int4Linear] = Int4Linear) -> list[str]:
    """Let heads on a CPU draft in the format that multiplies fastest there, or in int8 as the base does. The products
    of their output layer are measured once; the `cache` folder keeps the times. → notes. The text stays the base's.
    int4: the class for int4 weights"""
    output = heads.output
    weight = output.weight
    assert weight is not None
    if output.scale is None:
        small = ("int8", "int4") if int4 is Int4Linear else ("int4",)  # our int4 kernels read half of int8's bytes
        some = {torch.float32: ("float32", "bfloat16", "int8"), torch.bfloat16: ("bfloat16", *small)}
        formats = some.get(weight.dtype)
        if weight.device.type != "cpu" or formats is None or weight.numel() < WORTH_IT:
            return []
        matrix = weight if weight.dim() == 2 else weight[0]
        shape, key = " x ".join(map(str, matrix.shape)), machine_key("cpu")
        times, _ = measured_once(
            cache,
            f"drafts in {', '.join(formats)}, {shape}{int4.note}: {key}",
            set(),
            lambda: format_times([matrix.detach()], rows=2, int4=int4),
        )
        best = best_format(times, tuple(name for name in formats if name in times))
    else:
        best = "int8"
    if output.scale is None and getattr(torch, best, None) == weight.dtype:
        return []
    heads.to(torch.bfloat16)
    if best == "int4":
        output.to_int4(int4)
    if best == "int8":
        output.to_int8()
    if best in ("int4", "int8"):
        quantize_linears(heads, int4.int8())
    return [f"heads draft in {best} because this CPU multiplies it fastest"]

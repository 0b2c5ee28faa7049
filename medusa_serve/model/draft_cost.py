"""What makes drafting cheap where memory is slow: fewer tokens to rank, and smaller numbers. Only drafts change by
either, never the text."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import LoadError
from .heads import Heads

CPU_VOCAB = (
    16384  # the output layer is most of what a draft reads; these tokens are 97 % of the default model's answers
)
WORTH_IT = 1 << 20  # numbers of an output layer from which on its time shows
GAIN = 0.8  # of float32's time: bfloat16 must be so much faster


def limit_vocabulary(heads: Heads, base_output: Any, wanted: int | None, *, ordered: bool) -> list[str]:
    """Let tied heads draft from the first `wanted` tokens of their own list, or from the base's whole vocabulary (0);
    None: from CPU_VOCAB on a CPU, if their list is `ordered` by frequency and longer. → notes. Raises LoadError."""
    output, own = heads.output, heads.token_map
    assert output.weight is not None
    have, on_cpu = output.vocab_size, output.weight.device.type == "cpu"
    if wanted is None:
        wanted = CPU_VOCAB if ordered and own is not None and on_cpu else have
        if wanted >= have:
            return []
    if not output.tied:
        raise LoadError("these heads bring an output layer of their own, so draft_vocab cannot change its size.")
    if wanted > have:
        raise LoadError(f"draft_vocab {wanted} is more than the {have} tokens that these heads draft from.")
    if wanted == 0:
        output.token_map = None
        output.attach(base_output)
    else:
        output.attach(base_output, torch.arange(wanted) if own is None else own[:wanted])
    return [f"drafts from {output.vocab_size} tokens, {have} without draft_vocab"]


def fastest_dtype(heads: Heads) -> torch.dtype:
    """bfloat16 for float32 heads on a CPU that multiplies it faster (measured for a few milliseconds), else theirs."""
    weight = heads.output.weight
    assert weight is not None
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.numel() < WORTH_IT:
        return weight.dtype
    matrix = weight if weight.dim() == 2 else weight[0]
    half = matrix.bfloat16()
    x = torch.ones(2, matrix.shape[1])
    times: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    with torch.inference_mode():
        for _ in range(6):  # in turn, so that a busy neighbour slows both
            for one in (matrix, half):
                started = time.perf_counter()
                F.linear(x.to(one.dtype), one)
                times[one.dtype].append(time.perf_counter() - started)
    full, small = (statistics.median(each[1:]) for each in times.values())
    return torch.bfloat16 if small < GAIN * full else torch.float32

"""Prompts cut into blocks, so that a prefill pass on a GPU has the form of a decode step.

A block is a chain of 16 new tokens after `start` tokens of its slot. One pass may hold several blocks of one prompt,
since every layer writes the keys of all blocks before any block reads them. Nothing is padded to the longest prompt,
one captured graph serves all passes of a size, and the attention kernel of trees serves them too.

    slot 3: tokens 5 … 20 (5 are cached)     block 0: slot 3, start 5
    slot 1: tokens 0 … 19                    block 1: slot 1, start 0      block 2: slot 1, start 16, 4 tokens of 16
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from .view import View, ancestor_bits

BLOCK = 16
MIN_BLOCKS = 8
FEW = 8  # prompts of a pass that drafts for the largest tree; with more, all wait for drafts that few of them use


class Run(NamedTuple):
    """Tokens of one prompt to write from column `start` on; `whole`: they complete the prompt."""

    slot: int
    start: int
    tokens: Sequence[int]
    whole: bool


class Packed(NamedTuple):
    """The numbers of a pass of P blocks and R rows (prompts), views of one flat int64 tensor.

    tokens (P, 16) · slots, starts (P), start -1: an empty block · last (R): place of a row's last token among the P·16
    · rows (R): its slot · lengths (R): tokens in the cache after the pass, without the root; -1: an empty row · whole
    (R) 0 or 1
    """

    flat: torch.Tensor
    tokens: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor
    last: torch.Tensor
    rows: torch.Tensor
    lengths: torch.Tensor
    whole: torch.Tensor


def views(flat: torch.Tensor, blocks: int, rows: int) -> Packed:
    sizes = [blocks * BLOCK, blocks, blocks, rows, rows, rows, rows]
    tokens, *rest = flat.split(sizes)
    return Packed(flat, tokens.view(blocks, BLOCK), *rest)


def rows_for(prompts: int, most: int) -> int:
    """Rows of a pass for `prompts` prompts, `most` at most: one of two numbers, since each needs captured passes."""
    return min(FEW, most) if prompts <= FEW else most


def flat_size(blocks: int, rows: int) -> int:
    return blocks * (BLOCK + 2) + 4 * rows


def pack(runs: Sequence[Run], rows: int, num_slots: int, least: int = MIN_BLOCKS) -> Packed:
    """Put at most `rows` runs, on the host, into blocks: a power of two of them, `least` or more. Each empty row names
    another free slot, and does not change it."""
    counts = [-(-len(run.tokens) // BLOCK) for run in runs]
    blocks = max(least, 1 << max(0, sum(counts) - 1).bit_length())
    packed = views(torch.zeros(flat_size(blocks, rows), dtype=torch.int64), blocks, rows)
    # through NumPy, since its slices are cheaper than torch's
    tokens, slots, starts, last, named, lengths, whole = (part.numpy() for part in packed[1:])
    starts.fill(-1)
    lengths.fill(-1)
    flat_tokens, first = tokens.reshape(-1), 0
    for row, (run, count) in enumerate(zip(runs, counts, strict=True)):
        begin, end = first * BLOCK, first * BLOCK + len(run.tokens)
        flat_tokens[begin:end] = run.tokens
        slots[first : first + count] = run.slot
        starts[first : first + count] = np.arange(run.start, run.start + BLOCK * count, BLOCK)
        last[row] = end - 1
        lengths[row] = run.start + len(run.tokens) - run.whole  # the root of the first walk is not in the cache
        whole[row] = run.whole
        first += count
    used = [run.slot for run in runs]
    free = sorted(set(range(num_slots)).difference(used))
    named[:] = used + free[: rows - len(used)]
    return packed


def block_view(packed: Packed, columns: int, host_slots: list[int], host_length: list[int], width: int) -> View:
    """columns: of a slot; empty blocks write after its context · host_slots, host_length (P), width: see View"""
    steps = torch.arange(BLOCK, device=packed.flat.device)
    start = packed.starts.clamp(min=0)
    at = torch.where(packed.starts[:, None] < 0, columns - BLOCK, packed.starts[:, None]) + steps
    chain = (steps[:, None] >= steps).expand(len(start), -1, -1)
    positions = start[:, None] + steps
    bits = ancestor_bits(chain)
    return View(packed.slots, start, host_slots, host_length, positions, at, bits, width, packed=True)

"""Prompt lookup: draft what followed the last tokens when they stood in the sequence before (Saxena, "Prompt lookup
decoding").

Needs no training and no host: the tokens of a sequence lie in its slot's row on the device.
"""

from __future__ import annotations

import torch

MAX_NGRAM, MIN_NGRAM = 4, 2


def lookup(history: torch.Tensor, length: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The continuation of the longest n-gram (4 down to 2 tokens) that ended here before; the latest one among equals.

    history (B, C) token ids, valid up to and with column `length` (the pending token) · length (B) → (B, num_tokens),
    -1 unused

    Example: history 5 6 7 8 5 6 with the last 6 pending (length 5), 3 tokens → 7 8 5.
    """
    rows, columns = history.shape
    column = torch.arange(columns, device=history.device)
    earlier = column < length[:, None]
    run = torch.zeros(rows, columns, dtype=torch.int64, device=history.device)
    matching = earlier.clone()
    for back in range(MAX_NGRAM):
        wanted = history.gather(1, (length - back).clamp(min=0)[:, None])
        shifted = torch.roll(history, back, dims=1)
        matching &= (shifted == wanted) & (column >= back) & (length[:, None] >= back)
        run += matching
    score = torch.where(run >= MIN_NGRAM, run * columns + column, -1)
    best, at = score.max(dim=1)
    source = at[:, None] + 1 + torch.arange(num_tokens, device=history.device)
    found = history.gather(1, source.clamp(max=columns - 1))
    return torch.where((best >= 0)[:, None] & (source <= length[:, None]), found, -1)

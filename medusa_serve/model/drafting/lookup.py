"""Prompt lookup: where the last tokens occurred earlier in the sequence, draft the tokens that followed (Saxena,
"Prompt lookup decoding").

It needs no training and no host: the tokens of a sequence are in its slot's row on the device.
"""

from __future__ import annotations

import torch

MAX_NGRAM, MIN_NGRAM = 4, 2


def lookup(history: torch.Tensor, length: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The tokens after the longest earlier match of the last 4, 3 or 2 tokens; the latest match among equals.

    history (B, C) token ids, valid up to the pending token in column `length` · length (B) → (B, num_tokens),
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

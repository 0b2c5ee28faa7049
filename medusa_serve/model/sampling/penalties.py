"""The changes that a request makes to the model's logits before it picks: logit_bias, then the repetition penalty
(Keskar et al., "CTRL", 1909.05858; transformers' processor), then OpenAI's presence and frequency penalties.

They depend on the tokens so far, so they are evaluated along the walked path: a token that this step emits counts for
the next one, as in plain decoding. No counts are kept between steps; each step counts the slot's history.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Penalties(NamedTuple):
    """For B rows. `history` holds their tokens in columns 0 … `length`; the first `num_prompt` are the prompt."""

    repetition: torch.Tensor  # (B) float32; 1 is off. For tokens of prompt and completion
    presence: torch.Tensor  # (B) float32; 0 is off. For completion tokens
    frequency: torch.Tensor  # (B) float32; 0 is off. For completion tokens, times their count
    bias_ids: torch.Tensor  # (B, M) int64
    bias: torch.Tensor  # (B, M) float32; 0 where there is none
    history: torch.Tensor  # (B, C) int64
    length: torch.Tensor  # (B)
    num_prompt: torch.Tensor  # (B)


class Tally:
    """The counts of one walk: (B, V) each, made once per step and updated along the path."""

    def __init__(self, penalties: Penalties, vocab_size: int) -> None:
        self._penalties = penalties
        column = torch.arange(penalties.history.shape[1], device=penalties.history.device)
        known = column <= penalties.length[:, None]
        own = known & (column >= penalties.num_prompt[:, None])
        self._all = _sum_by_token(penalties.history, known.float(), vocab_size)
        self._own = _sum_by_token(penalties.history, own.float(), vocab_size)
        self._bias = _sum_by_token(penalties.bias_ids, penalties.bias, vocab_size)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """logits (B, V) with biases and penalties, in at least float32, as transformers computes them."""
        x = logits.to(torch.promote_types(logits.dtype, torch.float32)) + self._bias
        repetition = self._penalties.repetition[:, None]
        x = torch.where(self._all > 0, torch.where(x < 0, x * repetition, x / repetition), x)
        x = x - self._penalties.frequency[:, None] * self._own
        return x - self._penalties.presence[:, None] * (self._own > 0)

    def count(self, token: torch.Tensor) -> None:
        """Count the emitted token (B). Ended rows may count on, since they pick nothing more."""
        one = torch.ones(len(token), 1, dtype=torch.float32, device=token.device)
        self._all.scatter_add_(1, token[:, None], one)
        self._own.scatter_add_(1, token[:, None], one)


def _sum_by_token(tokens: torch.Tensor, values: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """tokens (B, M), values (B, M) float32 → (B, V), exact for counts. Ids outside the logits are left out."""
    values = torch.where(tokens < vocab_size, values, 0.0)
    sums = torch.zeros(len(tokens), vocab_size, dtype=torch.float32, device=tokens.device)
    return sums.scatter_add_(1, tokens.clamp(max=vocab_size - 1), values)

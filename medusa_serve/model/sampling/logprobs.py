"""Log-probabilities of emitted tokens: the model's own, before bias, penalties and temperature (vLLM's default).

They leave the device among the integer results of a step, floats as their bits: one transfer per step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...types import LEAST_LOGPROB, MAX_LOGPROBS, TokenLogprob
from ..forward.transfer import bits_of, from_bits

NUM_TOLD = 1 + 2 * MAX_LOGPROBS  # numbers for each emitted token


def logprobs_of(logits: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
    """The log-probability of the picked token, and the 5 likeliest ids with theirs: (B, NUM_TOLD) int64, floats as
    bits. logits (B, V) the model's own · picked (B)"""
    logits = logits.float()
    top = logits.topk(MAX_LOGPROBS, dim=-1)
    values = torch.cat([logits.gather(1, picked[:, None]), top.values], dim=1) - logits.logsumexp(dim=-1, keepdim=True)
    bits = bits_of(values.clamp(min=LEAST_LOGPROB))
    return torch.cat([bits[:, :1], top.indices, bits[:, 1:]], dim=1)


def read_logprobs(facts: Sequence[int], count: int, num_top: int) -> tuple[TokenLogprob, ...]:
    """The log-probabilities of the first `count` tokens, with `num_top` of the likeliest. facts: NUM_TOLD per token"""
    out = []
    for at in range(0, count * NUM_TOLD, NUM_TOLD):
        chosen, *pairs = facts[at : at + NUM_TOLD]
        top = zip(pairs[:num_top], pairs[MAX_LOGPROBS : MAX_LOGPROBS + num_top], strict=True)
        out.append(TokenLogprob(from_bits(chosen), tuple((token, from_bits(bits)) for token, bits in top)))
    return tuple(out)

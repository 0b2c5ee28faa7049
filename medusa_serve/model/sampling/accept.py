"""Accept by walking: at each depth the request picks its own next token, and the walk goes on where a node holds it.

The emitted tokens never look at the tree: each is drawn from the model's distribution after the tokens emitted before
it. The tree only decides how many of them one pass yields. That is the whole proof of exactness (token matching; for
deterministic drafts no lossless rule accepts more).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..drafting.tree import Draft
from ..forward.attention import has_numba
from ..gpu import attention as splitk
from ..gpu.pick import pick_nodes
from .filters import Sampling, pick
from .logprobs import logprobs_of
from .penalties import Tally


class Limits(NamedTuple):
    """Where the walk of B rows must stop: total (B) tokens of prompt and completion, eos (B, E) ids (-1 unused)."""

    length: torch.Tensor  # (B) tokens in the KV cache; the pending token is not among them
    total: torch.Tensor
    eos: torch.Tensor


class Walk(NamedTuple):
    """tokens (B, D+1) emitted, -1 behind the end · nodes (B, D+1) the path, the root first · num_emitted (B) tokens
    finished (B) EOS or the limit was met · finite (B) False: the row's logits were not usable and nothing counts
    logprobs (B, D+1, NUM_TOLD) int64, where asked for: as of `logprobs_of`"""

    tokens: torch.Tensor
    nodes: torch.Tensor
    num_emitted: torch.Tensor
    finished: torch.Tensor
    finite: torch.Tensor
    logprobs: torch.Tensor | None = None


def accept(logits: torch.Tensor, draft: Draft, max_depth: int, sampling: Sampling, limits: Limits) -> Walk:
    """Walk the verified tree of each row. logits (B, N, V)

    Example (greedy), tree of Tree's docstring, length 7: node 1 holds 52, node 3 holds 9, argmax at the root is 52, at
    node 1 it is 9, at node 3 it is 30: tokens 52 9 30, nodes 0 1 3, num_emitted 3. Two draft tokens are accepted, 30 is
    the new pending token.
    """
    rows, num_nodes = draft.tokens.shape
    device = logits.device
    each = torch.arange(rows, device=device)
    alive = torch.zeros(rows, num_nodes, dtype=torch.bool, device=device)
    alive[:, 0] = True
    not_root = torch.arange(num_nodes, device=device) > 0
    active = torch.ones(rows, dtype=torch.bool, device=device)
    finished, finite = torch.zeros_like(active), torch.ones_like(active)
    every = None
    if device.type == "cuda" and sampling.penalties is None and (not sampling.sampled or splitk.available(device)):
        every = pick_all(logits, sampling, limits.length[:, None] + 1 + draft.depths)  # in one pass
    tally = None if sampling.penalties is None else Tally(sampling.penalties, logits.shape[-1])
    tokens, nodes, logprobs = [], [], []
    for depth in range(max_depth + 1):
        node = alive.to(torch.uint8).argmax(dim=1)  # the lowest alive node; heads and lookup may hold the same token
        position = limits.length + 1 + depth
        if every is None:
            here = logits[each, node]
            picked, usable = pick(here if tally is None else tally.apply(here), sampling, position)
        else:
            picked, usable = every[0][each, node], every[1][each, node].isfinite()
        finite &= usable | ~active
        tokens.append(torch.where(active, picked, -1))
        nodes.append(node)
        if tally is not None:
            tally.count(picked)
        if sampling.logprobs:
            logprobs.append(logprobs_of(logits[each, node], picked))
        stop = (limits.eos == picked[:, None]).any(dim=1) | (position + 1 >= limits.total)
        finished |= active & stop
        alive = alive.gather(1, draft.parents) & (draft.tokens == picked[:, None]) & not_root
        active = active & ~stop & alive.any(dim=1) & finite
        if device.type != "cuda" and not bool(active.any()):
            break  # asking costs nothing on a CPU; on a GPU every depth runs
    emitted = torch.stack(tokens, dim=1)
    told = torch.stack(logprobs, dim=1) if logprobs else None
    return Walk(emitted, torch.stack(nodes, dim=1), (emitted >= 0).sum(dim=1), finished, finite, told)


def pick_all(logits: torch.Tensor, sampling: Sampling, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What every node picks: (token, its largest logit), (B, N) both. position (B, N): of that token. Sampled on a GPU
    alone"""
    if sampling.sampled:
        return pick_nodes(logits, sampling, position)
    if logits.device.type == "cpu" and has_numba():
        from ..cpu.search import fits, largest

        if fits(logits):
            return largest(logits)
    best = logits.max(dim=-1)
    return best.indices, best.values


def ended(pending: torch.Tensor, limits: Limits) -> torch.Tensor:
    """(B): rows whose pending token was the last one: EOS, or the limit is met. They must not go on."""
    return (limits.eos == pending[:, None]).any(dim=1) | (limits.length + 1 >= limits.total)

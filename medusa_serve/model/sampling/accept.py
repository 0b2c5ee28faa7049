"""Accept by walking: at each depth the request picks its own next token, and the walk goes on if a node holds it.

The emitted tokens do not depend on the tree: each is drawn from the model's distribution after the tokens emitted
before it. The tree only decides how many tokens one pass yields. This alone proves exactness (token matching; for
deterministic drafts no lossless rule accepts more).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .filters import Sampling, pick
from .logprobs import logprobs_of
from .penalties import Tally


class Limits(NamedTuple):
    """Where the walk of B rows must stop: total (B) tokens of prompt and completion; eos (B, E) ids, -1 unused."""

    length: torch.Tensor  # (B) tokens in the KV cache; the pending token is not among them
    total: torch.Tensor
    eos: torch.Tensor


class Walk(NamedTuple):
    """tokens (B, D+1) emitted, -1 after the end · nodes (B, D+1) the path, the root first · num_emitted (B) tokens
    finished (B) EOS or the limit was met · finite (B) False: the row's logits were not usable, drop its tokens
    logprobs (B, D+1, NUM_TOLD) int64, if asked for: see `logprobs_of`"""

    tokens: torch.Tensor
    nodes: torch.Tensor
    num_emitted: torch.Tensor
    finished: torch.Tensor
    finite: torch.Tensor
    logprobs: torch.Tensor | None = None


Pick = Callable[[torch.Tensor, Sampling, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # see filters.pick


def accept(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    max_depth: int,
    sampling: Sampling,
    limits: Limits,
    *,
    pick: Pick = pick,
    every: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Walk:
    """Walk the verified tree of each row, depth by depth. logits (B, N, V) · tokens, parents (B, N) of the tree

    pick: chooses the next token of each row · every: each node's pick and largest logit, (B, N) both, if all nodes have
    picked already

    Example (greedy), tree of Tree's docstring, length 7: node 1 holds 52, node 3 holds 9, argmax at the root is 52, at
    node 1 it is 9, at node 3 it is 30: tokens 52 9 30, nodes 0 1 3, num_emitted 3. Two draft tokens are accepted, 30 is
    the new pending token.
    """
    rows, num_nodes = tokens.shape
    device = logits.device
    each = torch.arange(rows, device=device)
    alive = torch.zeros(rows, num_nodes, dtype=torch.bool, device=device)
    alive[:, 0] = True
    not_root = torch.arange(num_nodes, device=device) > 0
    active = torch.ones(rows, dtype=torch.bool, device=device)
    finished, finite = torch.zeros_like(active), torch.ones_like(active)
    tally = None if sampling.penalties is None else Tally(sampling.penalties, logits.shape[-1])
    emitted, nodes, logprobs = [], [], []
    for depth in range(max_depth + 1):
        node = alive.to(torch.uint8).argmax(dim=1)  # the lowest alive node; heads and lookup may hold the same token
        position = limits.length + 1 + depth
        if every is None:
            here = logits[each, node]
            picked, usable = pick(here if tally is None else tally.apply(here), sampling, position)
        else:
            picked, usable = every[0][each, node], every[1][each, node].isfinite()
        finite &= usable | ~active
        emitted.append(torch.where(active, picked, -1))
        nodes.append(node)
        if tally is not None:
            tally.count(picked)
        if sampling.logprobs:
            logprobs.append(logprobs_of(logits[each, node], picked))
        stop = (limits.eos == picked[:, None]).any(dim=1) | (position + 1 >= limits.total)
        finished |= active & stop
        alive = alive.gather(1, parents) & (tokens == picked[:, None]) & not_root
        active = active & ~stop & alive.any(dim=1) & finite
        if device.type != "cuda" and not bool(active.any()):
            break  # the test is free on a CPU; on a GPU it would wait, so every depth runs
    made = torch.stack(emitted, dim=1)
    asked = torch.stack(logprobs, dim=1) if logprobs else None
    return Walk(made, torch.stack(nodes, dim=1), (made >= 0).sum(dim=1), finished, finite, asked)


def ended(pending: torch.Tensor, limits: Limits) -> torch.Tensor:
    """(B): rows with a pending token that was the last one: EOS, or the limit is met. They must not go on."""
    return (limits.eos == pending[:, None]).any(dim=1) | (limits.length + 1 >= limits.total)

"""What a step must know of each sequence, in per-slot tables on the device. Static shapes: the step can be captured as
it is.

Invariant: everything that survives a step on the device is indexed by slot; the host never supplies draft tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..types import SamplingParams
from .accept import Limits, Walk
from .filters import Sampling
from .transfer import to_device
from .tree import HeadNodes


class Admission(NamedTuple):
    """A new sequence of a slot; `num_cached` tokens of its prompt are in the KV cache already."""

    slot: int
    prompt: Sequence[int]
    params: SamplingParams
    total: int
    num_cached: int


class SlotTables:
    """S slots of C columns. The pending token of a slot stands in history[slot, length[slot]]."""

    def __init__(
        self,
        slots: int,
        columns: int,
        eos_ids: Sequence[int],
        num_nodes: int,
        num_lookup: int,
        device: torch.device,
    ) -> None:
        def ints(*shape: int, fill: int = 0) -> torch.Tensor:
            return torch.full(shape, fill, dtype=torch.int64, device=device)

        self.length, self.total, self.node_limit = ints(slots), ints(slots), ints(slots)
        self.history = ints(slots, columns)
        self.eos = ints(slots, max(1, len(eos_ids)), fill=-1)
        self.heads = HeadNodes(ints(slots, num_nodes, fill=-1), ints(slots, num_nodes), ints(slots, num_nodes))
        self.lookup = ints(slots, num_lookup, fill=-1)
        self.top_k, self.seed = ints(slots), ints(slots)
        self.temperature, self.top_p, self.min_p = (torch.zeros(slots, device=device) for _ in range(3))
        self._eos_ids = tuple(eos_ids)
        self._params: list[SamplingParams | None] = [None] * slots

    def note(self, slot: int, params: SamplingParams) -> None:
        """The host's part of an admission: what kind of step the slot asks for."""
        self._params[slot] = params

    def admit(self, rows: Sequence[Admission]) -> None:
        """Fill the slots' rows for new sequences: three transfers, however many they are."""
        device, longest = self.history.device, max(len(row.prompt) for row in rows)
        history = torch.zeros(len(rows), longest, dtype=torch.int64)
        whole, real = [], []
        for number, (slot, prompt, params, total, num_cached) in enumerate(rows):
            history[number, : len(prompt)] = torch.tensor(prompt)
            limit = torch.iinfo(torch.int64).max if params.speculation else 1
            eos = [-1 if params.ignore_eos else token for token in self._eos_ids or (-1,)]
            whole.append([slot, num_cached, total, limit, params.top_k, params.seed or 0, *eos])
            real.append([params.temperature, params.top_p, params.min_p])
        columns = to_device(torch.tensor(whole, dtype=torch.int64), device)
        slots = columns[:, 0]
        for number, table in enumerate((self.length, self.total, self.node_limit, self.top_k, self.seed), 1):
            table[slots] = columns[:, number]
        self.eos[slots] = columns[:, 6:]
        reals = to_device(torch.tensor(real, dtype=torch.float32), device)
        for number, table in enumerate((self.temperature, self.top_p, self.min_p)):
            table[slots] = reals[:, number]
        self.history[slots, :longest] = to_device(history, device)
        self.heads.tokens[slots] = -1
        self.lookup[slots] = -1

    def flags(self, host_slots: Sequence[int]) -> tuple[bool, bool]:
        """Whether any of these rows samples, and whether any of them filters."""
        hot = [p for slot in host_slots if (p := self._params[slot]) is not None and p.temperature > 0]
        return bool(hot), any(p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0 for p in hot)

    def sampling(self, slots: torch.Tensor, sampled: bool, filtered: bool) -> Sampling:
        """The rows' sampling parameters, (B) each."""
        return Sampling(
            self.temperature[slots],
            self.top_k[slots],
            self.top_p[slots],
            self.min_p[slots],
            self.seed[slots],
            sampled,
            filtered,
        )

    def limits(self, slots: torch.Tensor) -> Limits:
        return Limits(self.length[slots], self.total[slots], self.eos[slots])

    def head_nodes(self, slots: torch.Tensor) -> HeadNodes:
        return HeadNodes(*(table[slots] for table in self.heads))

    def keep_draft(
        self, slots: torch.Tensor, active: torch.Tensor, heads: HeadNodes | None, lookup: torch.Tensor
    ) -> None:
        """The next step's draft of the active rows; behind the heads' nodes there are none."""
        pairs = [(self.lookup, lookup, -1)]
        if heads is not None:
            pairs += list(zip(self.heads, heads, (-1, 0, 0), strict=True))
        for table, rows, nothing in pairs:
            rows = torch.nn.functional.pad(rows, (0, table.shape[1] - rows.shape[1]), value=nothing)
            table[slots] = torch.where(active[:, None], rows, table[slots])

    def pending(self, slots: torch.Tensor) -> torch.Tensor:
        """(B): emitted, not yet in the KV cache."""
        return self.history[slots, self.length[slots]]

    def advance(self, slots: torch.Tensor, active: torch.Tensor, walk: Walk) -> torch.Tensor:
        """Append what the walk emitted; → (B) tokens kept. Inactive rows and bad logits keep what they had."""
        count = torch.where(active & walk.finite, walk.num_emitted, 0)
        length = self.length[slots]
        steps = torch.arange(walk.tokens.shape[1], device=slots.device)
        columns = (length[:, None] + 1 + steps).clamp(max=self.history.shape[1] - 1)
        old = self.history[slots[:, None], columns]
        self.history[slots[:, None], columns] = torch.where(steps < count[:, None], walk.tokens, old)
        self.length[slots] = length + count
        return count

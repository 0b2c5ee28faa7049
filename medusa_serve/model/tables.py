"""What a step must know about each sequence, in tables on the device, one row per slot. Their shapes never change, so
a step can be captured.

Invariant: everything that survives a step on the device is indexed by slot; the host never supplies draft tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..types import MAX_BIASES, SamplingParams
from .drafting.tree import HeadNodes
from .forward.transfer import to_device
from .sampling.accept import Limits, Walk
from .sampling.filters import Sampling
from .sampling.penalties import Penalties

FACTS = 5  # numbers in a row of results before the tokens and their nodes; see step.py


class Admission(NamedTuple):
    """A new sequence for a slot; the KV cache already holds `num_cached` tokens of its prompt."""

    slot: int
    prompt: Sequence[int]
    params: SamplingParams
    total: int
    num_cached: int


class Needs(NamedTuple):
    """What some row of a pass asks for beyond the likeliest token. The host knows it, and a pass computes only that."""

    sampled: bool = False
    filtered: bool = False
    penalised: bool = False
    logprobs: bool = False


PLAIN = Needs()


class Opened(NamedTuple):
    """The trees of B rows before the pass.

    tokens, parents, positions, columns (B, N) · bits (B, N): the node and its ancestors · length (B) · active (B)
    bool · drafted (B): number of nodes that are not empty, without the root
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    positions: torch.Tensor
    columns: torch.Tensor
    bits: torch.Tensor
    length: torch.Tensor
    active: torch.Tensor
    drafted: torch.Tensor


class Closed(NamedTuple):
    """After the walk. facts (B, 5 + 2 (D + 1)): the results that Step returns · nodes (B, D + 1) the path, a view of
    facts · last (B) the last accepted node · length, pending (B): the tables' new values"""

    facts: torch.Tensor
    nodes: torch.Tensor
    last: torch.Tensor
    length: torch.Tensor
    pending: torch.Tensor


class SlotTables:
    """S slots of C columns. history[slot, length[slot]] is the pending token of a slot."""

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

        def reals(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self.length, self.total, self.node_limit = ints(slots), ints(slots), ints(slots)
        self.history = ints(slots, columns)
        self.eos = ints(slots, max(1, len(eos_ids)), fill=-1)
        self.heads = HeadNodes(ints(slots, num_nodes, fill=-1), ints(slots, num_nodes), ints(slots, num_nodes))
        self.lookup = ints(slots, num_lookup, fill=-1)
        self.top_k, self.seed, self.num_prompt = ints(slots), ints(slots), ints(slots)
        self.temperature, self.top_p, self.min_p = (reals(slots) for _ in range(3))
        self.repetition, self.presence, self.frequency = (reals(slots) for _ in range(3))
        self.bias_ids, self.bias = ints(slots, MAX_BIASES), reals(slots, MAX_BIASES)
        self._cold = reals(slots)
        self._biased: set[int] = set()  # slots with a row of `bias` that is not all zeros
        self._eos_ids = tuple(eos_ids)
        self._needs = [PLAIN] * slots
        self._num_logprobs: list[int | None] = [None] * slots

    def note(self, slot: int, params: SamplingParams) -> None:
        """The host's part of an admission: the kind of step that the slot needs."""
        hot = params.temperature > 0
        filtered = hot and (params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0)
        self._needs[slot] = Needs(hot, filtered, params.penalised, params.logprobs is not None)
        self._num_logprobs[slot] = params.logprobs

    def admit(self, rows: Sequence[Admission]) -> None:
        """Fill the slots' rows for new sequences, in three transfers for any number of them, five with biases."""
        device, longest = self.history.device, max(len(row.prompt) for row in rows)
        history = torch.zeros(len(rows), longest, dtype=torch.int64)
        integers, real = [], []
        for number, (slot, prompt, params, total, num_cached) in enumerate(rows):
            history[number, : len(prompt)] = torch.tensor(prompt)
            limit = torch.iinfo(torch.int64).max if params.speculation else 1
            eos = [-1 if params.ignore_eos else token for token in self._eos_ids or (-1,)]
            integers.append([slot, num_cached, total, limit, params.top_k, params.seed or 0, len(prompt), *eos])
            penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
            real.append([params.temperature, params.top_p, params.min_p, *penalties])
        columns = to_device(torch.tensor(integers, dtype=torch.int64), device)
        slots = columns[:, 0]
        tables = (self.length, self.total, self.node_limit, self.top_k, self.seed, self.num_prompt)
        for number, table in enumerate(tables, 1):
            table[slots] = columns[:, number]
        self.eos[slots] = columns[:, 7:]
        reals = to_device(torch.tensor(real, dtype=torch.float32), device)
        choice = (self.temperature, self.top_p, self.min_p, self.repetition, self.presence, self.frequency)
        for number, table in enumerate(choice):
            table[slots] = reals[:, number]
        self._admit_biases(rows, slots)
        self.history[slots, :longest] = to_device(history, device)
        self.heads.tokens[slots] = -1
        self.lookup[slots] = -1

    def _admit_biases(self, rows: Sequence[Admission], slots: torch.Tensor) -> None:
        admitted, biased = {row.slot for row in rows}, {row.slot for row in rows if row.params.logit_bias}
        if not biased and self._biased.isdisjoint(admitted):
            return
        self._biased = self._biased - admitted | biased
        ids, values = (
            torch.zeros(len(rows), MAX_BIASES, dtype=torch.int64),
            torch.zeros(len(rows), MAX_BIASES, dtype=torch.float32),
        )
        for number, row in enumerate(rows):
            for place, (token, value) in enumerate(row.params.logit_bias):
                ids[number, place], values[number, place] = token, value
        self.bias_ids[slots] = to_device(ids, slots.device)
        self.bias[slots] = to_device(values, slots.device)

    def needs(self, host_slots: Sequence[int]) -> Needs:
        """What at least one of these rows asks for."""
        kinds = {self._needs[slot] for slot in host_slots}
        return kinds.pop() if len(kinds) == 1 else Needs(*(any(column) for column in zip(*kinds, strict=True)))

    def num_logprobs(self, slot: int) -> int | None:
        """`logprobs` of the SamplingParams of the slot's sequence."""
        return self._num_logprobs[slot]

    def sampling(self, slots: torch.Tensor, needs: Needs) -> Sampling:
        """The rows' sampling parameters, (B) each."""
        if needs == PLAIN:
            return self._greedy(len(slots))
        return Sampling(
            self.temperature[slots],
            self.top_k[slots],
            self.top_p[slots],
            self.min_p[slots],
            self.seed[slots],
            needs.sampled,
            needs.filtered,
            self._penalties(slots) if needs.penalised else None,
            needs.logprobs,
        )

    def _greedy(self, rows: int) -> Sampling:
        """For `rows` rows that ask for nothing; only the temperature is ever read."""
        top_k, top_p, min_p, seed = (table[:rows] for table in (self.top_k, self.top_p, self.min_p, self.seed))
        return Sampling(self._cold[:rows], top_k, top_p, min_p, seed, False, False)

    def _penalties(self, slots: torch.Tensor) -> Penalties:
        tables = (self.repetition, self.presence, self.frequency, self.bias_ids, self.bias)
        return Penalties(*(table[slots] for table in (*tables, self.history, self.length, self.num_prompt)))

    def limits(self, slots: torch.Tensor) -> Limits:
        return Limits(self.length[slots], self.total[slots], self.eos[slots])

    def head_nodes(self, slots: torch.Tensor) -> HeadNodes:
        return HeadNodes(*(table[slots] for table in self.heads))

    def keep_heads(self, slots: torch.Tensor, active: torch.Tensor, heads: HeadNodes) -> None:
        """Store the active rows' nodes for the next step; the columns after them become empty."""
        for table, rows, nothing in zip(self.heads, heads, (-1, 0, 0), strict=True):
            rows = torch.nn.functional.pad(rows, (0, table.shape[1] - rows.shape[1]), value=nothing)
            table[slots] = torch.where(active[:, None], rows, table[slots])

    def pending(self, slots: torch.Tensor) -> torch.Tensor:
        """(B): emitted, not yet in the KV cache."""
        return self.history[slots, self.length[slots]]

    def advance(self, slots: torch.Tensor, active: torch.Tensor, walk: Walk) -> torch.Tensor:
        """Append the emitted tokens; → (B) tokens kept. Inactive rows and rows with bad logits stay as they were."""
        count = torch.where(active & walk.finite, walk.num_emitted, 0)
        length = self.length[slots]
        steps = torch.arange(walk.tokens.shape[1], device=slots.device)
        columns = (length[:, None] + 1 + steps).clamp(max=self.history.shape[1] - 1)
        old = self.history[slots[:, None], columns]
        self.history[slots[:, None], columns] = torch.where(steps < count[:, None], walk.tokens, old)
        self.length[slots] = length + count
        return count

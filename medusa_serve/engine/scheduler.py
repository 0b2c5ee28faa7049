"""Decides which sequences run: the waiting queue, the slot table, the plan of the next turn. No tensors, no threads."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from ..types import PrefillChunk, Runner, StepOutput
from .node_budget import NodeBudget
from .sequence import Sequence, State

MIN_REUSE = 16  # a shorter common prefix is not worth giving up a slot's history
FIRST_CHUNK = 16  # prompt tokens of a chunk between decode steps while its cost is unknown
MAX_WAIT_S = 0.1  # a decoding sequence may wait this long for a prefill chunk, or MAX_WAIT_STEPS plain steps if longer
MAX_WAIT_STEPS = 3
WAIT_SHARE = 0.8  # the share of that wait that is planned; the rest is for errors of the estimate
RECENT = 8  # prefill passes that the cost estimate uses: few, since prompts and other load change
GROWTH = 4  # a chunk has at most this many times the tokens of the largest measured one
NOTED = 8  # a step notes the gains of this many rows on average: noting more costs the host more than it helps
ADMIT_SHARE = 8  # a packed prefill pass waits until 1/8 as many sequences are new as are decoding …
ADMIT_TURNS = 8  # … but at most this many turns


@dataclass(frozen=True, slots=True)
class Plan:
    """One turn: a pass of prefill chunks, then a decode step of the slots `decode` with trees of `nodes` nodes."""

    prefill: tuple[PrefillChunk, ...] = ()
    decode: tuple[int, ...] = ()
    nodes: int = 1


@dataclass(frozen=True, slots=True)
class Resting:
    """The ids that a free slot still holds in its KV cache, and the key of their sequence. `order` grows with time."""

    ids: tuple[int, ...]
    key: str
    order: int


class Scheduler:
    """First come, first served.

    Every slot is free or has one sequence in `running` (slot → sequence, oldest first). A free slot may rest: its KV
    rows are kept for a prompt of the same key that begins with the same ids.
    """

    def __init__(self, runner: Runner, prefill_chunk: int) -> None:
        self._runner = runner
        self._prefill_chunk = prefill_chunk
        self._all = frozenset(range(runner.num_slots))
        self._free = set(self._all)
        self._resting: dict[int, Resting] = {}
        self._order = 0
        self._admitting: bool | None = None  # decided once a turn
        self._turns_waited = 0
        self._plain_steps: deque[float] = deque(maxlen=64)
        self._passes: deque[tuple[int, float]] = deque(maxlen=RECENT)  # prefill passes: prompt tokens, seconds
        self._budget: NodeBudget | None = None
        self._gains, self._largest = 0, 0  # number of steps with gains, and the largest tree of the last one
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}

    def add(self, seq: Sequence) -> None:
        """Put a sequence at the end of the queue."""
        self.waiting.append(seq)

    def admit(self) -> Sequence | None:
        """Give the first waiting sequence a slot, with `slot` and `num_reused` set; None when nothing can be admitted.

        The caller admits it to the runner.
        """
        if not self.waiting or not self._free:
            return None
        if self._admitting is None:
            self._admitting = self._worth_a_pass()
        if not self._admitting:
            return None
        runner = self._runner
        if self._budget is None and runner.step_ms:  # the runner may have timed its steps while the engine was idle
            known = runner.node_choices, runner.step_ms, runner.expected, runner.num_slots
            self._budget = NodeBudget(*known, shared=not runner.overlaps, step_rows=runner.step_rows)
        seq = self.waiting.popleft()
        slot, num_reused = self._choose_slot(seq)
        self._free.remove(slot)
        self._resting.pop(slot, None)
        self.running[slot] = seq
        seq.slot, seq.num_reused, seq.num_prefilled = slot, num_reused, num_reused
        seq.state = State.PREFILLING
        if self._budget is not None:
            self._budget.begin(slot)
        return seq

    def _worth_a_pass(self) -> bool:
        """Whether to admit sequences in this turn.

        A prefill pass costs a GPU the same for one prompt as for many, and all decoding sequences wait for it. Under
        full load, where some sequence ends at every step, new sequences therefore gather for a few turns."""
        ready = min(len(self.waiting), len(self._free))
        decoding = sum(seq.state is State.DECODING for seq in self.running.values())
        enough = min(self._runner.prefill_rows, decoding // ADMIT_SHARE)
        if ready < enough and self._turns_waited < ADMIT_TURNS:
            self._turns_waited += 1
            return False
        self._turns_waited = 0
        return True

    def _choose_slot(self, seq: Sequence) -> tuple[int, int]:
        """(slot, number of leading prompt ids that are in its KV cache)."""
        empty = self._free - self._resting.keys()
        prompt = seq.prompt_ids[:-1]  # the last prompt token must run: it gives the first logits
        best_slot, best = -1, MIN_REUSE - 1
        for slot, rest in self._resting.items() if self._runner.can_reuse else ():
            common = common_prefix(rest.ids, prompt) if rest.key == seq.key else 0
            # For a shared system prompt, do not give up another chat's long history while a slot is empty.
            if common > best and (not empty or 2 * common >= len(rest.ids)):
                best_slot, best = slot, common
        if best_slot >= 0:
            return best_slot, best
        if empty:
            return min(empty), 0
        return min(self._resting, key=lambda slot: self._resting[slot].order), 0

    def release(self, seq: Sequence, *, failed: bool = False) -> None:
        """Take a sequence out of the queue or its slot. The KV rows of a failed sequence are never reused."""
        seq.state = State.FINISHED
        if seq.slot is None:
            self.waiting.remove(seq)
            return
        del self.running[seq.slot]
        self._free.add(seq.slot)
        if not failed and len(seq.kv_ids) >= MIN_REUSE:
            self._order += 1
            self._resting[seq.slot] = Resting(seq.kv_ids, seq.key, self._order)

    def plan(self) -> Plan:
        """The plan of the next turn; empty when there is nothing to do."""
        self._admitting = None
        decoding = [slot for slot, seq in self.running.items() if seq.state is State.DECODING]
        prefill = self._prefill_chunks(self._chunk_size() if decoding else self._prefill_chunk)
        return Plan(prefill, tuple(sorted(decoding)), self._nodes(self.running[slot] for slot in decoding))

    def _prefill_chunks(self, size: int) -> tuple[PrefillChunk, ...]:
        """The next `size` prompt tokens, oldest sequence first, of at most as many sequences as one pass takes."""
        chunks: list[PrefillChunk] = []
        for slot, seq in self.running.items():
            if seq.state is not State.PREFILLING:
                continue
            if size <= 0 or len(chunks) == self._runner.prefill_rows:
                break
            chunks.append(PrefillChunk(slot, min(size, seq.num_to_prefill)))
            size -= chunks[-1].count
        return tuple(chunks)

    def _chunk_size(self) -> int:
        """Prompt tokens of a chunk while other sequences wait for it."""
        if not self._passes:
            return min(FIRST_CHUNK, self._prefill_chunk)
        plain = statistics.median(self._plain_steps) if self._plain_steps else 0.0
        budget = WAIT_SHARE * max(MAX_WAIT_S, MAX_WAIT_STEPS * plain)
        fixed, each = cost_of_prefill(self._passes)
        if fixed >= budget:  # the wait is unavoidable, and smaller chunks would only repeat it
            return self._prefill_chunk
        fits = int((budget - fixed) / each) if each else self._prefill_chunk
        return max(1, min(fits, GROWTH * max(count for count, _ in self._passes), self._prefill_chunk))

    def _nodes(self, decoding: Iterable[Sequence]) -> int:
        if self._budget is not None:
            rows = [(seq.id, seq.slot if seq.speculates else None) for seq in decoding]
            joining = min(len(self.running) + len(self.waiting), len(self._all)) - len(rows)
            return self._budget.choose(rows, joining) if rows else 1
        # with heads every step drafts, and the last step may not be read yet
        most = self._runner.node_choices[-1] - 1 if self._runner.has_heads else 0
        ready = [max(most, seq.draft_ready) for seq in decoding if seq.speculates]
        return choose_nodes(self._runner.node_choices, ready, self._runner.row_budget)

    def note_prefill(self, count: int, seconds: float) -> None:
        """A prefill pass over `count` prompt tokens took this long."""
        self._passes.append((count, seconds))

    def note_gains(self, rows: Seq[Sequence], outputs: Seq[StepOutput], trees: Seq[int]) -> None:
        """Note how many draft tokens each row of a decode step accepted from its tree.

        With many rows only every n-th step is noted, for all rows at once; a step with a larger or smaller tree than
        the last one (a probe) is always noted."""
        if self._budget is None:
            return
        every, largest = -(-len(rows) // NOTED), max(trees)
        due = self._gains % every == 0 or largest != self._largest
        self._gains, self._largest = self._gains + 1, largest
        if not due:
            return
        kept = [
            (seq.slot, out.held_by, nodes)
            for seq, out, nodes in zip(rows, outputs, trees, strict=True)
            if seq.speculates and seq.state is not State.FINISHED and out.token_ids
        ]
        if kept:
            self._budget.note(*zip(*kept, strict=True))

    def note_decode(self, rows: int, nodes: int, seconds: float, waited: float, *, no_prefill: bool = True) -> None:
        """A decode step of `rows` rows with trees of `nodes` took `seconds`, of which the host waited `waited`.

        no_prefill: no prefill pass was started or read since the last step"""
        if self._budget is not None:
            self._budget.note_time(rows, nodes, seconds, waited, no_prefill=no_prefill)
        if nodes == 1:
            self._plain_steps.append(seconds)

    def audit(self) -> None:
        """Raise RuntimeError unless free + used = all, every used slot has one owner, and only free slots rest."""
        used = set(self.running)
        owners = [seq for slot, seq in self.running.items() if seq.slot == slot and seq.state is not State.FINISHED]
        if self._free | used != self._all or self._free & used:
            raise RuntimeError(f"Slots leaked: free {sorted(self._free)}, used {sorted(used)} of {len(self._all)}.")
        if len(set(map(id, owners))) != len(used):
            raise RuntimeError(f"Slots {sorted(used)} do not have one owner each.")
        if not self._free.issuperset(self._resting):
            raise RuntimeError(f"Slots {sorted(self._resting)} rest, but only {sorted(self._free)} are free.")


def cost_of_prefill(passes: Seq[tuple[int, float]]) -> tuple[float, float]:
    """(seconds of any pass, seconds of each prompt token), neither below 0: the least-squares line through (tokens,
    seconds). When all passes have one size, the whole cost is put on the tokens."""
    counts, seconds = [count for count, _ in passes], [each for _, each in passes]
    count, second = statistics.fmean(counts), statistics.fmean(seconds)
    spread = sum((x - count) ** 2 for x in counts)
    slope = sum((x - count) * (y - second) for x, y in passes) / spread if spread else second / count
    slope = min(max(slope, 0.0), second / count)
    return second - slope * count, slope


def common_prefix(a: Seq[int], b: Seq[int]) -> int:
    """Number of leading ids that agree."""
    low, high = 0, min(len(a), len(b))
    if a[: min(MIN_REUSE, high)] != b[: min(MIN_REUSE, high)]:  # most pairs differ early; short agreement is no use
        return 0
    while low < high:  # a[:low] == b[:low]; slices compare at C speed
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def choose_nodes(choices: Seq[int], draft_ready: Seq[int], row_budget: int) -> int:
    """The N of a decode step: the smallest choice that holds every draft, within rows x N <= row_budget.

    draft_ready has one entry per row that speculates. Returns 1 (plain decoding) when there is nothing to verify. With
    one fixed tree (two choices) the user has chosen: row_budget is ignored.
    """
    want = max(draft_ready, default=0)
    if want == 0:
        return 1
    fits = [n for n in choices if len(choices) == 2 or n * len(draft_ready) <= row_budget]
    return next((n for n in fits if n - 1 >= want), max(fits, default=1))

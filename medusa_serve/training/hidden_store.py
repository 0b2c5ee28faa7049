"""The base's hidden states, computed once and kept on the device: every epoch of a training reads the same ones.

A sequence of n rows needs n + 1 states, from its prompt's last token on (see batches.py): row i reads state i, and its
teacher is state i + 1. The buffer holds the states of sequence after sequence. A sequence that does not fit passes
through the base at each step; its states are then in the buffer's first rows, so that a batch always reads from the
buffer. If a sequence fits but its states are not computed before training, they are kept once a step has needed them.
Nothing here waits for the device.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from torch import Tensor

from .batches import Batch, by_length, in_order, spread
from .shards import Answers
from .teacher import Teacher

PASS_TOKENS = {"cpu": 2048, "cuda": 65536}  # of a pass of the base, padding counted
WINDOW = 64  # passes whose sequences are sorted by length together
CPU_GIB = 2.0
SHARE = 0.8  # of the GPU memory that a step leaves free: the rest is for the allocator's fragments


class HiddenStore:
    """text (N): the tokens of all answers · buffer (rows, M·H): in the base's dtype, its first `spare` rows for states
    that are not kept · first (sequences): where a sequence's answer_len states begin, -1 if they are not kept"""

    def __init__(self, teacher: Teacher, answers: Answers) -> None:
        self.teacher, self.answers = teacher, answers
        self.pass_tokens = PASS_TOKENS[teacher.device.type]
        self.text = torch.from_numpy(answers.tokens.astype(np.int32)).to(teacher.device)
        self.first = np.full(len(answers), -1, np.int64)
        self.spare = self.end = 0  # end: of the states that are kept
        self.buffer = torch.empty(0)

    def reserve(self, batch_rows: int, kept: int = 0) -> None:
        """Make an empty buffer: for batches of `batch_rows` rows that are not kept, and for `kept` states."""
        self.first[:] = -1
        self.spare = max(2 * batch_rows, int(self.answers.answer_len.max()))  # n + 1 states a sequence, n >= 1
        self.end = self.spare
        self.buffer = torch.empty(0)  # free the old one first
        width = len(self.teacher.hidden_inputs) * self.teacher.hidden_size
        self.buffer = torch.empty(self.spare + kept, width, dtype=self.teacher.dtype, device=self.teacher.device)

    def choose(self, order: np.ndarray, budget: float) -> np.ndarray:
        """The first of these sequences, as many as fit into `budget` bytes."""
        states = np.cumsum(self.answers.answer_len[order])
        per_state = len(self.teacher.hidden_inputs) * self.teacher.hidden_size * self.teacher.dtype.itemsize
        return order[: int(np.searchsorted(states, budget / per_state, side="right"))]

    def keep(self, order: np.ndarray, batch_rows: int, seconds: float = math.inf) -> None:
        """Pass these sequences through the base, in this order, for at most `seconds`. Large passes over sequences of
        similar lengths take a fraction of the time that the same passes take in steps."""
        answers, deadline = self.answers, time.monotonic() + seconds
        self.reserve(batch_rows, int(answers.answer_len[order].sum()))
        size = max(1, int(WINDOW * self.pass_tokens / max(1.0, answers.length[order].mean()))) if len(order) else 1
        for start in range(0, len(order), size):
            for chosen in in_order(answers, by_length(answers, order[start : start + size]), self.pass_tokens):
                if time.monotonic() > deadline:
                    return
                self._keep(chosen)

    def load(self, numbers: np.ndarray) -> tuple[Batch, Tensor, Tensor]:
        """These sequences, perhaps in another order → their rows (R), what the heads read there (R, M·H), and the
        teacher: the last hidden state one position further (R, H)."""
        missing = self.first[numbers] < 0
        absent, numbers = by_length(self.answers, numbers[missing]), numbers[~missing]
        first, used = [self.first[numbers]], 0
        for chosen in in_order(self.answers, absent, self.pass_tokens):
            rows = int(self.answers.answer_len[chosen].sum())
            if self.end + rows <= len(self.buffer):
                first.append(self._keep(chosen))
            else:
                first.append(self._write(chosen, used))
                used += rows
        numbers = np.concatenate([numbers, absent])
        rows = self.answers.answer_len[numbers] - 1
        begin = self.answers.start[numbers] + self.answers.prompt_len[numbers] - 1
        counts, at, state = self._upload(rows, begin, np.concatenate(first))
        row, offset = spread(counts, int(rows.sum()))
        batch = Batch(self.text, at[row] + offset, offset, counts[row] - offset, numbers)
        index = state[row] + offset
        return batch, self.buffer[index], self.buffer[:, : self.teacher.hidden_size][index + 1]

    def try_pass(self, tokens: int, longest: int) -> None:
        """Run a pass of this size over sequences of this length, only to see whether there is memory for it."""
        ids = torch.zeros(max(1, tokens // longest), longest, dtype=torch.int64, device=self.teacher.device)
        self.teacher.hidden(ids)

    def _keep(self, chosen: np.ndarray) -> np.ndarray:
        """Append the states of these sequences to the store."""
        self.first[chosen] = self._write(chosen, self.end)
        self.end += int(self.answers.answer_len[chosen].sum())
        return self.first[chosen]

    def _write(self, chosen: np.ndarray, first: int) -> np.ndarray:
        """One pass of the base; its states go into the buffer from `first` on → where each sequence's begin (B)."""
        answers, width = self.answers, int(self.answers.length[chosen].max())
        counts = answers.answer_len[chosen]
        ends = np.cumsum(counts)
        begin, skip, states = self._upload(answers.start[chosen], answers.prompt_len[chosen] - 1, counts)
        # the next sequence's text pads this one: attention is causal, so it changes nothing
        index = (begin[:, None] + torch.arange(width, device=begin.device)).clamp(max=len(self.text) - 1)
        hidden, _ = self.teacher.hidden(self.text[index].long())
        row, offset = spread(states, int(ends[-1]))
        self.buffer[first : first + int(ends[-1])] = hidden[row * width + skip[row] + offset]
        return first + ends - counts

    def _upload(self, *columns: np.ndarray) -> Tensor:
        """Columns of B numbers → (columns, B) on the device, without waiting for it."""
        table = torch.from_numpy(np.stack(columns).astype(np.int64))
        if self.teacher.device.type == "cuda":
            table = table.pin_memory()
        return table.to(self.teacher.device, non_blocking=True)


def memory_to_spare(device: torch.device, step: int) -> float:
    """Bytes that hidden states may take, when a step needs `step` bytes while it runs."""
    if device.type != "cuda":
        return CPU_GIB * 2**30
    return SHARE * max(0, torch.cuda.mem_get_info(device)[0] - step)

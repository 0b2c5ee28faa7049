"""From answers to batches: which positions heads learn from, and what each depth must say there.

A sequence x_0 … x_{T-1} with an answer from x_p on gives n = T - p - 1 rows: one for each hidden state that the model
runner drafts from. Row i is the base's hidden state h_t at t = p - 1 + i:

    h_t has produced the pending token x_{t+1}      so the first row is at the prompt's last token, as after prefill
    depth d (from 0) drafts x_{t+2+d}               for i + d < n, so only tokens of the answer, EOS included
    its teacher is the base at t + 1 + d            that is one position after row i + d

The rows of a sequence follow one another, so (row g, depth d) has the teacher of row g + d: no index table is needed.
Together the n rows and their teachers need n + 1 states, from h_{p-1} on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .shards import Answers


@dataclass(frozen=True)
class Batch:
    """ids: (B, S), zeros after a sequence's end, or the tokens of all answers (N) · at (R): where t is in the flattened
    ids · offset (R): i · left (R): n - i, depth d has a target where d < left · sequence (B): numbers of the answers"""

    ids: Tensor
    at: Tensor
    offset: Tensor
    left: Tensor
    sequence: np.ndarray

    def to(self, device: torch.device) -> Batch:
        ids, at, offset, left = (x.to(device, non_blocking=True) for x in (self.ids, self.at, self.offset, self.left))
        return Batch(ids, at, offset, left, self.sequence)

    def tokens(self, depths: int, first: int = 1) -> Tensor:
        """(R, depths): x_{t+first} and the tokens after it; after a sequence's end, any tokens. first 1: the pending
        token and the true drafts; first 2: the targets."""
        flat = self.ids.flatten()
        index = self.at[:, None] + first + torch.arange(depths, device=flat.device)
        return flat[index.clamp(max=flat.numel() - 1)].long()


def usable(answers: Answers, max_length: int) -> np.ndarray:
    """Numbers of the sequences that give at least one row and are not too long."""
    return np.flatnonzero((answers.answer_len >= 2) & (answers.prompt_len >= 1) & (answers.length <= max_length))


def spread(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Sequences of `counts` (B) rows, one after another, `total` in all → each row's sequence and its offset in it,
    (total) both. The caller gives `total`, so that nothing waits for the device."""
    ends = counts.cumsum(0)
    index = torch.arange(total, device=counts.device)
    sequence = torch.searchsorted(ends, index, right=True)
    return sequence, index - (ends - counts)[sequence]


def make_batch(answers: Answers, numbers: np.ndarray) -> Batch:
    """These sequences, in this order."""
    lengths = answers.length[numbers]
    width = int(lengths.max())
    ids = np.zeros((len(numbers), width), np.int64)
    for row, number in enumerate(numbers):
        ids[row, : lengths[row]] = answers.sequence(number)
    counts = torch.from_numpy(answers.answer_len[numbers].astype(np.int64) - 1)
    first = torch.from_numpy(np.arange(len(numbers)) * width + answers.prompt_len[numbers] - 1)
    of_row, offset = spread(counts, int(counts.sum()))
    return Batch(torch.from_numpy(ids), first[of_row] + offset, offset, counts[of_row] - offset, numbers)


def plan_epoch(answers: Answers, numbers: np.ndarray, batch_rows: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of an epoch: all sequences in a random order, at most `batch_rows` rows in a batch, or one sequence.
    The result depends on the arguments alone, so that a resumed run sees the same batches."""
    order = np.random.default_rng([seed, epoch]).permutation(numbers)
    ends = np.cumsum(answers.answer_len[order] - 1)
    batches, start, before = [], 0, 0
    while start < len(order):
        end = max(start + 1, int(np.searchsorted(ends, before + batch_rows, side="right")))
        batches.append(order[start:end])
        start, before = end, int(ends[end - 1])
    return batches


def by_length(answers: Answers, numbers: np.ndarray) -> np.ndarray:
    """The same sequences, the shortest first, so that passes over them have little padding."""
    return numbers[np.lexsort((numbers, answers.length[numbers]))]


def in_order(answers: Answers, numbers: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Batches of these sequences in the order given: at most `batch_tokens` with the padding, or one sequence."""
    start = widest = 0
    for end, length in enumerate(answers.length[numbers].tolist()):
        widest = max(widest, length)
        if end > start and (end + 1 - start) * widest > batch_tokens:
            yield numbers[start:end]
            start, widest = end, length
    if start < len(numbers):
        yield numbers[start:]

"""From answers to batches: which positions heads learn from, and what each depth must say there.

A sequence x_0 … x_{T-1} whose answer begins at x_p gives n = T - p - 1 rows, one for each state the runner ever drafts
from. Row i is the base's hidden state h_t at t = p - 1 + i:

    h_t has produced the pending token x_{t+1}      so the first row is the prompt's last token, as after prefill
    depth d (from 0) drafts x_{t+2+d}               in the answer for i + d < n; EOS counts, the prompt never
    its teacher is the base at t + 1 + d            that is, the hidden state of row i + d, one position further

Rows of a sequence stand side by side, so the teacher of (row g, depth d) is row g + d's: no index table is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .shards import Answers

WINDOW = 64  # batches that are sorted by length together: little padding, and still a random order


@dataclass(frozen=True)
class Batch:
    """ids (B, S), zeros behind a sequence's end · for the R rows: at (R) index into the flattened ids of t ·
    place (R) i, and left (R) n - i: depth d has a target where d < left · sequence (B) numbers within the answers."""

    ids: Tensor
    at: Tensor
    place: Tensor
    left: Tensor
    sequence: np.ndarray

    def to(self, device: torch.device) -> Batch:
        ids, at, place, left = (x.to(device, non_blocking=True) for x in (self.ids, self.at, self.place, self.left))
        return Batch(ids, at, place, left, self.sequence)

    def tokens(self, depths: int, first: int = 1) -> Tensor:
        """(R, depths): x_{t+first} and those after it; whatever stands there behind the end. first 1: the pending
        token and the true drafts; first 2: the targets."""
        flat = self.ids.flatten()
        index = self.at[:, None] + first + torch.arange(depths, device=flat.device)
        return flat[index.clamp(max=flat.numel() - 1)]


def usable(answers: Answers, max_length: int) -> np.ndarray:
    """Numbers of the sequences that give at least one row and are not too long."""
    return np.flatnonzero((answers.answer_len >= 2) & (answers.prompt_len >= 1) & (answers.length <= max_length))


def make_batch(answers: Answers, numbers: np.ndarray) -> Batch:
    """These sequences, in this order."""
    lengths = answers.length[numbers]
    width = int(lengths.max())
    ids = np.zeros((len(numbers), width), np.int64)
    at, place, left = [], [], []
    for row, number in enumerate(numbers):
        ids[row, : lengths[row]] = answers.sequence(number)
        first, count = int(answers.prompt_len[number]) - 1, int(answers.answer_len[number]) - 1
        at.append(np.arange(count) + row * width + first)
        place.append(np.arange(count))
        left.append(count - np.arange(count))
    rows = [torch.from_numpy(np.concatenate(parts).astype(np.int64)) for parts in (at, place, left)]
    return Batch(torch.from_numpy(ids), rows[0], rows[1], rows[2], numbers)


def plan_epoch(answers: Answers, numbers: np.ndarray, batch_tokens: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of an epoch, each `batch_tokens` with its padding at most (but one sequence at least).

    A function of its arguments alone, so that a resumed run sees the same batches.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(numbers)
    mean = max(1.0, float(answers.length[numbers].mean())) if len(numbers) else 1.0
    size = max(1, int(WINDOW * batch_tokens / mean))
    batches: list[np.ndarray] = []
    for start in range(0, len(order), size):
        window = order[start : start + size]
        window = window[np.argsort(answers.length[window], kind="stable")]
        found = list(_fill(window, answers.length[window], batch_tokens))
        batches += [found[i] for i in random.permutation(len(found))]
    return batches


def in_order(answers: Answers, numbers: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Batches of these sequences in the order given."""
    start = 0
    for end in range(1, len(numbers) + 1):
        width = int(answers.length[numbers[start : end + 1]].max())
        if end == len(numbers) or (end + 1 - start) * width > batch_tokens:
            yield numbers[start:end]
            start = end


def _fill(window: np.ndarray, lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Cut sequences of ascending length into batches."""
    start = 0
    for end in range(1, len(window) + 1):
        if end == len(window) or (end + 1 - start) * int(lengths[end]) > batch_tokens:
            yield window[start:end]
            start = end

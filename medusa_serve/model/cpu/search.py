"""What a CPU's greedy step looks for, each one kernel: the largest logits, the lookup, and a draft's best children.
Three tenths of a millisecond of small operations each otherwise.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from .base import OPTIONS, exponential, pointer, wide
from .threads import HEAD, run_in_team, share_of, team, thread_of

BLOCK = 1024  # numbers whose largest is looked for at once
INFINITE = 0x7F80  # bfloat16's bits of infinity; above it is no number


def fits(logits: Tensor) -> bool:
    return logits.device.type == "cpu" and logits.dtype == torch.bfloat16 and logits.is_contiguous()


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits (B, N, V) → the place of each node's largest, the first among equals, and that number, float32; NaN where
    not all are numbers. (B, N) both"""
    rows, nodes, vocab = logits.shape
    picked = torch.empty(rows, nodes, dtype=torch.int64)
    best = torch.empty(rows, nodes, dtype=torch.float32)
    _largest(
        logits.data_ptr(), picked.data_ptr(), best.data_ptr(), rows * nodes, vocab, *team().given(), largest_share()
    )
    return picked, best


@lru_cache
def children_share() -> int:
    """Address of the function that a thread runs: its share of the places."""

    @cfunc(types.void(types.voidptr), cache=True, **OPTIONS)
    def body(task_at):
        task = carray(task_at, (CHILDREN_TASK,), np.int64)
        _children(task, thread_of(task))

    return int(body.address or 0)


@lru_cache
def largest_share() -> int:
    """Address of the function that a thread runs: its share of the nodes."""

    @cfunc(types.void(types.voidptr), cache=True, **OPTIONS)
    def body(task_at):
        task = carray(task_at, (TASK,), np.int64)
        _largest_of(task, thread_of(task))

    return int(body.address or 0)


def best_children(logits: Tensor, tau: Tensor, num_ranks: int) -> tuple[Tensor, Tensor]:
    """The largest of softmax(logits / tau), best first: ids and log-probabilities, (B, W, R) both. logits (B, W, V'),
    tau (W) or one for all"""
    rows, beams, vocab = logits.shape
    ids = torch.empty(rows, beams, num_ranks, dtype=torch.int64)
    logp = torch.empty(rows, beams, num_ranks, dtype=torch.float32)
    each = tau.expand(beams).contiguous()
    native_children(
        logits.data_ptr(), each.data_ptr(), ids.data_ptr(), logp.data_ptr(), rows * beams, beams, vocab, num_ranks,
        *team().given(), children_share(),
    )  # fmt: skip
    return ids, logp


def continuation(history: Tensor, length: Tensor, num_tokens: int, longest: int, shortest: int) -> Tensor:
    """As lookup.lookup. history (B, C), contiguous"""
    found = torch.full((len(length), num_tokens), -1, dtype=torch.int64)
    _continue(
        history.data_ptr(), length.data_ptr(), found.data_ptr(), *history.shape, num_tokens, longest, shortest
    )  # fmt: skip
    return found


# numbers of a task: what thread_of reads, then logits, picked, best, count, vocab
TASK = HEAD + 5


@njit(cache=True, **OPTIONS)
def _largest(logits_at, picked_at, best_at, count, vocab, threads, team_at, share):
    threads = threads if count > 1 else 1
    task = np.array((threads, team_at, logits_at, picked_at, best_at, count, vocab), np.int64)
    run_in_team(task, share)


@njit(**OPTIONS)
def _largest_of(task, thread):
    count, vocab = task[HEAD + 3], task[HEAD + 4]
    picked = carray(pointer(task[HEAD + 1]), (count,), np.int64)
    best = carray(pointer(task[HEAD + 2]), (count,), np.float32)
    first, end = share_of(count, task, thread)
    for place in range(first, end):
        numbers = carray(pointer(task[HEAD] + 2 * place * vocab), (vocab,), np.uint16)
        picked[place], good = _argmax(numbers)
        best[place] = wide(numbers[picked[place]]) if good else np.float32(np.nan)


@njit(inline="never", **OPTIONS)
def _argmax(numbers):
    """(place of the largest bfloat16, the first among equals; whether all are numbers and it is finite)"""
    best, at, bad = np.int32(-0x8000), 0, np.int32(0)
    for start in range(0, len(numbers), BLOCK):
        end = min(start + BLOCK, len(numbers))
        top = np.int32(-0x8000)
        for i in range(start, end):
            key = _ordered(numbers[i])
            top = key if key > top else top
            bad |= np.int32((numbers[i] & np.uint16(0x7FFF)) > np.uint16(INFINITE))
        if top > best:
            best = top
            at = start
            while _ordered(numbers[at]) != top:
                at += 1
    finite = bad == 0 and (numbers[at] & np.uint16(0x7FFF)) != np.uint16(INFINITE)
    return at, finite


@njit(inline="always", **OPTIONS)
def _ordered(half):
    """int32 in the order of the bfloat16 numbers"""
    signed = np.int32(np.int16(half))
    return signed if signed >= 0 else np.int32(signed ^ np.int32(0x7FFF))


# as TASK: then logits, tau, ids, log-probabilities, count, beams, vocab, ranks
CHILDREN_TASK = HEAD + 8


@njit(cache=True, **OPTIONS)
def native_children(logits_at, tau_at, ids_at, logp_at, count, beams, vocab, ranks, threads, team_at, share):
    """tau (beams): of the places one after the other"""
    threads = threads if count > 1 else 1
    task = np.array((threads, team_at, logits_at, tau_at, ids_at, logp_at, count, beams, vocab, ranks), np.int64)
    run_in_team(task, share)


@njit(**OPTIONS)
def _children(task, thread):
    logits_at = task[HEAD]
    count, beams, vocab, ranks = task[HEAD + 4], task[HEAD + 5], task[HEAD + 6], task[HEAD + 7]
    taus = carray(pointer(task[HEAD + 1]), (beams,), np.float32)
    ids = carray(pointer(task[HEAD + 2]), (count, ranks), np.int64)
    logp = carray(pointer(task[HEAD + 3]), (count, ranks), np.float32)
    first, last = share_of(count, task, thread)
    for place in range(first, last):
        numbers = carray(pointer(logits_at + 2 * place * vocab), (vocab,), np.uint16)
        best, where = logp[place], ids[place]
        best[:] = np.float32(-np.inf)
        where[:] = 0
        for start in range(0, vocab, BLOCK):
            end = min(start + BLOCK, vocab)
            top = np.int32(-0x8000)
            for i in range(start, end):
                key = _ordered(numbers[i])
                top = key if key > top else top
            if _wide_of(top) > best[ranks - 1]:
                for i in range(start, end):
                    if wide(numbers[i]) > best[ranks - 1]:
                        slot = ranks - 1
                        while slot and wide(numbers[i]) > best[slot - 1]:
                            best[slot], where[slot] = best[slot - 1], where[slot - 1]
                            slot -= 1
                        best[slot], where[slot] = wide(numbers[i]), i
        scale, largest, total = np.float32(1) / taus[place % beams], best[0], np.float32(0)
        for i in range(vocab):
            total += exponential((wide(numbers[i]) - largest) * scale)
        for slot in range(ranks):
            best[slot] = (best[slot] - largest) * scale - np.log(total)


@njit(inline="always", **OPTIONS)
def _wide_of(ordered):
    """float32 of a number that `_ordered` gave"""
    return wide(np.uint16(ordered if ordered >= 0 else ordered ^ np.int32(0x7FFF)))


@njit(cache=True, **OPTIONS)
def _continue(history_at, length_at, found_at, rows, columns, num_tokens, longest, shortest):
    histories = carray(pointer(history_at), (rows, columns), np.int64)
    lengths = carray(pointer(length_at), (rows,), np.int64)
    found = carray(pointer(found_at), (rows, num_tokens), np.int64)
    for row in range(rows):
        native_continue(histories[row], lengths[row], found[row], True, longest, shortest)


@njit(**OPTIONS)
def native_continue(history, length, found, keep, longest, shortest):
    """As lookup.lookup, of one row, into `found` where it is to be kept; → tokens found"""
    best, at = shortest - 1, -1
    for end in range(length - 1, -1, -1):
        if best == longest:
            break
        if history[end] != history[length]:
            continue
        run = 1
        while run < longest and run <= end and history[end - run] == history[length - run]:
            run += 1
        if run > best:
            best, at = run, end
    count = min(len(found), length - at) if at >= 0 else 0
    if keep:
        for i in range(count):
            found[i] = history[at + 1 + i]
    return count

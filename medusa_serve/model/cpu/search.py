"""The searches of a CPU's greedy step, one kernel each: the largest logits, the lookup, and a draft's best children.
With torch's small operations, each of them takes three tenths of a millisecond.
"""

from __future__ import annotations

from ctypes import addressof

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from .base import OPTIONS, as_function, exponential, pointer, record_at, wide
from .threads import range_of_thread, run_in_threads, task_record, thread_of, threads

BLOCK = 1024  # numbers that are searched at once for their largest
INFINITE = 0x7F80  # bfloat16's bits of infinity; larger bits are NaN
Largest = task_record("logits picked best count vocab")
LARGEST = np.dtype(Largest)
# tau: (beams) float32; the items are the beams of all rows, row by row
Children = task_record("logits tau ids logp count beams vocab ranks")
CHILDREN = np.dtype(Children)


def fits(logits: Tensor) -> bool:
    return logits.device.type == "cpu" and logits.dtype == torch.bfloat16 and logits.is_contiguous()


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits (B, N, V) → the index of each node's largest logit, the first among equals, and that logit, float32; NaN
    where a logit is NaN or the largest is infinite. (B, N) both"""
    rows, nodes, vocab = logits.shape
    picked = torch.empty(rows, nodes, dtype=torch.int64)
    best = torch.empty(rows, nodes, dtype=torch.float32)
    task = Largest(*threads().given(), count=rows * nodes, vocab=vocab)
    task.logits, task.picked, task.best = logits.data_ptr(), picked.data_ptr(), best.data_ptr()
    _find_largest(addressof(task), largest_function())
    return picked, best


def best_children(logits: Tensor, tau: Tensor, num_ranks: int) -> tuple[Tensor, Tensor]:
    """The largest of softmax(logits / tau), best first: ids and log-probabilities, (B, W, R) both. logits (B, W, V'),
    tau (W) or one for all"""
    rows, beams, vocab = logits.shape
    ids = torch.empty(rows, beams, num_ranks, dtype=torch.int64)
    logp = torch.empty(rows, beams, num_ranks, dtype=torch.float32)
    each = tau.expand(beams).contiguous()
    task = Children(*threads().given(), count=rows * beams, beams=beams, vocab=vocab, ranks=num_ranks)
    task.logits, task.tau, task.ids, task.logp = logits.data_ptr(), each.data_ptr(), ids.data_ptr(), logp.data_ptr()
    _find_children(addressof(task), children_function())
    return ids, logp


def continuation(history: Tensor, length: Tensor, num_tokens: int, longest: int, shortest: int) -> Tensor:
    """Like lookup.lookup. history (B, C), contiguous"""
    found = torch.full((len(length), num_tokens), -1, dtype=torch.int64)
    sizes = (*history.shape, num_tokens, longest, shortest)
    _continue(history.data_ptr(), length.data_ptr(), found.data_ptr(), *sizes)
    return found


@njit(inline="always", **OPTIONS)
def run_items(task, function):
    """Run in threads, but a single item without waking others."""
    task.threads = task.threads if task.count > 1 else 1
    run_in_threads(task, function)


@njit(cache=True, **OPTIONS)
def _find_largest(task_at, function):
    run_items(record_at(task_at, LARGEST), function)


@as_function
def largest_function(task_at):
    """One thread's share of the nodes."""
    task = record_at(task_at, LARGEST)
    count, vocab, logits_at = task.count, task.vocab, task.logits
    picked = carray(pointer(task.picked), (count,), np.int64)
    best = carray(pointer(task.best), (count,), np.float32)
    first, end = range_of_thread(count, task, thread_of(task))
    for place in range(first, end):
        numbers = carray(pointer(logits_at + 2 * place * vocab), (vocab,), np.uint16)
        picked[place], good = _argmax(numbers)
        best[place] = wide(numbers[picked[place]]) if good else np.float32(np.nan)


@njit(inline="never", **OPTIONS)
def _argmax(numbers):
    """(index of the largest bfloat16, the first among equals; whether it is finite and none is NaN)"""
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
    """An int32 that sorts as the bfloat16 numbers do"""
    signed = np.int32(np.int16(half))
    return signed if signed >= 0 else np.int32(signed ^ np.int32(0x7FFF))


@njit(cache=True, **OPTIONS)
def _find_children(task_at, function):
    run_items(record_at(task_at, CHILDREN), function)


@as_function
def children_function(task_at):
    """One thread's share of the items."""
    task = record_at(task_at, CHILDREN)
    count, beams, vocab, ranks, logits_at = task.count, task.beams, task.vocab, task.ranks, task.logits
    taus = carray(pointer(task.tau), (beams,), np.float32)
    ids = carray(pointer(task.ids), (count, ranks), np.int64)
    logp = carray(pointer(task.logp), (count, ranks), np.float32)
    first, last = range_of_thread(count, task, thread_of(task))
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
    """The float32 of a number from `_ordered`"""
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
    """lookup.lookup for one row; fills `found` if `keep`; → number of tokens found"""
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

"""What a CPU's greedy step does around the model's pass, each one kernel: accept, lookup, and a draft's best children.
Three tenths of a millisecond of small operations each otherwise.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from .native import OPTIONS, exponential, pointer, wide

BLOCK = 1024  # numbers whose largest is looked for at once
INFINITE = 0x7F80  # bfloat16's bits of infinity; above it is no number


def fits(logits: Tensor) -> bool:
    return logits.device.type == "cpu" and logits.dtype == torch.bfloat16 and logits.is_contiguous()


def greedy_walk(
    logits: Tensor, tokens: Tensor, parents: Tensor, max_depth: int, length: Tensor, total: Tensor, eos: Tensor
) -> tuple[Tensor, ...]:
    """As accept.accept for greedy rows: (tokens, nodes, num_emitted, finished, finite) of its Walk. logits (B, N, V)"""
    rows, nodes, vocab = logits.shape
    out = torch.zeros(rows, 2 * (max_depth + 1) + 3, dtype=torch.int64)
    tokens, parents, eos = tokens.contiguous(), parents.contiguous(), eos.contiguous()
    used = _walk(
        logits.data_ptr(), tokens.data_ptr(), parents.data_ptr(), length.data_ptr(), total.data_ptr(), eos.data_ptr(),
        out.data_ptr(), rows, nodes, vocab, eos.shape[1], max_depth,
    )  # fmt: skip
    path = out[:, max_depth + 1 :]
    facts = out[:, -3:].unbind(1)
    return out[:, :used], path[:, :used], facts[0], facts[1].bool(), facts[2].bool()


def best_children(logits: Tensor, tau: Tensor, num_ranks: int) -> tuple[Tensor, Tensor]:
    """The largest of softmax(logits / tau), best first: ids and log-probabilities, (B, W, R) both. logits (B, W, V'),
    tau (W) or one for all"""
    rows, beams, vocab = logits.shape
    ids = torch.empty(rows, beams, num_ranks, dtype=torch.int64)
    logp = torch.empty(rows, beams, num_ranks, dtype=torch.float32)
    each = tau.expand(beams).contiguous()
    _children(
        logits.data_ptr(), each.data_ptr(), ids.data_ptr(), logp.data_ptr(), rows, beams, vocab, num_ranks
    )  # fmt: skip
    return ids, logp


def continuation(history: Tensor, length: Tensor, num_tokens: int, longest: int, shortest: int) -> Tensor:
    """As lookup.lookup. history (B, C), contiguous"""
    found = torch.full((len(length), num_tokens), -1, dtype=torch.int64)
    _continue(
        history.data_ptr(), length.data_ptr(), found.data_ptr(), *history.shape, num_tokens, longest, shortest
    )  # fmt: skip
    return found


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


@njit(cache=True, **OPTIONS)
def _walk(
    logits_at, tokens_at, parents_at, length_at, total_at, eos_at, out_at, rows, nodes, vocab, num_eos, max_depth
):
    """→ the depths that the longest walk went to"""
    tokens = carray(pointer(tokens_at), (rows, nodes), np.int64)
    parents = carray(pointer(parents_at), (rows, nodes), np.int64)
    length, total = carray(pointer(length_at), (rows,), np.int64), carray(pointer(total_at), (rows,), np.int64)
    eos = carray(pointer(eos_at), (rows, num_eos), np.int64)
    out = carray(pointer(out_at), (rows, 2 * (max_depth + 1) + 3), np.int64)
    used, alive = 1, np.empty(nodes, np.bool_)
    for row in range(rows):
        alive[:] = False
        alive[0] = True
        node, depth, finished = 0, 0, False
        for d in range(max_depth + 1):
            out[row, d] = -1
        while True:
            at = logits_at + 2 * (row * nodes + node) * vocab
            picked, finite = _argmax(carray(pointer(at), (vocab,), np.uint16))
            out[row, depth], out[row, max_depth + 1 + depth] = picked, node
            finished = length[row] + depth + 2 >= total[row]
            for i in range(num_eos):
                finished = finished or eos[row, i] == picked
            node = -1
            for i in range(nodes - 1, 0, -1):  # parents come before children: theirs is not yet overwritten
                alive[i] = alive[parents[row, i]] and tokens[row, i] == picked
                node = i if alive[i] else node
            alive[0] = False
            depth += 1
            if finished or node < 0 or not finite or depth > max_depth:
                break
        used = max(used, depth)
        out[row, 2 * max_depth + 2] = depth
        out[row, 2 * max_depth + 3], out[row, 2 * max_depth + 4] = finished, finite
    return used


@njit(cache=True, **OPTIONS)
def _children(logits_at, tau_at, ids_at, logp_at, rows, beams, vocab, ranks):
    taus = carray(pointer(tau_at), (beams,), np.float32)
    ids = carray(pointer(ids_at), (rows * beams, ranks), np.int64)
    logp = carray(pointer(logp_at), (rows * beams, ranks), np.float32)
    for place in range(rows * beams):
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
        history, length = histories[row], lengths[row]
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
        if at >= 0:
            for i in range(min(num_tokens, length - at)):
                found[row, i] = history[at + 1 + i]

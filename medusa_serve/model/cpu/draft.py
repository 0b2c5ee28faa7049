"""The greedy draft of sequential heads on a CPU as one call: SequentialDrafter's search over SequentialHeads' cell with
products of few bits, in the same order and rounded at the same places. Of a draft of three nodes Python and a hundred
small operations are two thirds.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor, nn

from ..drafting.heads import GatedBlock, SequentialHeads
from ..drafting.tree import HeadNodes
from .base import OPTIONS, copy_halves, half, pointer, wide
from .int_products import NativeInt4Linear, NativeInt8Linear, native_product, product_share
from .layer_ops import native_rms_norm, native_silu_times
from .search import children_share, native_children
from .threads import call, team

# the products of the heads, then two of each block of the cell
MIX, START, READ_IN, READ_OUT, TO_HIDDEN, OUTPUT, CELL = range(7)
CREW = 3  # numbers: threads, the team's functions, a product's share
LINE = 6  # of a product: addresses of weights, scales and bias (0: none), inputs, outputs, bits
EPSILON = 1e-6  # of heads.rms_norm


class NativeDraft:
    """Over heads that `fit`, which must stay as they are."""

    def __init__(self, heads: SequentialHeads, tau: Tensor, num_ranks: int, costs: tuple[float, float]) -> None:
        """tau (D) · costs: beam.STEP_COST and NEVER"""
        self._heads, self._ranks, self._costs = heads, num_ranks, costs
        self._tau = tau.contiguous()
        blocks: list[Any] = list(heads.cell)
        cells = [product for block in blocks for product in (block.w_in, block.w_out)]
        output = heads.output.small
        parts = [heads.mix, heads.start_proj, heads.readout.w_in, heads.readout.w_out, heads.to_hidden, output, *cells]
        self._products = np.array([_line(part) for part in parts], np.int64)
        norms = [heads.norm, heads.readout.norm, *(block.norm for block in blocks)]
        self._norms = np.array([norm.data_ptr() for norm in norms], np.int64)
        self._ones = torch.ones(heads.hidden_size, dtype=torch.bfloat16)
        embedding = heads._embedding[0]
        self._embedding = embedding if isinstance(embedding, Tensor) else embedding.weight
        sizes = (heads.hidden_size, heads.width, heads.embed_size, heads.hidden_inputs, len(heads.cell))
        self._sizes = np.array(sizes, np.int64)

    @staticmethod
    def fits(heads: Any) -> bool:
        if type(heads) is not SequentialHeads or heads.norm.dtype != torch.bfloat16 or heads.norm.device.type != "cpu":
            return False
        output, embedding = heads.output, heads._embedding[0]
        products = [heads.mix, heads.start_proj, heads.to_hidden]
        products += [part for block in [*heads.cell, heads.readout] for part in (block.w_in, block.w_out)]
        rows = embedding.weight if type(embedding) is nn.Embedding else embedding
        return (
            all(isinstance(part, NativeInt8Linear | None) for part in products)
            and all(type(block) is GatedBlock for block in heads.cell)
            and isinstance(output.small, NativeInt4Linear)
            and output.bias is None
            and isinstance(rows, Tensor)
            and rows.dtype == torch.bfloat16
            and rows.is_contiguous()
        )

    def run(self, hidden: Tensor, pending: Tensor, widths: list[int], pool: int, nodes: int) -> HeadNodes:
        """hidden (B, M·H), pending (B), widths: beams after each depth, 0 after the last · pool: nodes that are looked
        at · nodes: that are kept"""
        rows, count = pending.shape[0], min(nodes, pool)
        found = torch.empty(3, rows, count, dtype=torch.int64)
        hidden = hidden.bfloat16().contiguous()
        token_map, beams = self._heads.token_map, np.array(widths, np.int64)
        _draft(
            hidden.data_ptr(), pending.contiguous().data_ptr(), found.data_ptr(), rows, count, pool,
            beams, self._ranks, self._tau.data_ptr(), *self._costs, self._products, self._norms, self._ones.data_ptr(),
            self._embedding.data_ptr(), 0 if token_map is None else token_map.data_ptr(), self._sizes,
            *team().given(), product_share(), children_share(), linear_share(), block_share(),
        )  # fmt: skip
        return HeadNodes(found[0], found[1], found[2])


def _line(product: Any) -> list[int]:
    if product is None:
        return [0] * LINE
    four = isinstance(product, NativeInt4Linear)
    weights, scales = (product.packed, product.scales) if four else (product.weight, product.scale)
    bias = 0 if product.bias is None else product.bias.data_ptr()
    bits = product.bits if four else 8
    return [weights.data_ptr(), scales.data_ptr(), bias, product.in_features, product.out_features, bits]


@njit(inline="always", **OPTIONS)
def _halves(address, count):
    return carray(pointer(address), (count,), np.uint16)


# numbers of a task: a product's line, x, out, rows, the team
LINEAR_TASK = LINE + 3 + CREW
# the lines of a block's two products, then as `_block` names them
BLOCK_TASK = 2 * LINE + 12 + CREW


@lru_cache
def linear_share() -> int:
    """Address of `_linear` as a function of its task: whoever calls it there has not its code to compile again."""

    @cfunc(types.void(types.voidptr), cache=True, **OPTIONS)
    def body(task_at):
        _linear(carray(task_at, (LINEAR_TASK,), np.int64))

    return int(body.address or 0)


@lru_cache
def block_share() -> int:
    """The same of `_block`."""

    @cfunc(types.void(types.voidptr), cache=True, **OPTIONS)
    def body(task_at):
        _block(carray(task_at, (BLOCK_TASK,), np.int64))

    return int(body.address or 0)


@njit(**OPTIONS)
def _linear(task):
    x_at, out_at, rows = task[LINE], task[LINE + 1], task[LINE + 2]
    _product(task, x_at, out_at, rows, task[LINE + 3 :])


@njit(**OPTIONS)
def _product(line, x_at, out_at, rows, crew):
    """With its bias."""
    native_product(x_at, line[0], line[1], out_at, rows, line[3], line[4], line[5], crew[0], crew[1], crew[2])
    if line[2]:
        bias = _halves(line[2], line[4])
        for row in range(rows):
            _add(_halves(out_at + 2 * row * line[4], line[4]), bias)


@njit(**OPTIONS)
def _block(task):
    """A GatedBlock over states (rows, w) and, where tokens (rows) are given, their embeddings: out = states + block.

    norm: its weight · constant: (B, constants) numbers, one row for `each` of these rows · spare: room for the inputs,
    and rows times one and a half of the inner products"""
    into, outof, given = task[:LINE], task[LINE : 2 * LINE], task[2 * LINE :]
    states_at, norm, tokens_at, embedding_at, embed = given[0], given[1], given[2], given[3], given[4]
    constant_at, constants, each, spare, out_at, rows, width = (
        given[5], given[6], given[7], given[8], given[9], given[10], given[11],
    )  # fmt: skip
    inputs, inner = into[3], into[4] // 2
    tokens = carray(pointer(tokens_at), (rows,), np.int64)
    for row in range(rows):
        native_rms_norm(states_at + 2 * row * width, norm, spare + 2 * row * inputs, 1, width, EPSILON)
        if tokens_at:
            token_at = embedding_at + 2 * tokens[row] * embed
            native_rms_norm(token_at, norm + 2 * width, spare + 2 * (row * inputs + width), 1, embed, EPSILON)
    both_at = spare + 2 * rows * inputs
    _product(into, spare, both_at, rows, given[12:])
    for row in range(rows):
        constant = _halves(constant_at + 2 * (row // each) * constants, 2 * inner)
        _add(_halves(both_at + 4 * row * inner, 2 * inner), constant)
    active = both_at + 4 * rows * inner
    native_silu_times(both_at, 2 * inner, both_at + 2 * inner, 2 * inner, active, rows, inner)
    made = active + 2 * rows * inner
    _product(outof, active, made, rows, given[12:])
    states, out = _halves(states_at, rows * width), _halves(out_at, rows * width)
    block = _halves(made, rows * width)
    for i in range(rows * width):
        out[i] = half(wide(states[i]) + wide(block[i]))


@njit(inline="always", **OPTIONS)
def _add(numbers, others):
    for i in range(len(numbers)):
        numbers[i] = half(wide(numbers[i]) + wide(others[i]))


@njit(**OPTIONS)
def _run_linear(line, x_at, out_at, rows, crew):
    task = np.empty(LINEAR_TASK, np.int64)
    for i in range(LINE):
        task[i] = line[i]
    task[LINE], task[LINE + 1], task[LINE + 2] = x_at, out_at, rows
    for i in range(CREW):
        task[LINE + 3 + i] = crew[i]
    call(crew[CREW], task.ctypes.data)
    task[0] = 0  # as in run_in_team


@njit(**OPTIONS)
def _run_block(
    into, outof, states_at, norm, tokens_at, embedding_at, embed, constant_at, constants, each, spare, out_at, rows,
    width, crew,
):  # fmt: skip
    task = np.empty(BLOCK_TASK, np.int64)
    for i in range(LINE):
        task[i], task[LINE + i] = into[i], outof[i]
    given = task[2 * LINE :]
    given[0], given[1], given[2], given[3], given[4] = states_at, norm, tokens_at, embedding_at, embed
    given[5], given[6], given[7], given[8], given[9] = constant_at, constants, each, spare, out_at
    given[10], given[11] = rows, width
    for i in range(CREW):
        given[12 + i] = crew[i]
    call(crew[CREW + 1], task.ctypes.data)
    task[0] = 0


@njit(**OPTIONS)
def _advance(products, norms, states_at, tokens, embedding_at, base_at, total, each, spare, sizes, rows, crew):
    """states (rows, w) go one token further."""
    width, column = sizes[1], sizes[1]
    for block in range(sizes[4]):
        into, outof = products[CELL + 2 * block], products[CELL + 2 * block + 1]
        tokens_at = np.int64(tokens.ctypes.data) if block == 0 else np.int64(0)
        _run_block(
            into, outof, states_at, norms[2 + block], tokens_at, embedding_at, sizes[2], base_at + 2 * column, total,
            each, spare, states_at, rows, width, crew,
        )  # fmt: skip
        column += into[4]


@njit(**OPTIONS)
def _logits(products, norms, states_at, base_at, total, each, spare, sizes, rows, crew):
    """→ the address of (rows, V')"""
    hidden, width = sizes[0], sizes[1]
    x_at = spare
    y_at = x_at + 2 * rows * max(width, hidden)
    rest = y_at + 2 * rows * max(width, hidden)
    column = total - products[READ_IN][4]
    nothing = np.int64(0)
    _run_block(
        products[READ_IN], products[READ_OUT], states_at, norms[1], nothing, nothing, nothing, base_at + 2 * column,
        total, each, rest, y_at, rows, width, crew,
    )  # fmt: skip
    if products[TO_HIDDEN][4]:
        _run_linear(products[TO_HIDDEN], y_at, x_at, rows, crew)
        x_at, y_at = y_at, x_at
    native_rms_norm(y_at, norms[0], x_at, rows, hidden, EPSILON)
    _run_linear(products[OUTPUT], x_at, rest, rows, crew)
    return rest


@njit(**OPTIONS)
def _begin(products, ones_at, hidden_at, base_at, spare, sizes, rows, crew):
    """SequentialHeads._begin into base (rows, S)"""
    hidden, inputs = sizes[0], sizes[3]
    native_rms_norm(hidden_at, ones_at, spare, rows * inputs, hidden, EPSILON)
    mixed = spare
    if products[MIX][4]:
        mixed = spare + 2 * rows * inputs * hidden
        _run_linear(products[MIX], spare, mixed, rows, crew)
    _run_linear(products[START], mixed, base_at, rows, crew)


@njit(**OPTIONS)
def _take_best(scores, row, first, end, count, chosen):
    """Fill `chosen` with the places of the `count` largest of scores[row, first:end], best first."""
    for i in range(count):
        best = -1
        for place in range(first, end):
            taken = False
            for other in range(i):
                taken = taken or chosen[other] == place
            if not taken and (best < 0 or scores[row, place] > scores[row, best]):
                best = place
        chosen[i] = best


@njit(cache=True, nogil=True, **OPTIONS)
def _draft(
    hidden_at, pending_at, found_at, rows, count, pool, beams, ranks, tau_at, step_cost, never,
    products, norms, ones_at, embedding_at, map_at, sizes, threads, team_at, share, children, linear, block,
):  # fmt: skip
    crew = (threads, team_at, share, linear, block)
    hidden, width, inputs = sizes[0], sizes[1], sizes[3]
    widest, inner = np.int64(1), np.int64(0)
    for i in range(len(beams)):
        widest = max(widest, beams[i])
    for i in range(len(products)):
        inner = max(inner, max(products[i, 3], products[i, 4]))
    most, total = rows * widest, products[START, 4]
    # a block's inputs, its products, the gated half and what comes of it; or the logits
    room = most * (4 * inner + 2 * max(width, hidden) + hidden * inputs)
    halves = rows * total + 2 * most * width + room
    numbers = most * (5 + 2 * ranks) + 4 * rows * pool + max(count, widest)
    memory = np.empty(8 * numbers + 2 * halves, np.uint8)  # one, and views of it: each array costs half a second
    place = np.int64(memory.ctypes.data)
    tokens = carray(pointer(place), (most,), np.int64)
    parents = carray(pointer(place + 8 * most), (2, most), np.float32)
    at = carray(pointer(place + 16 * most), (2, most), np.int64)
    place += 40 * most
    ids_at, logp_at = place, place + 8 * most * ranks
    ids, logp = carray(pointer(ids_at), (most, ranks), np.int64), carray(pointer(logp_at), (most, ranks), np.float32)
    place += 16 * most * ranks
    pool_tokens = carray(pointer(place), (rows, pool), np.int64)
    above = carray(pointer(place + 8 * rows * pool), (rows, pool), np.int64)
    depths = carray(pointer(place + 16 * rows * pool), (rows, pool), np.int64)
    scores = carray(pointer(place + 24 * rows * pool), (rows, pool), np.float32)
    place += 32 * rows * pool
    chosen = carray(pointer(place), (max(count, widest),), np.int64)
    base_at = place + 8 * max(count, widest)
    states_at = base_at + 2 * rows * total
    other_at = states_at + 2 * most * width
    spare = other_at + 2 * most * width
    token_map = carray(pointer(map_at), (products[OUTPUT, 4],), np.int64)
    found = carray(pointer(found_at), (3, rows, count), np.int64)
    pending = carray(pointer(pending_at), (rows,), np.int64)
    for i in range(most):
        parents[0, i], at[0, i] = 0, 0

    _begin(products, ones_at, hidden_at, base_at, spare, sizes, rows, crew)
    for row in range(rows):
        tokens[row] = pending[row]
        copy_halves(base_at + 2 * row * total, states_at + 2 * row * width, width)
    each, filled = np.int64(1), np.int64(0)
    _advance(products, norms, states_at, tokens, embedding_at, base_at, total, each, spare, sizes, rows, crew)
    for depth in range(len(beams)):
        places, now, then = rows * each, depth % 2, (depth + 1) % 2
        logits_at = _logits(products, norms, states_at, base_at, total, each, spare, sizes, places, crew)
        native_children(
            logits_at, tau_at + 4 * depth, ids_at, logp_at, places, 1, products[OUTPUT, 4], ranks,
            threads, team_at, children,
        )  # fmt: skip
        more = beams[depth]
        for row in range(rows):
            for beam in range(each):
                place, parent = row * each + beam, parents[now, row * each + beam]
                for rank in range(ranks):
                    own, i = logp[place, rank], filled + beam * ranks + rank
                    own = own if own > np.float32(never) else np.float32(never)
                    least = parent * np.float32(1 + 1e-6) - np.float32(step_cost)
                    scores[row, i] = min(parent + own, least)
                    pool_tokens[row, i] = token_map[ids[place, rank]] if map_at else ids[place, rank]
                    above[row, i], depths[row, i] = at[now, place], depth + 1
            _take_best(scores, row, filled, filled + each * ranks, more, chosen)
            for j in range(more):
                mine, best = row * more + j, chosen[j]
                parents[then, mine], at[then, mine] = scores[row, best], best + 1
                tokens[mine] = pool_tokens[row, best]
                source = row * each + (best - filled) // ranks
                copy_halves(states_at + 2 * source * width, other_at + 2 * mine * width, width)
        filled += each * ranks
        if more:
            each = more
            states_at, other_at = other_at, states_at
            _advance(
                products, norms, states_at, tokens, embedding_at, base_at, total, each, spare, sizes, rows * each, crew
            )  # fmt: skip
    for row in range(rows):
        _take_best(scores, row, np.int64(0), filled, count, chosen)
        for n in range(count):
            best = chosen[n]
            found[0, row, n], found[1, row, n], found[2, row, n] = pool_tokens[row, best], 0, depths[row, best]
            for other in range(n):
                if chosen[other] == above[row, best] - 1:
                    found[1, row, n] = other + 1
    memory[0] = 0  # as in run_in_team

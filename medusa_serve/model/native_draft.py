"""The greedy draft of sequential heads on a CPU as one call: SequentialDrafter's search over SequentialHeads' cell with
products of few bits, in the same order and rounded at the same places. Of a draft of three nodes Python and a hundred
small operations are two thirds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor, nn

from .heads import GatedBlock, SequentialHeads
from .native import OPTIONS, half, pointer, wide
from .native_ops import native_rms_norm, native_silu_times
from .native_products import NativeInt4Linear, NativeInt8Linear, native_product, product_share
from .native_step import children_share, native_children
from .native_team import team
from .tree import HeadNodes

# the products of the heads, then two of each block of the cell
MIX, START, READ_IN, READ_OUT, TO_HIDDEN, OUTPUT, CELL = range(7)
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
            *team().given(), product_share(), children_share(),
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


@njit(**OPTIONS)
def _linear(line, x_at, out_at, rows, crew):
    threads, start, number, share = crew
    native_product(
        x_at, line[0], line[1], out_at, rows, line[3], line[4], line[5], threads, start, number, share
    )  # fmt: skip
    if line[2]:
        bias = _halves(line[2], line[4])
        for row in range(rows):
            _add(_halves(out_at + 2 * row * line[4], line[4]), bias)


@njit(inline="always", **OPTIONS)
def _add(numbers, others):
    for i in range(len(numbers)):
        numbers[i] = half(wide(numbers[i]) + wide(others[i]))


@njit(**OPTIONS)
def _gated(into, outof, x_at, constant_at, constants, each, spare, out_at, rows, crew):
    """GatedBlock behind its norm. constant: (B, constants) numbers, one row for `each` of these rows · spare: room for
    rows times one and a half of the inner products"""
    inner = into[4] // 2
    _linear(into, x_at, spare, rows, crew)
    for row in range(rows):
        constant = _halves(constant_at + 2 * (row // each) * constants, 2 * inner)
        _add(_halves(spare + 4 * row * inner, 2 * inner), constant)
    active = spare + 4 * rows * inner
    native_silu_times(spare, 2 * inner, spare + 2 * inner, 2 * inner, active, rows, inner)
    _linear(outof, active, out_at, rows, crew)


@njit(**OPTIONS)
def _advance(products, norms, states_at, tokens, embedding_at, base_at, total, each, spare, sizes, rows, crew):
    """states (rows, w) go one token further."""
    _, width, embed, _, blocks = sizes
    x_at = spare
    out_at = x_at + 2 * rows * (width + embed)
    rest = out_at + 2 * rows * width
    column = width
    for block in range(blocks):
        into, outof, norm = products[CELL + 2 * block], products[CELL + 2 * block + 1], norms[2 + block]
        inputs = into[3]
        for row in range(rows):
            native_rms_norm(states_at + 2 * row * width, norm, x_at + 2 * row * inputs, 1, width, EPSILON)
            if block == 0:
                token_at = embedding_at + 2 * tokens[row] * embed
                native_rms_norm(token_at, norm + 2 * width, x_at + 2 * (row * inputs + width), 1, embed, EPSILON)
        _gated(into, outof, x_at, base_at + 2 * column, total, each, rest, out_at, rows, crew)
        _add(_halves(states_at, rows * width), _halves(out_at, rows * width))
        column += into[4]


@njit(**OPTIONS)
def _logits(products, norms, states_at, base_at, total, each, spare, sizes, rows, crew):
    """→ the address of (rows, V')"""
    hidden, width = sizes[0], sizes[1]
    x_at = spare
    y_at = x_at + 2 * rows * max(width, hidden)
    rest = y_at + 2 * rows * max(width, hidden)
    native_rms_norm(states_at, norms[1], x_at, rows, width, EPSILON)
    column = total - products[READ_IN][4]
    _gated(
        products[READ_IN], products[READ_OUT], x_at, base_at + 2 * column, total, each, rest, y_at, rows, crew
    )  # fmt: skip
    _add(_halves(y_at, rows * width), _halves(states_at, rows * width))
    if products[TO_HIDDEN][4]:
        _linear(products[TO_HIDDEN], y_at, x_at, rows, crew)
        x_at, y_at = y_at, x_at
    native_rms_norm(y_at, norms[0], x_at, rows, hidden, EPSILON)
    _linear(products[OUTPUT], x_at, rest, rows, crew)
    return rest


@njit(**OPTIONS)
def _begin(products, ones_at, hidden_at, base_at, spare, sizes, rows, crew):
    """SequentialHeads._begin into base (rows, S)"""
    hidden, inputs = sizes[0], sizes[3]
    native_rms_norm(hidden_at, ones_at, spare, rows * inputs, hidden, EPSILON)
    mixed = spare
    if products[MIX][4]:
        mixed = spare + 2 * rows * inputs * hidden
        _linear(products[MIX], spare, mixed, rows, crew)
    _linear(products[START], mixed, base_at, rows, crew)


@njit(**OPTIONS)
def _take_best(scores, first, end, chosen):
    """Fill `chosen` with the places of the largest of scores[first:end], best first."""
    for i in range(len(chosen)):
        best = -1
        for place in range(first, end):
            taken = False
            for other in range(i):
                taken = taken or chosen[other] == place
            if not taken and (best < 0 or scores[place] > scores[best]):
                best = place
        chosen[i] = best


@njit(cache=True, nogil=True, **OPTIONS)
def _draft(
    hidden_at, pending_at, found_at, rows, count, pool, beams, ranks, tau_at, step_cost, never,
    products, norms, ones_at, embedding_at, map_at, sizes, threads, start, number, share, children,
):  # fmt: skip
    crew = (threads, start, number, share)
    hidden, width, embed, inputs, _ = sizes
    most = rows * max(1, beams.max())
    total = products[START][4]
    inner = np.int64(0)
    for line in products:
        inner = max(inner, line[4])
    # inputs and outputs of the widest product, its gated half, and what the blocks keep beside it
    room = most * (3 * inner + width + embed + 2 * max(width, hidden) + hidden * inputs)
    memory = np.empty(rows * total + 2 * most * width + room, np.uint16)
    base_at = memory.ctypes.data
    states_at = base_at + 2 * rows * total
    other_at = states_at + 2 * most * width
    spare = other_at + 2 * most * width
    token_map = carray(pointer(map_at), (products[OUTPUT][4],), np.int64)
    found = carray(pointer(found_at), (3, rows, count), np.int64)
    tokens, chosen = np.empty(most, np.int64), np.empty(max(count, beams.max()), np.int64)
    pending = carray(pointer(pending_at), (rows,), np.int64)
    ids, logp = np.empty((most, ranks), np.int64), np.empty((most, ranks), np.float32)
    pool_tokens, above = np.empty((rows, pool), np.int64), np.empty((rows, pool), np.int64)
    depths, scores = np.empty((rows, pool), np.int64), np.empty((rows, pool), np.float32)
    parents, at = np.zeros((2, most), np.float32), np.zeros((2, most), np.int64)

    _begin(products, ones_at, hidden_at, base_at, spare, sizes, rows, crew)
    for row in range(rows):
        tokens[row] = pending[row]
        _halves(states_at + 2 * row * width, width)[:] = _halves(base_at + 2 * row * total, width)
    _advance(products, norms, states_at, tokens, embedding_at, base_at, total, 1, spare, sizes, rows, crew)
    each, filled = 1, 0
    for depth in range(len(beams)):
        places, now, then = rows * each, depth % 2, (depth + 1) % 2
        logits_at = _logits(products, norms, states_at, base_at, total, each, spare, sizes, places, crew)
        native_children(
            logits_at, tau_at + 4 * depth, ids.ctypes.data, logp.ctypes.data, places, 1, products[OUTPUT][4], ranks,
            threads, start, number, children,
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
            _take_best(scores[row], filled, filled + each * ranks, chosen[:more])
            for j in range(more):
                mine, best = row * more + j, chosen[j]
                parents[then, mine], at[then, mine] = scores[row, best], best + 1
                tokens[mine] = pool_tokens[row, best]
                source = row * each + (best - filled) // ranks
                _halves(other_at + 2 * mine * width, width)[:] = _halves(states_at + 2 * source * width, width)
        filled += each * ranks
        if more:
            each = more
            states_at, other_at = other_at, states_at
            _advance(
                products, norms, states_at, tokens, embedding_at, base_at, total, each, spare, sizes, rows * each, crew
            )  # fmt: skip
    for row in range(rows):
        _take_best(scores[row], 0, filled, chosen[:count])
        for n in range(count):
            best = chosen[n]
            found[0, row, n], found[1, row, n], found[2, row, n] = pool_tokens[row, best], 0, depths[row, best]
            for other in range(n):
                if chosen[other] == above[row, best] - 1:
                    found[1, row, n] = other + 1
    memory[0] = tokens[0] = ids[0, 0] = (
        0  # Numba frees an array behind its last use, and of an address it does not know
    )
    logp[0, 0] = 0

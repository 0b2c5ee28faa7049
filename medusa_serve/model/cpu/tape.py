"""A traced decoder layer as one call: where its graph is made of operations that have kernels, these run one after the
other without Python between them. That is half of a small model's pass.

A tape says what to do, `Tape.ops`; where a layer's weights lie, `Tape.weights_of`; what the pass sees, `view_facts`.
Values are columns of buffers of M rows of bfloat16: buffer 0 is the layer's input, the last one its output. Every value
is rounded as it is where the graph runs as it is, so that the two give the same bits.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor, fx

from ..forward.attention import View
from . import layer_ops
from .attention import TASK as ATTENTION_TASK
from .attention import TILE, attention_share, fill_attention, fill_turn
from .base import OPTIONS, copy_halves, half, pointer, wide
from .int_products import TASK as PRODUCT_TASK
from .int_products import NativeInt4Linear, fill_product, product_room, product_share
from .layer_ops import native_rms_norm, native_silu_times
from .threads import HEAD, call, meet, run_in_team, share_of, team, thread_of

NORM, PRODUCT, ADD, SILU_TIMES, ATTEND = range(5)
FIELDS = 14  # of an operation
FACTS = 16  # of a pass


class Value(NamedTuple):
    """Columns of a buffer. dim: of a head, once the columns are seen as heads"""

    buffer: int
    column: int
    width: int
    dim: int = 0


class NoTape(Exception):
    """The graph has an operation without a kernel."""


class Tape:
    """ops (O, FIELDS) int64: kind, then buffer and column of up to three values, the output's buffer, columns read, and
    five more: bits of a product's weights; attention's columns of a head of keys and of values, window, heads, kv_heads
    numbers (O) float64: ε or scaling · buffers (n, 2) int64: first column of a row of M, and width"""

    def __init__(self, graph: fx.Graph, order: dict[fx.Node, int], inputs: list[Any], attend: Any) -> None:
        """order: the graph's inputs by place · inputs: a layer's, None what the model hands over · attend: the operator
        that rotates and attends. Raises NoTape."""
        self._inputs, self._attend = inputs, attend
        self._ops: list[list[int]] = []
        self._numbers: list[float] = []
        self._widths: list[int] = []
        self._weights: list[int] = []  # of each operation: its place among the inputs, -1: none
        self._values: dict[fx.Node, Any] = {}
        self.positions: tuple[int, ...] = ()  # places of the cosines and the sines among the inputs
        self._order = order
        for node, place in order.items():
            self._values[node] = self._handed(node) if inputs[place] is None else place
        for node in graph.nodes:
            if node.op == "output":
                self._end(node.args[0])
            elif node.op != "placeholder":
                self._values[node] = self._read(node)
        starts = np.cumsum([0, *self._widths[1:-1], 0])
        self.buffers = np.array([[0, *starts[: len(self._widths) - 1]], self._widths], np.int64).T.copy()
        self.width = int(starts[-1])  # of the buffers between the input and the output
        self.ops, self.numbers = np.array(self._ops, np.int64), np.array(self._numbers)
        self.room = max(_room(op) for op in self._ops)  # of a row of M, what an operation needs besides
        del self._inputs, self._attend, self._values, self._order

    def weights_of(self, inputs: list[Any]) -> np.ndarray:
        """(O, 2) addresses of what each operation reads of a layer's own."""
        found = np.zeros((len(self._weights), 2), np.int64)
        for row, place in zip(found, self._weights, strict=True):
            given = inputs[place] if place >= 0 else None
            if isinstance(given, NativeInt4Linear):
                row[:] = given.packed.data_ptr(), given.scales.data_ptr()
            elif given is not None:
                row[0] = given.data_ptr()
        return found

    # ---- a graph's nodes as operations -------------------------------------------------------------------------------

    def _handed(self, node: fx.Node) -> Value | None:
        """Hidden states are a buffer; positions go to the attention alone."""
        if not self._widths:
            self._widths.append(node.meta["val"].shape[-1])
            return Value(0, 0, self._widths[0])
        return None

    def _read(self, node: fx.Node) -> Any:
        target: Any = node.target
        args: Any = node.args
        if target is torch.ops.aten.sym_size.int:
            return None
        first: Any = self._values.get(args[0]) if isinstance(args[0], fx.Node) else None
        known: dict[Any, Any] = {
            layer_ops.rms_norm: self._norm, operator.add: self._add, layer_ops.silu_times: self._silu_times,
            self._attend: self._attention,
        }  # fmt: skip
        if node.op == "call_function" and target in known:
            return known[target](*args)
        if not isinstance(first, Value):
            raise NoTape
        name = getattr(target, "__name__", target)
        if name == "_product":
            return self._product(first, self._values[args[1]])
        if name == "_part":
            return Value(first.buffer, first.column + args[1], args[2] - args[1])
        shape = args[1] if node.op == "call_method" and target in ("view", "reshape") else None
        if shape is not None and len(shape) == 4 and shape[2] == -1:
            return first._replace(dim=shape[3])
        if shape is not None and len(shape) == 3 and shape[2] == -1:
            return first._replace(dim=0)
        if target == "transpose" and first.dim and args[1:] == (1, 2):
            return first
        raise NoTape

    def _norm(self, x: Any, weight: Any, epsilon: float) -> Value:
        a = self._whole(x)
        return self._put(NORM, [a], a.width, number=epsilon, weights=self._values[weight])

    def _add(self, *terms: Any) -> Value:
        a, b = (self._whole(term) for term in terms)
        return self._put(ADD, [a, b], a.width)

    def _silu_times(self, *factors: Any) -> Value:
        a, b = (self._value(factor) for factor in factors)
        return self._put(SILU_TIMES, [a, b], a.width)

    def _product(self, x: Value, place: int) -> Value:
        layer = self._inputs[place]
        if not isinstance(layer, NativeInt4Linear) or layer.bias is not None or x.width != self._widths[x.buffer]:
            raise NoTape
        return self._put(PRODUCT, [x], layer.out_features, facts=(layer.bits, 0, 0, 0, 0), weights=place)

    def _attention(self, query: Any, key: Any, value: Any, cos: Any, sin: Any, scaling: float, window: int) -> Value:
        q, k, v = (self._value(node) for node in (query, key, value))
        places = tuple(self._order.get(node, -1) for node in (cos, sin))
        if not q.dim or q.dim != k.dim or not v.dim or -1 in places or self.positions not in ((), places):
            raise NoTape
        self.positions = places
        heads, kv_heads = q.width // q.dim, k.width // k.dim
        facts = (k.dim, v.dim, window, heads, kv_heads)
        return self._put(ATTEND, [q, k, v], heads * v.dim, facts=facts, number=scaling)

    def _value(self, node: Any) -> Value:
        value = self._values.get(node)
        if not isinstance(value, Value):
            raise NoTape
        return value

    def _whole(self, node: Any) -> Value:
        value = self._value(node)
        if value.width != self._widths[value.buffer]:
            raise NoTape
        return value

    def _put(
        self,
        kind: int,
        values: list[Value],
        width: int,
        *,
        facts: tuple[int, ...] = (0,) * 5,
        number: float = 0.0,
        weights: int = -1,
    ) -> Value:
        places = [place for value in values for place in value[:2]]
        self._widths.append(width)
        out = len(self._widths) - 1
        self._ops.append([kind, *places, *[0] * (6 - len(places)), out, values[0].width, *facts, 0][:FIELDS])
        self._numbers.append(number)
        self._weights.append(weights)
        return Value(out, 0, width)

    def _end(self, out: Any) -> None:
        value = self._value(out[0]) if len(out) == 1 else None
        if value is None or value.buffer != len(self._widths) - 1 or value.column:
            raise NoTape


def _room(op: list[int]) -> int:
    """Numbers of 16 bits for a row of M: a product's inputs as whole numbers, or turned queries and keys."""
    if op[0] == PRODUCT:
        return product_room(op[8])
    return (op[12] + op[13]) * op[9] if op[0] == ATTEND else 0


def view_facts(view: View, columns: int, cos: Tensor, sin: Tensor) -> np.ndarray:
    """(FACTS) int64: what attention reads of a pass, but the layer's keys and values. columns: of a slot"""
    rows, new = view.positions.shape
    bits = 0 if view.causal else view.bits.data_ptr()
    return np.array(
        [cos.data_ptr(), cos.stride(1), sin.data_ptr(), sin.stride(1), view.slots.data_ptr(), view.length.data_ptr(),
         view.positions.data_ptr(), view.positions.stride(0), view.flat_columns.data_ptr(), bits,
         rows, new, columns, view.width, 0, 0], np.int64,
    )  # fmt: skip


class TapeRun:
    """A tape over the layers of a model: what stays the same from pass to pass."""

    def __init__(self, tape: Tape) -> None:
        self.tape, self._between = tape, torch.empty(0, dtype=torch.bfloat16)
        self._at = (tape.ops.ctypes.data, len(tape.ops), tape.numbers.ctypes.data)
        self._buffers = (tape.buffers.ctypes.data, len(tape.buffers))

    def __call__(
        self,
        x: Tensor,
        weights: np.ndarray,
        facts: np.ndarray,
        keys: Tensor,
        values: Tensor,
        kept: Mapping[int, Tensor],
    ) -> Tensor:
        """x (1, M, H) → (1, M, H), through L layers. weights (L, O, 2) · keys, values: their part of the slab, (L, S,
        C, kv_heads, dim) · kept: where the inputs of some of the layers go, by number, (1, M, H) each"""
        rows, out = x.shape[1], torch.empty_like(x)
        inputs = np.zeros(len(keys), np.int64)
        for layer, hidden in kept.items():
            inputs[layer] = hidden.data_ptr()
        width = self.tape.width + x.shape[2] + self.tape.room  # every other layer's output lies between too
        if self._between.numel() < rows * width:
            self._between = torch.empty(rows * width, dtype=torch.bfloat16)
        _run(
            *self._at, *self._buffers, weights.ctypes.data, facts.ctypes.data, keys.data_ptr(), values.data_ptr(),
            x.data_ptr(), out.data_ptr(), self._between.data_ptr(), rows,
            len(keys), 2 * keys.stride(0), 2 * values.stride(0), self.tape.width, inputs.ctypes.data,
            product_share(), attention_share(), *team().given(), tape_share(),
        )  # fmt: skip
        return out


@lru_cache
def tape_share() -> int:
    """Address of the function that a thread runs: its share of every operation."""

    @cfunc(types.void(types.voidptr), cache=True, **OPTIONS)
    def body(task_at):
        task = carray(task_at, (TASK,), np.int64)
        _share(task, thread_of(task))

    return int(body.address or 0)


# numbers of a task: what it begins with, then as `_run` has them
TASK = HEAD + 20


@njit(cache=True, **OPTIONS)
def _run(
    ops_at, count, numbers_at, buffers_at, num_buffers, weights_at, facts_at, keys_at, values_at,
    x_at, out_at, between, rows, layers, keys_size, values_size, width, kept_at,
    product_share, attention_share, threads, team_at, share,
):  # fmt: skip
    task = np.array(
        (threads, team_at, ops_at, count, numbers_at, buffers_at, num_buffers, weights_at, facts_at, keys_at,
         values_at, x_at, out_at, between, rows, layers, keys_size, values_size, width, kept_at,
         product_share, attention_share), np.int64,
    )  # fmt: skip
    run_in_team(task, share)


@njit(**OPTIONS)
def _share(task, thread):
    """Of what looks at each row alone, a thread has the same rows throughout. Products and attention are shared out
    anew; behind them, and behind what each thread does of its own rows first, all wait for each other."""
    ops_at, count, numbers_at, buffers_at, num_buffers, weights_at, facts_at, keys_at, values_at, x_at, out_at = (
        task[HEAD], task[HEAD + 1], task[HEAD + 2], task[HEAD + 3], task[HEAD + 4], task[HEAD + 5], task[HEAD + 6],
        task[HEAD + 7], task[HEAD + 8], task[HEAD + 9], task[HEAD + 10],
    )  # fmt: skip
    between, rows, layers, keys_size, values_size, width_between, kept_at, product_share, attention_share = (
        task[HEAD + 11], task[HEAD + 12], task[HEAD + 13], task[HEAD + 14], task[HEAD + 15], task[HEAD + 16],
        task[HEAD + 17], task[HEAD + 18], task[HEAD + 19],
    )  # fmt: skip
    ops = carray(pointer(ops_at), (count, FIELDS), np.int64)
    numbers = carray(pointer(numbers_at), (count,), np.float64)
    buffers = carray(pointer(buffers_at), (num_buffers, 2), np.int64)
    weights = carray(pointer(weights_at), (layers, count, 2), np.int64)
    facts = carray(pointer(facts_at), (FACTS,), np.int64)
    kept = carray(pointer(kept_at), (layers,), np.int64)
    product, attention = np.empty(PRODUCT_TASK, np.int64), np.empty(ATTENTION_TASK, np.int64)
    for i in range(HEAD):
        product[i] = attention[i] = task[i]
    places = np.empty(num_buffers, np.int64)
    for i in range(num_buffers):
        places[i] = between + 2 * rows * buffers[i, 0]
    places[num_buffers - 1] = x_at
    spare = between + 2 * rows * width_between
    room = spare + 2 * rows * buffers[0, 1]
    first, end = share_of(rows, task, thread)
    mine = end - first
    for step in range(layers * count):
        layer, i = step // count, step % count
        if i == 0:
            places[0] = places[num_buffers - 1]
            places[num_buffers - 1] = out_at if (layers - layer) % 2 else spare
            if kept[layer]:
                begin = 2 * first * buffers[0, 1]
                copy_halves(places[0] + begin, kept[layer] + begin, mine * buffers[0, 1])
        op = ops[i]
        kind, width, out = op[0], op[8], places[op[7]]
        a, b, c = places[op[1]] + 2 * op[2], places[op[3]] + 2 * op[4], places[op[5]] + 2 * op[6]
        a_row, b_row, c_row = buffers[op[1], 1], buffers[op[3], 1], buffers[op[5], 1]
        if kind == PRODUCT:
            fill_product(
                product, a, weights[layer, i, 0], weights[layer, i, 1], out, rows, width, buffers[op[7], 1],
                op[9], room,
            )  # fmt: skip
            call(product_share, product.ctypes.data)
            meet(task)
        elif kind == ATTEND:
            dim, value_dim, window, heads, kv_heads = op[9], op[10], op[11], op[12], op[13]
            fill_attention(
                attention, room, facts[11] * heads * dim, dim, heads * dim,
                keys_at + layer * keys_size, values_at + layer * values_size, out,
                facts[4], facts[5], facts[6], facts[7], facts[9], facts[10], facts[11], heads, kv_heads, facts[12],
                dim, value_dim, facts[13] + TILE, numbers[i], window,
            )  # fmt: skip
            fill_turn(
                attention, a, dim, a_row, b, dim, b_row, c, value_dim, c_row, facts[0], facts[1], facts[2], facts[3],
                facts[8],
            )  # fmt: skip
            call(attention_share, attention.ctypes.data)
            meet(task)
        else:
            _rows(
                kind, a + 2 * first * a_row, a_row, b + 2 * first * b_row, b_row, weights[layer, i, 0],
                out + 2 * first * width, mine, width, numbers[i],
            )  # fmt: skip
    product[0] = attention[0] = 0  # as in run_in_team


@njit(inline="always", **OPTIONS)
def _rows(kind, a, a_row, b, b_row, weight, out, rows, width, number):
    """What looks at each row alone."""
    if kind == NORM:
        native_rms_norm(a, weight, out, rows, width, number)
    elif kind == SILU_TIMES:
        native_silu_times(a, a_row, b, b_row, out, rows, width)
    else:
        _add(a, b, out, rows * width)


@njit(inline="always", **OPTIONS)
def _add(a_at, b_at, out_at, count):
    a, b = carray(pointer(a_at), (count,), np.uint16), carray(pointer(b_at), (count,), np.uint16)
    out = carray(pointer(out_at), (count,), np.uint16)
    for i in range(count):
        out[i] = half(wide(a[i]) + wide(b[i]))

"""A traced decoder layer as one call: if all operations of its graph have kernels, the kernels run one after the other
without Python in between. That halves a small model's time.

`Tape.ops` has the operations, `Tape.weights_of` the addresses of a layer's weights, `view_record` the pass's data.
Values are columns of buffers of M rows of bfloat16: buffer 0 is the layer's input, the last one its output. Every value
is rounded as the graph rounds it, so that tape and graph give the same bits.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Mapping
from ctypes import addressof
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor, fx

from . import layer_ops
from .attention import ATTENTION, attention_function
from .base import OPTIONS, address_of, as_function, copy_halves, half, new_record, pointer, record, record_at, wide
from .int_products import PRODUCT, NativeInt4Linear, product_function, product_room
from .layer_ops import native_rms_norm, native_silu_times
from .threads import call, range_of_thread, run_in_threads, task_record, thread_of, threads, use_threads, wait_for_all

NORM, MULTIPLY, ADD, SILU_TIMES, ATTEND = range(5)
# a, b, c, out: numbers of buffers · …_column: the first column there · width: columns of a · bits: of a product's
# weights · dim … kv_heads: attention's · number: ε or scaling
Operation = record(
    "kind a a_column b b_column c c_column out width bits dim value_dim window heads kv_heads", number=ctypes.c_double
)
OPERATION = np.dtype(Operation)
OPERATION_BYTES = OPERATION.itemsize
TapeTask = task_record(
    "ops count buffers num_buffers weights pass_view keys keys_size values values_size kept x out between width rows "
    "layers multiply attend"
)
TAPE = np.dtype(TapeTask)


class Value(NamedTuple):
    """Columns of a buffer. dim: a head's size, once the columns are viewed as heads"""

    buffer: int
    column: int
    width: int
    dim: int = 0


class NoTape(Exception):
    """The graph has an operation without a kernel."""


class Tape:
    """ops: an array of Operation · buffers (n, 2) int64: each buffer's first column, and its width"""

    def __init__(self, graph: fx.Graph, order: dict[fx.Node, int], inputs: list[Any], attend: Any) -> None:
        """order: the index of each graph input · inputs: a layer's; None for what the model passes in · attend: the
        operator that rotates and attends. Raises NoTape."""
        self._inputs, self._attend = inputs, attend
        self._ops: list[Any] = []
        self._widths: list[int] = []
        self._weights: list[int] = []  # each operation's weights: the index of that input, -1: none
        self._values: dict[fx.Node, Any] = {}
        self.positions: tuple[int, ...] = ()  # the indices of cosines and sines among the inputs
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
        self.width = int(starts[-1])  # of all buffers between the input and the output
        self.ops = (Operation * len(self._ops))(*self._ops)
        self.room = max(_room(op) for op in self._ops)  # 16-bit numbers of scratch for each row
        del self._inputs, self._attend, self._values, self._order, self._ops

    def weights_of(self, inputs: list[Any]) -> np.ndarray:
        """(O, 2) addresses: the weights that each operation reads in a layer, and their scales."""
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
        """Hidden states are a buffer; only attention reads positions."""
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
        return self._put(MULTIPLY, [x], layer.out_features, weights=place, bits=layer.bits)

    def _attention(self, query: Any, key: Any, value: Any, cos: Any, sin: Any, scaling: float, window: int) -> Value:
        q, k, v = (self._value(node) for node in (query, key, value))
        places = tuple(self._order.get(node, -1) for node in (cos, sin))
        if not q.dim or q.dim != k.dim or not v.dim or -1 in places or self.positions not in ((), places):
            raise NoTape
        self.positions = places
        heads, kv_heads = q.width // q.dim, k.width // k.dim
        shape = {"dim": k.dim, "value_dim": v.dim, "window": window, "heads": heads, "kv_heads": kv_heads}
        return self._put(ATTEND, [q, k, v], heads * v.dim, number=scaling, **shape)

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

    def _put(self, kind: int, values: list[Value], width: int, weights: int = -1, **fields: Any) -> Value:
        self._widths.append(width)
        out = len(self._widths) - 1
        for name, value in zip("abc", values, strict=False):
            fields |= {name: value.buffer, f"{name}_column": value.column}
        self._ops.append(Operation(kind=kind, out=out, width=values[0].width, **fields))
        self._weights.append(weights)
        return Value(out, 0, width)

    def _end(self, out: Any) -> None:
        value = self._value(out[0]) if len(out) == 1 else None
        if value is None or value.buffer != len(self._widths) - 1 or value.column:
            raise NoTape


def _room(op: Any) -> int:
    """Scratch of a row of M, in 16-bit numbers: a product's inputs as integers, or rotated queries and keys."""
    if op.kind == MULTIPLY:
        return product_room(op.width)
    return (op.heads + op.kv_heads) * op.dim if op.kind == ATTEND else 0


class TapeRun:
    """A tape with its buffers."""

    def __init__(self, tape: Tape) -> None:
        self.tape, self._between = tape, torch.empty(0, dtype=torch.bfloat16)

    def __call__(
        self, x: Tensor, weights: np.ndarray, view: Any, keys: Tensor, values: Tensor, kept: Mapping[int, Tensor]
    ) -> Tensor:
        """x (1, M, H) → (1, M, H), through L layers. weights (L, O, 2) · view: attention.view_record's · keys, values:
        these layers' slabs, (L, S, C, kv_heads, dim) · kept: by layer's number, a tensor (1, M, H) that receives
        the layer's input"""
        tape, rows, out = self.tape, x.shape[1], torch.empty_like(x)
        inputs = np.zeros(len(keys), np.int64)
        for layer, hidden in kept.items():
            inputs[layer] = hidden.data_ptr()
        width = tape.width + x.shape[2] + tape.room  # x.shape[2]: every other layer's output
        if self._between.numel() < rows * width:
            self._between = torch.empty(rows * width, dtype=torch.bfloat16)
        task = TapeTask(*threads().given(), multiply=product_function(), attend=attention_function())
        task.ops, task.count, task.weights = addressof(tape.ops), len(tape.ops), weights.ctypes.data
        task.buffers, task.num_buffers = tape.buffers.ctypes.data, len(tape.buffers)
        task.pass_view, task.kept, task.rows, task.layers = addressof(view), inputs.ctypes.data, rows, len(keys)
        task.keys, task.keys_size = keys.data_ptr(), 2 * keys.stride(0)
        task.values, task.values_size = values.data_ptr(), 2 * values.stride(0)
        task.x, task.out, task.between, task.width = x.data_ptr(), out.data_ptr(), self._between.data_ptr(), tape.width
        _run(addressof(task), tape_function())
        return out


@njit(cache=True, **OPTIONS)
def _run(task_at, function):
    run_in_threads(record_at(task_at, TAPE), function)


@as_function
def tape_function(task_at):
    """One thread's share of every operation.

    In operations that read each row alone, a thread always computes the same rows. Products and attention divide their
    work anew: inside them all threads wait for each other after their own rows, and once more at the end."""
    task = record_at(task_at, TAPE)
    thread = thread_of(task)
    count, rows, layers, num_buffers = task.count, task.rows, task.layers, task.num_buffers
    buffers = carray(pointer(task.buffers), (num_buffers, 2), np.int64)
    weights = carray(pointer(task.weights), (layers, count, 2), np.int64)
    kept = carray(pointer(task.kept), (layers,), np.int64)
    product, attention = new_record(PRODUCT), new_record(ATTENTION)
    use_threads(product, task)
    use_threads(attention, task)
    addresses = np.empty(num_buffers, np.int64)
    for i in range(num_buffers):
        addresses[i] = task.between + 2 * rows * buffers[i, 0]
    addresses[num_buffers - 1] = task.x
    spare = task.between + 2 * rows * task.width
    product.rows, attention.pass_view = rows, task.pass_view
    product.room = attention.query = spare + 2 * rows * buffers[0, 1]
    first, end = range_of_thread(rows, task, thread)
    mine = end - first
    for step in range(layers * count):
        layer, i = step // count, step % count
        if i == 0:
            addresses[0] = addresses[num_buffers - 1]
            addresses[num_buffers - 1] = task.out if (layers - layer) % 2 else spare
            if kept[layer]:
                begin = 2 * first * buffers[0, 1]
                copy_halves(addresses[0] + begin, kept[layer] + begin, mine * buffers[0, 1])
        op = record_at(task.ops + i * OPERATION_BYTES, OPERATION)
        width, out = op.width, addresses[op.out]
        a = addresses[op.a] + 2 * op.a_column
        b = addresses[op.b] + 2 * op.b_column
        c = addresses[op.c] + 2 * op.c_column
        a_row, b_row, c_row = buffers[op.a, 1], buffers[op.b, 1], buffers[op.c, 1]
        if op.kind == MULTIPLY:
            product.x, product.inputs = a, width
            product.weights, product.scales, product.bits = weights[layer, i, 0], weights[layer, i, 1], op.bits
            product.out, product.outputs = out, buffers[op.out, 1]
            call(task.multiply, address_of(product))
            wait_for_all(task)
        elif op.kind == ATTEND:
            attention.keys = task.keys + layer * task.keys_size
            attention.values = task.values + layer * task.values_size
            attention.out, attention.window, attention.scaling = out, op.window, op.number
            attention.heads, attention.kv_heads = op.heads, op.kv_heads
            attention.dim, attention.value_dim = op.dim, op.value_dim
            attention.raw_query, attention.raw_query_head, attention.raw_query_token = a, op.dim, a_row
            attention.raw_key, attention.raw_key_head, attention.raw_key_token = b, op.dim, b_row
            attention.raw_value, attention.raw_value_head, attention.raw_value_token = c, op.value_dim, c_row
            call(task.attend, address_of(attention))
            wait_for_all(task)
        else:
            a, b = a + 2 * first * a_row, b + 2 * first * b_row
            _own_rows(op, a, a_row, b, b_row, weights[layer, i, 0], out + 2 * first * width, mine)


@njit(inline="always", **OPTIONS)
def _own_rows(op, a, a_row, b, b_row, weight, out, rows):
    """An operation that reads each row alone."""
    width = op.width
    if op.kind == NORM:
        native_rms_norm(a, weight, out, rows, width, op.number)
    elif op.kind == SILU_TIMES:
        native_silu_times(a, a_row, b, b_row, out, rows, width)
    else:
        _add(a, b, out, rows * width)


@njit(inline="always", **OPTIONS)
def _add(a_at, b_at, out_at, count):
    a, b = carray(pointer(a_at), (count,), np.uint16), carray(pointer(b_at), (count,), np.uint16)
    out = carray(pointer(out_at), (count,), np.uint16)
    for i in range(count):
        out[i] = half(wide(a[i]) + wide(b[i]))

"""The decoder layers of a CPU's passes, traced from the model's own code (forward/trace.py), without a compiler. In the
graph, products of one input become one product, and known chains of small operations become kernels of layer_ops.py.

In a Hugging Face layer of a small model, Python and dispatch take three times as long as the products. The model keeps
its modules. The kernels are for bfloat16 only.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ...errors import reason_of
from ..forward.hidden_tap import decoder_layers
from ..forward.passes import HfPass
from ..forward.trace import EXAMPLE, LINEAR, Operator, TracedLayer, layer_calls, layer_kind
from ..forward.tree_forward import TreeForward
from ..forward.view import View
from ..weights.int4 import Int4Linear
from ..weights.int8 import Int8Linear
from . import layer_ops
from .attention import fits, fits_slab, rotated_attention, view_record
from .tape import NoTape, Tape, TapeRun
from .whole_pass import Call, NativePass, OtherPass, calls_of, hands_on, noted

aten = torch.ops.aten
LAST = torch.iinfo(torch.int64).max  # the end of a slice without an end
# a tensor's method or Python's own operator costs less than these operators of ATen
METHODS = {
    aten.view.default: "view", aten.transpose.int: "transpose", aten.reshape.default: "reshape",
    aten.unsqueeze.default: "unsqueeze", aten.split_with_sizes.default: "split_with_sizes",
}  # fmt: skip
OPERATORS = {aten.add.Tensor: operator.add, aten.mul.Tensor: operator.mul}


def native_layers(forward: TreeForward, check: Callable[[], float]) -> str:
    """Use native layers if they pass the self-test; → a note. check: selftest.check of packed passes"""
    own = forward.active
    assert isinstance(own, HfPass)
    try:
        layers = NativeLayers(forward, decoder_layers(forward.model))
    except Exception as reason:  # tracing runs a model's code, which may raise anything
        return f"decoder layers stay as they are ({reason_of(reason)})"
    try:
        forward.use(layers.over(own))
        error = check()
    except Exception as reason:  # as above
        forward.use(own)
        layers.close()
        return f"decoder layers stay as they are ({reason_of(reason)})"
    note = f"decoder layers are traced, {layers.kernels} of their operations are kernels (difference {error:.1e})"
    if layers.around is not None:
        forward.use(layers.around)
    elif layers.kernels:
        note += f"; around them the model's own code runs, because {layers.apart}"
    return note


class _RotatingOperator(Operator):
    """Rotary positions and attention as one kernel, for layers that rotate just before attention."""

    def attend_rotated(
        self, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, scaling: float, window: int
    ) -> Tensor:
        forward, view, layer = self.forward, self.forward.view, self.layer
        slabs = forward.cache.keys[layer], forward.cache.values[layer]
        dense = query.stride(3) == key.stride(3) == value.stride(3) == cos.stride(2) == sin.stride(2) == 1
        if forward.exact and dense and view is not None and fits(query, *slabs, view):
            return rotated_attention(query, key, value, cos, sin, slabs, view, scaling, window or None)
        turned = layer_ops.rotate(query, cos, sin), layer_ops.rotate(key, cos, sin)
        return forward.attend_in(layer, *turned, value, scaling, window or None)


class NativeLayers:
    """A TreeForward's traced layers, for packed passes (all rows as one), until `close`."""

    def __init__(self, forward: TreeForward, layers: nn.ModuleList) -> None:
        self._forward, self._layers = forward, list(layers)
        self._operator = _RotatingOperator(forward)
        try:
            self._trace()
        except BaseException:
            self.close()
            raise

    def _trace(self) -> None:
        with noted(self._forward.model, self._layers) as seen:
            calls = layer_calls(self._forward, self._layers, EXAMPLE)
        made: dict[str, _Native] = {}
        self._functions: list[Callable[..., Any]] = []
        self._inputs: list[list[Any]] = []
        self._natives: list[_Native] = []
        weights: list[Any] = []
        self._seen: Any = None  # the pass's view_record, for a tape
        for index, layer in enumerate(self._layers):
            kind = repr((layer_kind(layer), [(name, type(module)) for name, module in layer.named_modules()]))
            if kind not in made:
                with _plain_linears(layer) as products:
                    made[kind] = _Native(layer, *calls[index], self._operator, products)
            native = made[kind]
            self._natives.append(native)
            self._inputs.append(native.inputs_of(layer))
            tape = native.tape_over(self._inputs[-1], self._operator)
            weights.append(None if tape is None else tape.tape.weights_of(self._inputs[-1]))
        self._alike = len(made) == 1 and weights[0] is not None
        self._weights: Any = np.stack(weights) if self._alike else weights
        onwards = self._alike and hands_on(calls_of(self._layers, seen))
        self._ends = [self._end_of(index) if onwards else index + 1 for index in range(len(self._layers))]
        self._ahead: Any = None
        self._end = 0  # the layer before which the last tape ended; its output is _ahead
        self.kernels = sum(native.kernels for native in made.values())
        self._shared: tuple[Any, ...] = ()
        self.around, self.apart = self._around(seen) if self._alike else (None, "its layers do not run as one call")

    def over(self, own: HfPass) -> HfPass:
        """The pass that runs these layers. own: the model's pass"""
        forwards = {layer: partial(self.call, index, layer) for index, layer in enumerate(self._layers)}
        return replace(own, layers=self, forwards=forwards, packs=True)

    def _around(self, seen: list[Call]) -> tuple[NativePass | None, str]:
        """The pass without the model's own code, or the reason why there is none."""
        tape, own = self._natives[0].tape, self._forward.active
        assert tape is not None
        assert isinstance(own, HfPass)
        try:
            return NativePass(self._forward, self.over(own), self._layers, seen, tape, self._weights), ""
        except OtherPass as reason:
            return None, str(reason)

    def call(self, index: int, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if index < self._end and args and args[0] is self._ahead:
            return self._ahead  # an earlier layer's tape has run this layer too
        view, native = self._forward.view, self._natives[index]
        if view is None or not view.packed or not args:
            return type(layer).forward(layer, *args, **kwargs)
        mine = (view, native, *args[1:], *kwargs.values())
        if len(mine) != len(self._shared) or any(a is not b for a, b in zip(mine, self._shared, strict=True)):
            leaves, spec = pytree.tree_flatten((args, kwargs))
            if not native.traced.takes(leaves, spec):
                return type(layer).forward(layer, *args, **kwargs)
            self._shared, self._tensors = mine, [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            self._seen = self._view_record(view, native)
        if native.tape is not None and self._seen is not None and args[0].is_contiguous():
            cache, self._end = self._forward.cache, self._ends[index]
            span = slice(index, self._end)
            self._ahead = native.tape(
                args[0],
                self._weights[span] if self._alike else self._weights[index],
                self._seen,
                cache.keys[span],
                cache.values[span],
                {},
            )
            return self._ahead
        self._operator.layer = index
        inputs = self._inputs[index].copy()
        self._tensors[0] = args[0]
        for place, tensor in native.given:
            inputs[place] = self._tensors[tensor]
        return native.out(native.run(*inputs))

    def _end_of(self, index: int) -> int:
        """The layer before which one call must end: the hidden tap has to see the inputs that it reads."""
        read = [place for place in self._forward.tap.layers if place > index]
        return min(read, default=len(self._layers))

    def _view_record(self, view: View, native: _Native) -> Any:
        """The pass's data for a tape; None where the graph runs without one."""
        cache = self._forward.cache
        if native.tape is None or not self._forward.exact or not fits_slab(cache.keys, cache.values, view):
            return None
        places = dict(native.given)
        cos, sin = (self._tensors[places[place]] for place in native.tape.tape.positions)
        if cos.stride(2) != 1 or sin.stride(2) != 1:
            return None
        return view_record(view, cache.keys.shape[2], cos, sin)

    def close(self) -> None:
        self._operator.close()
        self._shared, self._seen, self._ahead = (), None, None


class _Native:
    """One kind of layer. given: pairs of a graph input's index and the index of the model's tensor that it gets."""

    def __init__(
        self, layer: nn.Module, args: Any, kwargs: Any, attention: Any, products: dict[str, nn.Module]
    ) -> None:
        self.traced = traced = TracedLayer(layer, args, kwargs, attention, False)
        graph = traced.graph.graph
        places = [node for node in graph.nodes if node.op == "placeholder"]
        names = dict(zip(places, traced.inputs, strict=True))
        self._merged = _use_products(graph, names, products)
        for node in list(graph.nodes):
            if node.target is aten._assert_tensor_metadata.default:
                graph.erase_node(node)
        self.kernels = sum(_replace(graph, node, names) for node in list(graph.nodes))
        for node in list(graph.nodes):
            # compared by name: when an older operator of this name is collected, torch.ops loses this one's object
            if str(node.target) == str(attention.call):
                node.target = attention.attend
                query, key, *rest = node.args
                turns = layer_ops.rotate
                if _is(query, turns) and _is(key, turns) and query.args[1:] == key.args[1:]:
                    node.target = attention.attend_rotated
                    node.args = (query.args[0], key.args[0], rest[0], *query.args[1:], *rest[1:])
        graph.eliminate_dead_code()
        _cheapen(graph)
        kept = [place for place in places if place.users]
        for place in places:
            if not place.users:
                graph.erase_node(place)
        order = {place: number for number, place in enumerate(place for place in places if not names[place])}
        self.given = [(at, order[place]) for at, place in enumerate(kept) if not names[place]]
        self._names = [names[place] for place in kept]
        graph.lint()
        traced.graph.recompile()
        self.run = traced.graph.forward
        self.single = traced.out_spec.is_leaf()
        self._order = {place: at for at, place in enumerate(kept)}
        self.tape: TapeRun | None = None

    def tape_over(self, inputs: list[Any], attention: Any) -> TapeRun | None:
        """The graph as one call, built from the first layer's inputs; None where an operation has no kernel."""
        if self.tape is None and self.single:
            with suppress(NoTape):
                self.tape = TapeRun(Tape(self.traced.graph.graph, self._order, inputs, attention.attend_rotated))
        return self.tape

    def out(self, made: Any) -> Any:
        """The graph's output in the form of the layer's output."""
        return made[0] if self.single else pytree.tree_unflatten(made, self.traced.out_spec)

    def inputs_of(self, layer: nn.Module) -> list[Any]:
        """A layer's weights and products in the order of the graph's inputs; None for what the model passes in."""
        known: dict[str, Any] = dict(layer.named_parameters(remove_duplicate=False))
        known |= dict(layer.named_buffers(remove_duplicate=False)) | self.traced.constants
        for names in self._merged:
            parts: list[Any] = [layer.get_submodule(name) for name in names]
            known[f"{names[0]}.weight"] = parts[0] if len(parts) == 1 else type(parts[0]).merged(parts)
        return [known[name] if name else None for name in self._names]


@contextmanager
def _plain_linears(layer: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """In this context empty linear layers replace products of every kind, for tracing; → the replaced modules."""
    found: dict[str, nn.Module] = {
        name: module
        for name, module in layer.named_modules()
        if isinstance(module, Int4Linear | Int8Linear) or type(module) is nn.Linear
    }
    for name, module in found.items():
        bias = module.bias is not None
        empty = nn.Linear(module.in_features, module.out_features, bias, dtype=torch.bfloat16)  # type: ignore[arg-type]
        layer.set_submodule(name, empty.requires_grad_(False))
    try:
        yield found
    finally:
        for name, module in found.items():
            layer.set_submodule(name, module)


def _use_products(graph: fx.Graph, names: dict[fx.Node, str], products: dict[str, nn.Module]) -> list[list[str]]:
    """Let linear nodes call the layer's modules, merged where input and kind agree; → the modules' names by call"""
    groups: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        name = names.get(node.args[1], "").removesuffix(".weight") if node.target is LINEAR else ""
        if name in products:
            merges = hasattr(products[name], "merged") and products[name].bias is None
            groups.setdefault((node.args[0], type(products[name])) if merges else node, []).append(node)
    found = []
    for nodes in groups.values():
        mine = [names[node.args[1]].removesuffix(".weight") for node in nodes]  # type: ignore[index]
        if len(nodes) > 1 and not type(products[mine[0]]).can_merge([products[name] for name in mine]):  # type: ignore[attr-defined]
            for node, name in zip(nodes, mine, strict=True):
                node.target, node.args = _product, node.args[:2]
                found.append([name])
            continue
        first, sizes = nodes[0], [node.meta["val"].shape[-1] for node in nodes]
        first.target, first.args = _product, first.args[:2]
        found.append(mine)
        if len(nodes) > 1:
            at = first
            start = 0
            for node, size in zip(nodes, sizes, strict=True):
                with graph.inserting_after(at):
                    at = graph.call_function(_part, (first, start, start + size))
                at.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(at, delete_user_cb=lambda user: user.target is not _part)
                start += size
            for node in nodes[1:]:
                graph.erase_node(node)
    return found


def _product(x: Tensor, module: Any) -> Tensor:
    return module.forward(x)


def _part(x: Tensor, start: int, end: int) -> Tensor:
    return x[..., start:end]


# ---- chains of operations that become one kernel ---------------------------------------------------------------------


def _replace(graph: fx.Graph, node: fx.Node, names: dict[fx.Node, str]) -> bool:
    """Replace the chain that ends in this node by a kernel; → whether there is such a kernel."""
    for known in (_as_rms_norm, _as_silu_times, _as_rotation):
        call = known(node, names)
        if call is not None:
            with graph.inserting_before(node):
                made = graph.call_function(*call)
            made.meta = node.meta
            node.replace_all_uses_with(made)
            graph.eliminate_dead_code()
            return True
    return False


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def _either_way(node: fx.Node, target: Any) -> list[tuple[Any, Any]]:
    """The two arguments of a sum or product in both orders."""
    if not _is(node, target) or len(node.args) != 2:
        return []
    a, b = node.args
    return [(a, b), (b, a)]


def _as_rms_norm(node: fx.Node, names: dict[fx.Node, str]) -> Any:
    """weight · bf16(x32 · rsqrt(mean(x32²) + ε))"""
    for weight, normed in _either_way(node, aten.mul.Tensor):
        if weight not in names or not _is(normed, aten.to.dtype) or normed.args[1] != torch.bfloat16:
            continue
        for x32, root in _either_way(normed.args[0], aten.mul.Tensor):
            if not (_is(x32, aten.to.dtype) and x32.args[1] == torch.float32 and _is(root, aten.rsqrt.default)):
                continue
            for mean, epsilon in _either_way(root.args[0], aten.add.Tensor):
                if isinstance(epsilon, float) and _is(mean, aten.mean.dim) and mean.args[1:] == ([-1], True):
                    square, x = mean.args[0], x32.args[0]
                    right = _is(square, aten.pow.Tensor_Scalar) and square.args == (x32, 2)
                    if right and _bfloat16(x, weight):
                        return layer_ops.rms_norm, (x, weight, epsilon)
    return None


def _as_silu_times(node: fx.Node, names: dict[fx.Node, str]) -> Any:
    for active, up in _either_way(node, aten.mul.Tensor):
        if _is(active, aten.silu.default) and _bfloat16(active.args[0], up) and up.meta["val"].dim() == 3:
            return layer_ops.silu_times, (active.args[0], up)
    return None


def _as_rotation(node: fx.Node, names: dict[fx.Node, str]) -> Any:
    """x · cos + cat(-x's second half, x's first half) · sin"""
    for straight, turned in _either_way(node, aten.add.Tensor):
        for x, cos in _either_way(straight, aten.mul.Tensor):
            for halves, sin in _either_way(turned, aten.mul.Tensor):
                if not (_is(cos, aten.unsqueeze.default) and _is(sin, aten.unsqueeze.default)):
                    continue
                if not (cos.args[1] == sin.args[1] == 1 and _bfloat16(x, cos, sin) and x.meta["val"].dim() == 4):
                    continue
                dim = x.meta["val"].shape[-1]
                if dim == cos.meta["val"].shape[-1] and _is_half_turn(halves, x, dim):
                    return layer_ops.rotate, (x, cos.args[0], sin.args[0])
    return None


def _is_half_turn(node: Any, x: fx.Node, dim: int) -> bool:
    if not _is(node, aten.cat.default) or node.args[1:] not in ((-1,), (3,)) or len(node.args[0]) != 2:
        return False
    negative, first = node.args[0]
    second: Any = negative.args[0] if _is(negative, aten.neg.default) else None
    ranges = [part.args if _is(part, aten.slice.Tensor) else () for part in (first, second)]
    return ranges == [(x, 3, 0, dim // 2), (x, 3, dim // 2, LAST)]


def _bfloat16(*nodes: Any) -> bool:
    return all(isinstance(node, fx.Node) and node.meta["val"].dtype == torch.bfloat16 for node in nodes)


def _cheapen(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.target in METHODS and not node.kwargs:
            node.op, node.target = "call_method", METHODS[node.target]
        elif node.target in OPERATORS and not node.kwargs:
            node.target = OPERATORS[node.target]

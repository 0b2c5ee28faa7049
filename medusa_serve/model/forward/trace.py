"""A decoder layer as a function of its weights: torch.export traces the model's own code, and projections of the same
input become one product.

Tracing does not look into the attention, which is an operator. Layers share a function only if they differ in nothing
but weights and number.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..drafting.tree import Tree
from .tree_forward import TreeForward
from .view import tree_view

SPACE = "medusa_serve"  # namespace of the operators
EXAMPLE = 37  # tokens of the traced pass: no other dimension in a layer has this size
LINEAR = torch.ops.aten.linear.default


class Operator:
    """Write the layer's keys and values, and attend: `TreeForward.attend_in` as an operator of torch's. Its name is the
    same in every process, so that Inductor finds its files on disk again."""

    def __init__(self, forward: TreeForward) -> None:
        self.layer, self.muted = 0, False  # muted: it does not attend, and its output is empty memory
        self._library = torch.library.Library(SPACE, "FRAGMENT")
        taken = getattr(torch.ops, SPACE)
        name = next(f"attend_{number}" for number in count() if not hasattr(taken, f"attend_{number}"))
        self._library.define(f"{name}(Tensor query, Tensor key, Tensor value, float scaling, int window) -> Tensor")

        me = weakref.ref(self)  # torch never drops a registered function, and a strong reference would keep the model

        def shape(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int) -> Tensor:
            return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])

        def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int) -> Tensor:
            own = me()
            assert own is not None
            return (shape if own.muted else own.attend)(query, key, value, scaling, window)

        self._library.impl(name, attend, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{SPACE}::{name}", shape, lib=self._library)
        self.call: Callable[..., Tensor] = getattr(taken, name).default
        self.forward = forward

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int) -> Tensor:
        """The operator without the dispatcher, for layers that are not compiled."""
        return self.forward.attend_in(self.layer, query, key, value, scaling, window or None)

    def tracing(self) -> Any:
        return self.forward.traced_with(self.call)

    def close(self) -> None:
        self._library._destroy()
        del self.forward  # export keeps all traced graphs of the process, and they refer to this operator


class TracedLayer:
    """One layer's code as a graph of its weights and of the model's arguments for it."""

    def __init__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], attention: Operator, merge: bool
    ) -> None:
        leaves, self._spec = pytree.tree_flatten((args, kwargs))
        self._rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        self.example = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        tensors = tuple(self.example)
        self.single = tensors[0].shape[1] == 1
        many = torch.export.Dim("M", min=2)
        self._moving = [
            [dim for dim, size in enumerate(tensor.shape) if size == EXAMPLE and not self.single] for tensor in tensors
        ]
        out_specs: list[Any] = []
        module = _Layer(layer, self._spec, self._rest, self._is_tensor, out_specs.append)
        with attention.tracing(), torch.no_grad():
            shapes = tuple(dict.fromkeys(dims, many) for dims in self._moving)
            program = torch.export.export(module, tensors, dynamic_shapes={"tensors": shapes}, strict=False)
        self.out_spec = out_specs[-1]
        self.graph = program.graph_module
        kinds = torch.export.graph_signature.InputKind
        self.inputs: list[str] = []  # of the graph, in order: a weight's name, or "" for an argument of the model
        self.constants = {}
        for spec in program.graph_signature.input_specs:
            name = "" if spec.kind == kinds.USER_INPUT else str(spec.target)
            if spec.kind == kinds.CONSTANT_TENSOR:
                self.constants[name] = program.constants[name]
            self.inputs.append(name.removeprefix("layer."))
        self.merged: list[list[str]] = []  # names of the linear layers that became one product
        if merge:
            self._merge()
        self.graph.graph.set_codegen(torch.fx.graph.CodeGen())  # export's code unpacks its arguments by pytree
        self.graph.recompile()
        self._compiled: Any = None

    def _merge(self) -> None:
        """Make products of the same input one product, with their weights stacked. The first one's place in the inputs
        takes the stacked weight; the places of the others are no longer read."""
        graph = self.graph.graph
        name_of = dict(zip((n for n in graph.nodes if n.op == "placeholder"), self.inputs, strict=True))
        groups: dict[Any, list[Any]] = {}
        for node in graph.nodes:
            if (
                node.op == "call_function"
                and node.target is LINEAR
                and name_of.get(node.args[1], "").endswith(".weight")
            ):
                groups.setdefault(node.args[0], []).append(node)
        for linears in groups.values():
            names = [name_of[node.args[1]].removesuffix(".weight") for node in linears]
            biases = [name_of.get(node.args[2]) if len(node.args) > 2 else None for node in linears]
            shared = any(len(place.users) > 1 for node in linears for place in node.args[1:] if place is not None)
            if len(linears) < 2 or shared or biases not in ([None] * len(names), [f"{name}.bias" for name in names]):
                continue
            sizes = [node.args[1].meta["val"].shape[0] for node in linears]
            with graph.inserting_after(linears[0]):
                parts = graph.call_function(torch.ops.aten.split_with_sizes.default, (linears[0], sizes, -1))
            at = parts
            for place, node in enumerate(linears):
                with graph.inserting_after(at):
                    at = graph.call_function(operator.getitem, (parts, place))
                node.replace_all_uses_with(at, delete_user_cb=lambda user, whole=parts: user is not whole)
            for node in linears[1:]:
                graph.erase_node(node)
            self.merged.append(names)
        graph.lint()

    def takes(self, leaves: list[Any], spec: Any) -> bool:
        """Whether a call has the form of the traced one."""
        if spec != self._spec or [isinstance(leaf, Tensor) for leaf in leaves] != self._is_tensor:
            return False
        pairs = zip(self._rest, leaves, strict=True)
        return all(kept is None or kept is leaf or kept == leaf for kept, leaf in pairs)

    def weights_of(self, layer: nn.Module, merged: dict[str, Tensor]) -> list[Tensor | None]:
        """A layer's weights in the order of the graph's inputs; None: an argument of the model."""
        known = dict(layer.named_parameters(remove_duplicate=False)) | dict(layer.named_buffers(remove_duplicate=False))
        known |= self.constants | merged
        return [known[name] if name else None for name in self.inputs]

    def run(self, weights: list[Tensor | None], tensors: list[Tensor], compiled: bool) -> Any:
        for tensor, dims in zip(tensors, self._moving, strict=True):
            for dim in dims:
                torch._dynamo.mark_dynamic(tensor, dim)
        given = iter(tensors)
        inputs = [next(given) if weight is None else weight for weight in weights]
        if compiled and self._compiled is None:
            # one row reads each weight once: Inductor writes such a product as a sum, and tunes how it reads
            options: Any = {"coordinate_descent_tuning": True} if self.single else {}
            self._compiled = torch.compile(self.graph.forward, fullgraph=True, dynamic=False, options=options)
        out = (self._compiled if compiled else self.graph.forward)(*inputs)
        return pytree.tree_unflatten(out, self.out_spec)


class _Layer(nn.Module):
    """The module that is traced: its inputs are tensors; the model's other arguments are fixed."""

    def __init__(
        self, layer: nn.Module, spec: Any, rest: list[Any], is_tensor: list[bool], note: Callable[[Any], None]
    ) -> None:
        """note: takes the form of the output: export restores attributes, so the module cannot keep it"""
        super().__init__()
        self.layer = layer
        self._call = (spec, rest, is_tensor, note)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        spec, rest, is_tensor, note = self._call
        given = iter(tensors)
        leaves = [next(given) if tensor else kept for tensor, kept in zip(is_tensor, rest, strict=True)]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        out, out_spec = pytree.tree_flatten(type(self.layer).forward(self.layer, *args, **kwargs))
        note(out_spec)
        return tuple(out)


def layer_calls(forward: TreeForward, layers: list[nn.Module], tokens: int) -> list[tuple[Any, dict[str, Any]]]:
    """The arguments of each layer in a packed pass of `tokens` tokens: (args, kwargs)."""
    found: list[tuple[Any, dict[str, Any]]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kwargs: found.append((args, kwargs)), with_kwargs=True)
        for layer in layers
    ]
    device = forward.cache.keys.device
    chain = Tree(num_lookup=tokens - 1).draft(torch.ones(1, tokens, dtype=torch.int64, device=device))
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    try:
        with torch.no_grad(), forward.aside():
            forward.run(chain.tokens, tree_view(zero, zero, [0], [0], chain, packed=True))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def layer_kind(layer: nn.Module) -> str:
    """Everything that a layer's code may depend on, except the weights' values and the layer's number."""
    plain = (bool, int, float, str, type(None), tuple)
    found = []
    for name, module in layer.named_modules():
        values = {key: value for key, value in vars(module).items() if isinstance(value, plain) and key != "layer_idx"}
        found.append((name, type(module).__qualname__, sorted(values.items(), key=lambda item: item[0])))
    tensors = [*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)]
    return repr((found, [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors]))


@torch.no_grad()
def merge_weights(layer: nn.Module, groups: list[list[str]]) -> dict[str, Tensor]:
    """One tensor for each group, and the layers' weights become views of it; → tensors by the first weight's name."""
    merged: dict[str, Tensor] = {}
    for names in groups:
        modules = [layer.get_submodule(name) for name in names]
        for part in ("weight", "bias"):
            own: list[Any] = [getattr(module, part) for module in modules]
            if own[0] is not None:
                stacked = torch.cat([tensor.detach() for tensor in own])
                for tensor, rows in zip(own, stacked.split([len(tensor) for tensor in own]), strict=True):
                    tensor.data = rows
                merged[f"{names[0]}.{part}"] = nn.Parameter(stacked, requires_grad=False)  # of fixed sizes
    return merged

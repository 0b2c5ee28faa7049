"""The decoder layers of a GPU's passes as one function of their weights: traced from the model's own code by
torch.export, projections of one input made one product, compiled by Inductor, and called for every layer.

A Hugging Face layer launches forty small kernels around its seven products; compiled it launches a dozen around four.
The attention stays as it is, an operator that tracing does not look into. The model keeps its modules: a merged weight
is one tensor, and the layers' own weights become views of its rows. Layers that differ in anything but weights and
number get functions of their own.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Generator, Iterator
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...errors import reason_of
from ..drafting.tree import Tree
from ..parts import imported
from ..process_lock import give_back
from ..weights.nf4 import scales_of
from .view import tree_view

if TYPE_CHECKING:
    from .tree_forward import TreeForward

SPACE = "medusa_serve"  # of the operators
EXAMPLE = 37  # tokens of the traced pass: a size that nothing else in a layer has
GIVEN_BACK = 1 << 24  # bytes of a layer's merged weights from which the separate ones' memory is given back at once
LINEAR = torch.ops.aten.linear.default


class FusedLayers:
    """Stands in for the forward of a TreeForward's decoder layers, in passes that see all rows as one, from
    `take_place` until `step_aside` or `close`. `make` comes first, and `compile` where compiled functions are wanted:
    both go part by part, and meanwhile the model runs as it is.

    compiled False: the traced functions run as they are, with merged products alone (no Triton, or no wish to wait).
    """

    def __init__(self, forward: TreeForward, layers: nn.ModuleList, *, merge: bool = True, compiled: bool = True):
        self._forward, self._layers, self._merge = forward, list(layers), merge
        self.compiled = compiled
        self._operator = _Operator(forward)
        self._kinds: dict[str, dict[bool, _Traced]] = {}  # by what tells layers apart; whether a single token
        self._of: list[dict[bool, _Traced]] = []
        self._weights: list[dict[bool, list[Tensor | None]]] = []

    def make(self, moved: Callable[[], None]) -> Iterator[None]:
        """A function for each kind of layer and for one token and many, from what a real pass hands the layers; then
        their weights are merged, which takes them to another place. moved: called just before, since what was captured
        of the passes reads the old one. Raises PlugInError where the layers cannot be traced."""
        from .tree_forward import PlugInError

        if any(scales_of(parameter) for layer in self._layers for parameter in layer.parameters()):
            raise PlugInError("four-bit weights are not traced")
        calls = {tokens: self._calls(tokens) for tokens in (EXAMPLE, 1)}
        for index, layer in enumerate(self._layers):
            mine = self._kinds.setdefault(_facts(layer), {})
            for tokens in calls if not mine else ():
                mine[tokens == 1] = _Traced(layer, *calls[tokens][index], self._operator, self._merge)
                yield
            self._of.append(mine)
        moved()
        for layer, mine in zip(self._layers, self._of, strict=True):
            merged = _merge_weights(layer, mine[False].merged)
            if sum(weight.nbytes for weight in merged.values()) > GIVEN_BACK and torch.cuda.is_available():
                give_back()  # or the separate weights' places stay taken: two thirds of the model again
            self._weights.append({single: traced.weights_of(layer, merged) for single, traced in mine.items()})
        yield

    def compile(self) -> Iterator[None]:
        """Have Inductor make its functions, by calls whose numbers nobody reads."""
        for kind in self._kinds.values():
            index = next(index for index, mine in enumerate(self._of) if mine is kind)
            for single, traced in kind.items():
                self._operator.muted = True
                try:
                    traced.run(self._weights[index][single], traced.example, compiled=True)
                finally:
                    self._operator.muted = False
                yield

    def take_place(self) -> None:
        for index, layer in enumerate(self._layers):
            layer.__dict__["forward"] = _Stand(self, index, layer)

    def step_aside(self) -> None:
        """The layers run their own code again, over weights that lie where they were merged."""
        for layer in self._layers:
            layer.__dict__.pop("forward", None)

    def _calls(self, tokens: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What each layer is called with in a packed pass of so many tokens."""
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, kwargs: found.append((args, kwargs)), with_kwargs=True)
            for layer in self._layers
        ]
        device = self._forward.cache.keys.device
        chain = Tree(num_lookup=tokens - 1).draft(torch.ones(1, tokens, dtype=torch.int64, device=device))
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        try:
            with torch.no_grad(), self._forward.aside():
                self._forward.run(chain.tokens, tree_view(zero, zero, [0], [0], chain, packed=True))
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def call(self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's forward."""
        view = self._forward.view
        leaves, spec = pytree.tree_flatten((args, kwargs))
        traced = self._of[index][view is not None and view.packed and view.positions.numel() == 1]
        if view is None or not view.packed or not traced.takes(leaves, spec):
            return type(layer).forward(layer, *args, **kwargs)
        self._operator.layer = index
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        weights = self._weights[index][traced.single]
        return traced.run(weights, tensors, self.compiled)

    def close(self) -> None:
        self.step_aside()
        self._operator.close()


def fuse_layers(
    forward: TreeForward, check: Callable[[], float], changed: Callable[[], None], *, wanted: bool | None = None
) -> Generator[None, None, str]:
    """Give the forward fused layers if they pass the self-test, compiled if they can be, part by part; → a note.

    check: as selftest.check, of packed passes; it must touch no slot that is in use · changed: called when passes are
    no longer what was captured of them · wanted: compiled ones; None: in half precision, where fused kernels round less
    than the model's own, and not in float32, whose text is to be the model's token for token
    """
    from .tree_forward import decoder_layers

    why = "" if compiles(forward, wanted) else "float32 keeps its own kernels"
    yield from imported("torch.export._trace", *([] if why else ["torch._inductor.compile_fx"]))
    fused = FusedLayers(forward, decoder_layers(forward.model))
    try:
        try:
            yield from fused.make(changed)
        except Exception as reason:  # tracing runs a model's code: whatever it raises
            return f"decoder layers stay as they are ({reason_of(reason)})"
        for compiled in (False,) if why else (True, False):
            fused.compiled = compiled
            try:
                if compiled:
                    yield from fused.compile()
                forward.layers = fused
                fused.take_place()
                error = check()
            except Exception as reason:  # compiling runs two compilers' code: whatever they raise
                why = why or reason_of(reason)
                forward.layers = None
                fused.step_aside()
                continue
            changed()
            told = "compiled, with merged products" if compiled else f"not compiled ({why}), but with merged products"
            return f"decoder layers are {told} ({error:.1e} apart)"
        return f"decoder layers stay as they are ({why})"
    finally:
        if forward.layers is not fused:
            fused.close()


def compiles(forward: TreeForward, wanted: bool | None) -> bool:
    """Whether its layers are to be compiled; `wanted` as of fuse_layers."""
    return bool(wanted) or (wanted is None and forward.model.dtype.itemsize < 4)


class _Stand:
    """In the place of one layer's forward."""

    def __init__(self, owner: FusedLayers, index: int, layer: nn.Module) -> None:
        self._owner, self._index, self._layer = owner, index, layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._owner.call(self._index, self._layer, args, kwargs)


class _Operator:
    """Write the layer's keys and values, and attend: `TreeForward.attend_in` as an operator of torch's. Its name is the
    same in every process, so that what Inductor keeps on disk is found again."""

    def __init__(self, forward: TreeForward) -> None:
        self.layer, self.muted = 0, False  # muted: it attends to nothing, and gives nothing
        self._library = torch.library.Library(SPACE, "FRAGMENT")
        taken = getattr(torch.ops, SPACE)
        name = next(f"attend_{number}" for number in count() if not hasattr(taken, f"attend_{number}"))
        self._library.define(f"{name}(Tensor query, Tensor key, Tensor value, float scaling, int window) -> Tensor")

        me = weakref.ref(self)  # torch keeps what is registered with it for good, and a model with it

        def shape(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int) -> Tensor:
            return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])

        def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int) -> Tensor:
            own = me()
            assert own is not None
            return (shape if own.muted else own.attend)(query, key, value, scaling, window)

        self._library.impl(name, attend, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{SPACE}::{name}", shape, lib=self._library)
        self.call: Callable[..., Tensor] = getattr(taken, name).default
        self._forward = forward

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int) -> Tensor:
        """The operator without the dispatcher, where nobody compiles."""
        return self._forward.attend_in(self.layer, query, key, value, scaling, window or None)

    def attend_rotated(
        self, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, scaling: float, window: int
    ) -> Tensor:
        return self._forward.attend_rotated(self.layer, query, key, value, cos, sin, scaling, window or None)

    def tracing(self) -> Any:
        return self._forward.traced_with(self.call)

    def close(self) -> None:
        self._library._destroy()
        del self._forward  # export keeps the traced graphs of the process, and they name this operator


class _Traced:
    """One layer's code as a graph of its weights and of what the model hands it."""

    def __init__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], attention: _Operator, merge: bool
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
        self._out_spec = out_specs[-1]
        self.graph = program.graph_module
        kinds = torch.export.graph_signature.InputKind
        self._inputs: list[str] = []  # of the graph, in order: a weight's name, or "" for what the model hands over
        self._constants = {}
        for spec in program.graph_signature.input_specs:
            name = "" if spec.kind == kinds.USER_INPUT else str(spec.target)
            if spec.kind == kinds.CONSTANT_TENSOR:
                self._constants[name] = program.constants[name]
            self._inputs.append(name.removeprefix("layer."))
        self.merged: list[list[str]] = []  # names of the linear layers whose products became one
        if merge:
            self._merge()
        self.graph.graph.set_codegen(torch.fx.graph.CodeGen())  # export's own unpacks its arguments by pytree
        self.graph.recompile()
        self._compiled: Any = None

    def _merge(self) -> None:
        """Products of one input become one, with their weights below one another: the first one's place in the inputs
        takes the merged weight, the others' places are read no more."""
        graph = self.graph.graph
        name_of = dict(zip((n for n in graph.nodes if n.op == "placeholder"), self._inputs, strict=True))
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
        """Whether a call is like the one that was traced."""
        if spec != self._spec or [isinstance(leaf, Tensor) for leaf in leaves] != self._is_tensor:
            return False
        pairs = zip(self._rest, leaves, strict=True)
        return all(kept is None or kept is leaf or kept == leaf for kept, leaf in pairs)

    def weights_of(self, layer: nn.Module, merged: dict[str, Tensor]) -> list[Tensor | None]:
        """A layer's weights in the order of the graph's inputs; None: what the model hands over."""
        known = dict(layer.named_parameters(remove_duplicate=False)) | dict(layer.named_buffers(remove_duplicate=False))
        known |= self._constants | merged
        return [known[name] if name else None for name in self._inputs]

    def run(self, weights: list[Tensor | None], tensors: list[Tensor], compiled: bool) -> Any:
        for tensor, dims in zip(tensors, self._moving, strict=True):
            for dim in dims:
                torch._dynamo.mark_dynamic(tensor, dim)
        given = iter(tensors)
        inputs = [next(given) if weight is None else weight for weight in weights]
        if compiled and self._compiled is None:
            # one row reads each weight once: Inductor makes such products a sum of its own and tunes how it reads
            options: Any = {"coordinate_descent_tuning": True} if self.single else {}
            self._compiled = torch.compile(self.graph.forward, fullgraph=True, dynamic=False, options=options)
        out = (self._compiled if compiled else self.graph.forward)(*inputs)
        return pytree.tree_unflatten(out, self._out_spec)


class _Layer(nn.Module):
    """What is traced: tensors, with the rest of what the model hands over as it was."""

    def __init__(
        self, layer: nn.Module, spec: Any, rest: list[Any], is_tensor: list[bool], note: Callable[[Any], None]
    ) -> None:
        """note: is told the form of what comes out; what tracing sets on a module is set back"""
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


def _facts(layer: nn.Module) -> str:
    """All that a layer's code may depend on but the weights' values and the layer's number."""
    plain = (bool, int, float, str, type(None), tuple)
    found = []
    for name, module in layer.named_modules():
        values = {key: value for key, value in vars(module).items() if isinstance(value, plain) and key != "layer_idx"}
        found.append((name, type(module).__qualname__, sorted(values.items(), key=lambda item: item[0])))
    tensors = [*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)]
    return repr((found, [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors]))


@torch.no_grad()
def _merge_weights(layer: nn.Module, groups: list[list[str]]) -> dict[str, Tensor]:
    """One tensor for each group, of which the layers' own become views; → by the name of the first one's."""
    merged: dict[str, Tensor] = {}
    for names in groups:
        modules = [layer.get_submodule(name) for name in names]
        for part in ("weight", "bias"):
            own: list[Any] = [getattr(module, part) for module in modules]
            if own[0] is not None:
                whole = torch.cat([tensor.detach() for tensor in own])
                for tensor, rows in zip(own, whole.split([len(tensor) for tensor in own]), strict=True):
                    tensor.data = rows
                merged[f"{names[0]}.{part}"] = nn.Parameter(whole, requires_grad=False)  # its sizes are fixed ones
    return merged

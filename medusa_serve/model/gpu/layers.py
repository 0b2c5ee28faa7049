"""The decoder layers of a GPU's passes as one function of their weights (forward/trace.py), compiled by Inductor, and
called for every layer.

A Hugging Face layer launches forty small kernels around its seven products; a compiled one, a dozen around four.
The model keeps its modules: a merged weight is one tensor, and the layers' own weights become views of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...errors import reason_of
from ..forward.hidden_tap import decoder_layers
from ..forward.passes import HfPass
from ..forward.trace import EXAMPLE, Operator, TracedLayer, layer_calls, layer_kind, merge_weights
from ..forward.tree_forward import PlugInError, TreeForward
from ..loading.process_lock import give_back
from ..weights.nf4 import scales_of

GIVEN_BACK = 1 << 24  # bytes of a layer's merged weights; above it the separate ones' memory is freed at once


class FusedLayers:
    """Traced functions of a TreeForward's decoder layers, for packed passes (all rows as one). Call `make` first, and
    `compile` where compiled functions are wanted: both work part by part, and the model runs unchanged meanwhile.
    `over` gives the pass that uses these functions, until `close`."""

    def __init__(self, forward: TreeForward, layers: nn.ModuleList, *, merge: bool = True) -> None:
        self._forward, self._layers, self._merge = forward, list(layers), merge
        self.compiled = False
        self._operator = Operator(forward)
        self._kinds: dict[str, dict[bool, TracedLayer]] = {}  # by kind of layer; by whether it is a single token
        self._of: list[dict[bool, TracedLayer]] = []
        self._weights: list[dict[bool, list[Tensor | None]]] = []

    def make(self, moved: Callable[[], None]) -> Iterator[None]:
        """Trace a function for each kind of layer, for one token and for many, with the inputs of a real pass; then
        merge the layers' weights, which moves them. moved: called just before, because captured passes read the old
        addresses. Raises PlugInError where the layers cannot be traced."""
        if any(scales_of(parameter) for layer in self._layers for parameter in layer.parameters()):
            raise PlugInError("four-bit weights are not traced")
        calls = {tokens: layer_calls(self._forward, self._layers, tokens) for tokens in (EXAMPLE, 1)}
        for index, layer in enumerate(self._layers):
            mine = self._kinds.setdefault(layer_kind(layer), {})
            for tokens in calls if not mine else ():
                mine[tokens == 1] = TracedLayer(layer, *calls[tokens][index], self._operator, self._merge)
                yield
            self._of.append(mine)
        moved()
        for layer, mine in zip(self._layers, self._of, strict=True):
            merged = merge_weights(layer, mine[False].merged)
            if sum(weight.nbytes for weight in merged.values()) > GIVEN_BACK and torch.cuda.is_available():
                give_back()  # else the separate weights' memory stays taken: two thirds of the model again
            self._weights.append({single: traced.weights_of(layer, merged) for single, traced in mine.items()})
        yield

    def compile(self) -> Iterator[None]:
        """Let Inductor compile the functions, by calls with results that are not used."""
        for kind in self._kinds.values():
            index = next(index for index, mine in enumerate(self._of) if mine is kind)
            for single, traced in kind.items():
                self._operator.muted = True
                try:
                    traced.run(self._weights[index][single], traced.example, compiled=True)
                finally:
                    self._operator.muted = False
                yield

    def over(self, own: HfPass, *, compiled: bool) -> HfPass:
        """The pass that runs these layers. own: the model's pass · compiled False: the traced functions run uncompiled,
        only with merged products (no Triton, or no time to wait)"""
        self.compiled = compiled
        forwards = {layer: partial(self.call, index, layer) for index, layer in enumerate(self._layers)}
        return replace(own, layers=self, forwards=forwards)

    def call(self, index: int, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
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
        self._operator.close()


def fuse_layers(
    forward: TreeForward, check: Callable[[], float], changed: Callable[[], None], *, wanted: bool | None = None
) -> Generator[None, None, str]:
    """Give the forward fused layers if they pass the self-test, compiled if they can be, part by part; → a note.

    check: selftest.check of packed passes; it must touch no slot that is in use · changed: called when captured passes
    are out of date · wanted: whether to compile; None: yes in half precision, where fused kernels round less than the
    model's own, and no in float32, where the text must be the model's token for token
    """
    own, exact = forward.active, forward.exact
    why = "" if compiles(forward, wanted) else "float32 keeps its own kernels"
    assert isinstance(own, HfPass)
    fused = FusedLayers(forward, decoder_layers(forward.model))
    try:
        try:
            yield from fused.make(changed)
        except Exception as reason:  # tracing runs a model's code, which may raise anything
            return f"decoder layers stay as they are ({reason_of(reason)})"
        for compiled in (False,) if why else (True, False):
            try:
                if compiled:
                    yield from fused.compile()
                forward.use(fused.over(own, compiled=compiled), exact=exact)
                error = check()
            except Exception as reason:  # two compilers run, which may raise anything
                why = why or reason_of(reason)
                forward.use(own, exact=exact)
                continue
            changed()
            what = "compiled, with merged products" if compiled else f"not compiled ({why}), but with merged products"
            return f"decoder layers are {what} (difference {error:.1e})"
        return f"decoder layers stay as they are ({why})"
    finally:
        if forward.active is own:
            fused.close()


def compiles(forward: TreeForward, wanted: bool | None) -> bool:
    """Whether the forward's layers are to be compiled. wanted: as in fuse_layers"""
    return bool(wanted) or (wanted is None and forward.model.dtype.itemsize < 4)

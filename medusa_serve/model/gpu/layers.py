"""The decoder layers of a GPU's passes as one function of their weights (trace.py), compiled by Inductor, and called
for every layer.

A Hugging Face layer launches forty small kernels around its seven products; compiled it launches a dozen around four.
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

GIVEN_BACK = 1 << 24  # bytes of a layer's merged weights from which the separate ones' memory is given back at once


class FusedLayers:
    """Traced functions of a TreeForward's decoder layers, for passes that see all rows as one. `make` comes first, and
    `compile` where compiled functions are wanted: both go part by part, and meanwhile the model runs as it is. `over`
    gives the pass that they make, to be used until `close`."""

    def __init__(self, forward: TreeForward, layers: nn.ModuleList, *, merge: bool = True) -> None:
        self._forward, self._layers, self._merge = forward, list(layers), merge
        self.compiled = False
        self._operator = Operator(forward)
        self._kinds: dict[str, dict[bool, TracedLayer]] = {}  # by what tells layers apart; whether a single token
        self._of: list[dict[bool, TracedLayer]] = []
        self._weights: list[dict[bool, list[Tensor | None]]] = []

    def make(self, moved: Callable[[], None]) -> Iterator[None]:
        """A function for each kind of layer and for one token and many, from what a real pass hands the layers; then
        their weights are merged, which takes them to another place. moved: called just before, since what was captured
        of the passes reads the old one. Raises PlugInError where the layers cannot be traced."""
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

    def over(self, own: HfPass, *, compiled: bool) -> HfPass:
        """The pass whose layers these are. own: the model's · compiled False: the traced functions run as they are,
        with merged products alone (no Triton, or no wish to wait)"""
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

    check: as selftest.check, of packed passes; it must touch no slot that is in use · changed: called when passes are
    no longer what was captured of them · wanted: compiled ones; None: in half precision, where fused kernels round less
    than the model's own, and not in float32, whose text is to be the model's token for token
    """
    own, exact = forward.active, forward.exact
    why = "" if compiles(forward, wanted) else "float32 keeps its own kernels"
    assert isinstance(own, HfPass)
    fused = FusedLayers(forward, decoder_layers(forward.model))
    try:
        try:
            yield from fused.make(changed)
        except Exception as reason:  # tracing runs a model's code: whatever it raises
            return f"decoder layers stay as they are ({reason_of(reason)})"
        for compiled in (False,) if why else (True, False):
            try:
                if compiled:
                    yield from fused.compile()
                forward.use(fused.over(own, compiled=compiled), exact=exact)
                error = check()
            except Exception as reason:  # compiling runs two compilers' code: whatever they raise
                why = why or reason_of(reason)
                forward.use(own, exact=exact)
                continue
            changed()
            what = "compiled, with merged products" if compiled else f"not compiled ({why}), but with merged products"
            return f"decoder layers are {what} ({error:.1e} apart)"
        return f"decoder layers stay as they are ({why})"
    finally:
        if forward.active is own:
            fused.close()


def compiles(forward: TreeForward, wanted: bool | None) -> bool:
    """Whether its layers are to be compiled; `wanted` as of fuse_layers."""
    return bool(wanted) or (wanted is None and forward.model.dtype.itemsize < 4)

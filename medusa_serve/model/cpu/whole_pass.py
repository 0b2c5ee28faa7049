"""A CPU's pass without the model's Python around its layers: embedding, tape, final norm, output layer. After a tape
has read all weights, the caches hold nothing of the interpreter: Python code of 0.3 ms then takes 1.5 ms.

A pass of the model itself shows, by the tensors that its modules pass on, which module computes what. The pass here
must give the same logits. If a model is built differently, its own code stays in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..forward.passes import HfPass
from ..forward.tree_forward import TreeForward
from ..forward.view import View, chain_view
from .attention import fits_slab, view_record
from .layer_ops import rms_norm
from .tape import TapeRun

TOLERANCE = 0.02  # of the logits' norm
ROUNDED = 2**-7  # of one number, by a kernel that sums in another order


class Call(NamedTuple):
    """A module's call in the observed pass."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


class OtherPass(Exception):
    """The model does something else around its layers; the text says what."""


@contextmanager
def noted(model: nn.Module, layers: list[nn.Module]) -> Iterator[list[Call]]:
    """The calls of the model's modules in this context; inside a layer, only the layer's own."""
    calls: list[Call] = []
    inside = {module for layer in layers for module in layer.modules()} - set(layers)
    hooks = [
        module.register_forward_hook(lambda *given: calls.append(Call(*given)), with_kwargs=True)
        for module in model.modules()
        if module not in inside
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


class NativePass:
    """A Pass without the model's own code for views that `covers` accepts; others go to `inner`. Raises OtherPass."""

    packs = True

    def __init__(
        self,
        forward: TreeForward,
        inner: HfPass,
        layers: list[nn.Module],
        calls: list[Call],
        tape: TapeRun,
        weights: Any,
    ) -> None:
        """calls: of one packed pass · weights: of all layers, for the tape"""
        self.inner, self.layers, self.forwards = inner, inner.layers, inner.forwards
        self._forward, self._tape, self._weights = forward, tape, weights
        mine = calls_of(layers, calls)
        if not hands_on(mine):
            raise OtherPass("something happens between the layers")
        self._embedding = _embedding(calls, forward.model, mine[0].args[0])
        self._output, output = _output(calls, forward.model)
        self._norm = _norm(calls, mine[-1].out, output.args[0])
        self._positions, given = _positions(calls, mine[0], forward.cache.keys.shape[2])
        self._dim = self._positions.shape[1] // 2
        rows = next(call.args[0] for call in calls if call.module is self._embedding), given
        self._compare(*rows, output.out)

    def covers(self, view: View) -> bool:
        cache = self._forward.cache
        return view.packed and self._forward.exact and fits_slab(cache.keys, cache.values, view)

    def close(self) -> None:
        self.inner.close()

    def run(self, tokens: Tensor, positions: Tensor, view: View, keep: int | Tensor | None) -> Tensor:
        if not self.covers(view):
            return self.inner.run(tokens, positions, view, keep)
        return self._run(tokens, positions, view, None if isinstance(keep, int) else keep)

    def _run(self, tokens: Tensor, positions: Tensor, view: View, at: Tensor | None) -> Tensor:
        """tokens, positions (1, M) · at (R): the tokens that need logits; None: all → (1, R, V)"""
        places = F.embedding(positions, self._positions)
        cos, sin = places[..., : self._dim], places[..., self._dim :]
        cache, tap = self._forward.cache, self._forward.tap
        seen = view_record(view, cache.keys.shape[2], cos, sin)
        x = F.embedding(tokens, self._embedding.weight)
        kept = {layer: torch.empty_like(x) for layer in tap.layers}
        x = self._tape(x, self._weights, seen, cache.keys, cache.values, kept)
        for layer, hidden in kept.items():
            tap.keep(layer, hidden)
        x = self._norm(x)
        return self._output(x if at is None else x[:, at])

    def _compare(self, tokens: Tensor, positions: Tensor, wanted: Tensor) -> None:
        """Raises OtherPass where a causal pass over a separate slot gives other logits."""
        with self._forward.aside():
            view = chain_view([0], [0], [tokens.shape[1]], tokens.device)
            view.packed = True
            got = self._run(tokens, positions, view, None)
        self._forward.tap.take()
        error = float((got - wanted).float().norm() / wanted.float().norm())
        if not error <= TOLERANCE:
            raise OtherPass(f"its logits differ by {error:.1%}")


def calls_of(layers: list[nn.Module], calls: list[Call]) -> list[Call]:
    every = set(layers)
    return [call for call in calls if call.module in every]


def _same(a: Any, b: Any) -> bool:
    """Whether these are the same numbers at the same address."""
    both = isinstance(a, Tensor) and isinstance(b, Tensor) and a.data_ptr() == b.data_ptr()
    return both and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def hands_on(calls: list[Call]) -> bool:
    """Whether each module's input is the output of the one before."""
    return all(_same(after.args[0], before.out) for before, after in zip(calls, calls[1:], strict=False))


def _embedding(calls: list[Call], model: Any, first: Tensor) -> Any:
    module = model.get_input_embeddings()
    made = [call.out for call in calls if call.module is module]
    if type(module) is not nn.Embedding or len(made) != 1 or not _same(made[0], first):
        raise OtherPass("its embedding is more than a table")
    return module


def _output(calls: list[Call], model: Any) -> tuple[nn.Module, Call]:
    module = model.get_output_embeddings()
    call = next((call for call in calls if call.module is module), None)
    result = next((call.out for call in calls if call.module is model), None)
    if call is None or not call.args or not _same(call.out, getattr(result, "logits", None)):
        raise OtherPass("its logits are more than the output layer's")
    return module, call


def _norm(calls: list[Call], last: Any, wanted: Tensor) -> Callable[[Tensor], Tensor]:
    """From the last layer's output to the output layer's input: a kernel if one gives the same numbers."""
    if _same(last, wanted):
        return lambda x: x
    found = [call for call in calls if call.args and _same(call.args[0], last) and _same(call.out, wanted)]
    if len(found) != 1 or len(found[0].args) > 1 or found[0].kwargs:
        raise OtherPass("there is more than a norm after its layers")
    module: Any = found[0].module
    weight = getattr(module, "weight", None)
    for name in ("variance_epsilon", "eps"):
        epsilon = getattr(module, name, None)
        if isinstance(epsilon, float) and isinstance(weight, Tensor) and weight.dtype == torch.bfloat16:
            made = rms_norm(last, weight, epsilon)
            if torch.allclose(made.float(), wanted.float(), rtol=ROUNDED, atol=0):
                return lambda x: rms_norm(x, weight, epsilon)
    return module


def _positions(calls: list[Call], layer: Call, columns: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, side by side, (columns, 2·dim), from the module that makes them
    for the layers; and the positions of the observed pass, (1, M)."""
    given = [value for value in (*layer.args[1:], *layer.kwargs.values()) if isinstance(value, tuple)]
    made = [call for call in calls if any(value is call.out for value in given)]
    if len(made) != 1 or len(given) != 1 or len(given[0]) != 2:
        raise OtherPass("its layers get no cosines and sines")
    module, args, kwargs, out = made[0]
    every = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dtype == torch.int64]
    if len(every) != 1 or every[0].dim() != 2 or any(part.dim() != 3 for part in out):
        raise OtherPass("its cosines and sines are made from more than positions")
    (seen,) = every

    def of(positions: Tensor) -> Tensor:
        swapped = [positions if value is seen else value for value in args]
        named = {name: positions if value is seen else value for name, value in kwargs.items()}
        return torch.cat(module(*swapped, **named), dim=-1)[0]

    table = of(torch.arange(columns)[None]).contiguous()
    short = of(torch.arange(2)[None])
    if not torch.equal(table[seen[0]], torch.cat(out, dim=-1)[0]) or not torch.equal(table[:2], short):
        raise OtherPass("its cosines and sines depend on more than a token's own position")
    return table, seen

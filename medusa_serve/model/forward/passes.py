"""A pass of the model as a value: the code that runs it. It is built completely, then `TreeForward.use` swaps it in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import View

SMALL = 4096  # torch takes another kernel for products of up to this many multiplications


class Pass(Protocol):
    """forwards: what modules run in place of their own code while this pass is in use · packs: whether all passes see
    their rows as one · layers: None if the decoder layers run their own code"""

    @property
    def forwards(self) -> Mapping[nn.Module, Callable[..., Any]]: ...
    @property
    def packs(self) -> bool: ...
    @property
    def layers(self) -> Any: ...

    def run(self, tokens: Tensor, positions: Tensor, view: View, keep: int | Tensor | None) -> Tensor:
        """tokens, positions (B, N) · keep: R, for the last R tokens, or places (R); None: all → logits (B, R, V)"""

    def close(self) -> None: ...


@dataclass(frozen=True)
class HfPass:
    """The model's own code around its layers. The layers run eagerly, or as `layers` has traced them: FusedLayers on a
    GPU, NativeLayers on a CPU.

    cache: a SlabCache, which the model takes for its cache · takes: the names of the model's arguments · options: of a
    view, more arguments for the model
    """

    model: Any
    cache: Any
    takes: frozenset[str]
    cache_name: str
    options: Callable[[View], dict[str, Any]]
    layers: Any = None
    forwards: Mapping[nn.Module, Callable[..., Any]] = field(default_factory=dict)
    packs: bool = False

    def run(self, tokens: Tensor, positions: Tensor, view: View, keep: int | Tensor | None) -> Tensor:
        extra = {"logits_to_keep": keep} if keep is not None and "logits_to_keep" in self.takes else {}
        with self.cache.during(view):
            return self.model(
                input_ids=tokens,
                position_ids=positions,
                use_cache=True,
                **{self.cache_name: self.cache},
                **extra,
                **self.options(view),
            ).logits

    def close(self) -> None:
        if self.layers is not None:
            self.layers.close()


def padded_products(model: Any) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """For an exact pass, what runs in place of the linear layers' forward, so that a product of few rows takes the same
    kernel as one of many."""
    return {module: _Padded(module) for module in model.modules() if type(module) is nn.Linear}


class _Padded:
    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer
        self._least = max(2, SMALL // layer.weight.numel() + 1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        layer, rows = self._layer, x.numel() // x.shape[-1]
        if rows >= self._least:
            return F.linear(x, layer.weight, layer.bias)
        padded = F.pad(x.reshape(rows, -1), (0, 0, 0, self._least - rows))
        return F.linear(padded, layer.weight, layer.bias)[:rows].view(*x.shape[:-1], -1)

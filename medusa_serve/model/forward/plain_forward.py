"""The pass of a model that cannot take our attention (recurrent layers, ALiBi, …): one row at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .attention import View
from .hidden_tap import HiddenTap
from .tree_forward import cache_argument, holds_only_keys_and_values


class PlainForward:
    """One token a step, each row with a cache of the model's own kind. Correct for every causal LM; rows do not share
    passes."""

    supports_trees = False
    can_capture = False  # no CUDA graph can hold its steps

    def __init__(
        self,
        model: Any,
        slots: int,
        history: Callable[[int, int], torch.Tensor],
        hidden_inputs: Sequence[int] = (-1,),
    ) -> None:
        """history(slot, length): the slot's first `length` token ids, to rebuild a cache after a failed pass left it
        half-written · hidden_inputs: HiddenTap's indexes"""
        self.model, self._history = model, history
        self._takes = set(inspect.signature(model.forward).parameters)
        self._cache_name = cache_argument(self._takes)
        self._caches: list[Any] = [None] * slots
        self._seen = [0] * slots
        self.tap = HiddenTap(model, hidden_inputs)

    def run(
        self, tokens: torch.Tensor, view: View, last_only: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits: list[torch.Tensor] = []
        hidden: list[torch.Tensor] = []
        for row, (slot, length) in enumerate(zip(view.host_slots, view.host_length, strict=True)):
            out = self._row(slot, length, tokens[row : row + 1])
            keep = 1 if last_only else tokens.shape[1]
            logits.append(out.logits[:, -keep:])
            last = self.tap.take()
            if last is not None:
                hidden.append(last[:, -keep:])
        return torch.cat(logits), torch.cat(hidden) if hidden else None

    def _row(self, slot: int, length: int, tokens: torch.Tensor) -> Any:
        known = self._cache_name is not None and self._seen[slot] == length and length > 0
        cache = self._caches[slot] if known else None
        if not known and length > 0:
            tokens = torch.cat([self._history(slot, length)[None], tokens], dim=1)
        self._seen[slot] = -1  # half-written until the pass ends
        end = length + tokens.shape[1] if known else tokens.shape[1]
        one_by_one = cache is not None and not holds_only_keys_and_values(
            cache
        )  # a recurrent state continues by single tokens
        for part in tokens.split(1, dim=1) if one_by_one else (tokens,):
            extra = {self._cache_name: cache} if self._cache_name else {}
            out = self.model(input_ids=part, use_cache=self._cache_name is not None, **extra)
            cache = getattr(out, self._cache_name, None) if self._cache_name else None
        self._caches[slot], self._seen[slot] = cache, end
        return out

    def commit(self, view: View, nodes: torch.Tensor) -> None:
        """Nothing: the model's own cache has already appended the row."""

    def zero(self, slot: int) -> None:
        self._caches[slot], self._seen[slot] = None, 0

    def close(self) -> None:
        self.tap.close()
        self._caches.clear()

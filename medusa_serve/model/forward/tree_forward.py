"""The forward pass of an unmodified Hugging Face model over slots. It gets our attention and our cache, so that many
rows with many nodes share one pass. Other models use masked_forward.py or plain_forward.py.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicCache

from ..kernels import Kernels, choose
from .hidden_tap import HiddenTap
from .passes import HfPass, Pass, padded_products
from .replaced import replace_attributes
from .slab import SlotCache
from .split import SplitCache, layer_devices
from .view import View

ASIDE = 128  # tokens of a slot in `TreeForward.aside`


class SlabCache(Cache):
    """The model takes it for its cache: `update` writes into the slab, and gives the attention the layer's slab."""

    def __init__(self, slab: SlotCache | SplitCache) -> None:
        super().__init__(layers=[])
        self.slab, self.is_split = slab, isinstance(slab, SplitCache)
        self.view: Any = None  # a View and its columns during a pass
        self.columns: Any = None
        self.traced = False  # while a layer is traced, its attention operator writes the keys and values

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if self.traced:
            return key_states, value_states
        keys, values = self.view.unpack(key_states), self.view.unpack(value_states)
        if not self.is_split:
            return self.slab.write(layer_idx, self.view.slots, self.columns, keys, values)
        view = self.view.on(keys.device)
        return self.slab.write(layer_idx, view.slots, view.columns, keys, values)

    @contextlib.contextmanager
    def during(self, view: View) -> Iterator[None]:
        """While the model runs a pass of this view."""
        self.view, self.columns = view, view.columns
        try:
            yield
        finally:
            self.view = self.columns = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.view is None else max(self.view.host_length)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return self.get_seq_length() + self.view.num_new, 0


class TreeForward:
    """Rows of slots, each with a tree of new tokens. Raises PlugInError if the model's attention cannot be
    replaced."""

    supports_trees = True
    attends = True  # with our attention, in place of the model's
    cache_kind = SlabCache

    def __init__(
        self,
        model: Any,
        slots: int,
        columns: int,
        max_positions: int | None,
        hidden_inputs: Sequence[int] = (-1,),
        kernels: Kernels | None = None,
    ) -> None:
        """hidden_inputs: HiddenTap's indexes, M of them · kernels: None: those of the machine"""
        self.kernels = kernels or choose(model.device)
        self.model, self.max_positions, self.hidden_inputs = model, max_positions, tuple(hidden_inputs)
        self._traced_attention: Callable[..., torch.Tensor] | None = None
        places, shape = layer_devices(model), (kv_shapes(model), slots, columns, model.dtype)
        self.is_split, self.can_capture = bool(places), not places
        self.cache: Any = (
            SplitCache(*shape, places, None, self.kernels) if places else SlotCache(*shape, model.device, self.kernels)
        )
        self._slab_cache = self.cache_kind(self.cache)
        self._takes = set(inspect.signature(model.forward).parameters)
        self._cache_name = cache_argument(self._takes)
        self.tap = HiddenTap(model, hidden_inputs)
        try:
            self._plug_in()
        except PlugInError:
            self.tap.close()
            self.detach()
            raise
        self._undo: Callable[[], None] = lambda: None
        self.use(HfPass(model, self._slab_cache, frozenset(self._takes), str(self._cache_name), self._options))

    def use(self, other: Pass, *, exact: bool = False) -> None:
        """From now on, `other` runs the passes, and its `forwards` replace those of the modules. exact: attention as in
        attention.attend, and products of few rows are padded."""
        self._undo()
        forwards = {**other.forwards, **(padded_products(self.model) if exact else {})}
        self._undo = replace_attributes((module, "forward", run) for module, run in forwards.items())
        self.active, self.exact = other, exact

    @property
    def packs(self) -> bool:
        """Whether all passes see their rows as one: traced layers on a CPU need that."""
        return self.active.packs

    def _plug_in(self) -> None:
        model, self._name = self.model, f"medusa_tree_{id(self):x}"
        self._before = model.config._attn_implementation
        AttentionInterface.register(self._name, self._attention)
        model.set_attn_implementation(self._name)  # if it cannot, it only warns
        able = "position_ids" in self._takes and self._cache_name is not None
        if model.config._attn_implementation != self._name or not able:
            raise PlugInError("its attention cannot be replaced")

    def _options(self, view: View) -> dict[str, Any]:
        """More arguments for the model."""
        return {}

    def _attention(
        self,
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=None,
        sliding_window=None,
        softcap=None,
        s_aux=None,
        position_bias=None,
        **kwargs,
    ):
        if position_bias is not None:
            raise PlugInError("its attention adds a position bias")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if self._traced_attention is not None:
            if softcap is not None or s_aux is not None:
                raise PlugInError("its attention has a soft cap or sinks")
            return self._traced_attention(query, key, value, scaling, sliding_window or 0), None
        view = self._slab_cache.view
        if self.is_split:
            with torch.cuda.device_of(query):  # our kernels start on the current GPU
                view = view.on(query.device)
                out = self.kernels.attend(view.unpack(query), key, value, view, scaling, sliding_window, softcap, s_aux)
            return view.pack(out), None
        out = self.kernels.attend(
            view.unpack(query), key, value, view, scaling, sliding_window, softcap, s_aux, self.exact
        )
        return view.pack(out), None

    @property
    def view(self) -> View | None:
        """The view of the running pass."""
        return self._slab_cache.view

    def attend_in(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """The work of cache and attention in a pass, for a layer that was traced without them."""
        cache = self._slab_cache
        keys, values = cache.update(key, value, layer)
        out = self.kernels.attend(cache.view.unpack(query), keys, values, cache.view, scaling, window, exact=self.exact)
        return cache.view.pack(out).contiguous()

    @contextlib.contextmanager
    def traced_with(self, attention: Callable[..., torch.Tensor]) -> Iterator[None]:
        """Within it, layers call `attention` (query, key, value, scaling, window or 0) and write no cache."""
        self._traced_attention, self._slab_cache.traced = attention, True
        try:
            yield
        finally:
            self._traced_attention, self._slab_cache.traced = None, False

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Within it, passes use two separate short slots (ASIDE tokens) and touch no sequence's slot."""
        kept = self.cache
        self.cache = self._slab_cache.slab = kept.like(2, ASIDE)
        try:
            yield
        finally:
            self.cache = self._slab_cache.slab = kept

    def run(
        self, tokens: torch.Tensor, view: View, last_only: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """tokens (B, N), -1 empty → logits (B, N, V), hidden (B, N, M·H); with last_only only of the last token."""
        if self.packs and not view.packed:
            view = replace(view, packed=True)
            if last_only:
                rows, new = tokens.shape
                return self.run_packed(tokens, view, torch.arange(new - 1, rows * new, new))
        if view.packed:
            logits = self._pass(tokens.reshape(1, -1), view.positions.reshape(1, -1), view, None)
            hidden, shape = self.tap.take(), tokens.shape
            return logits[0].unflatten(0, shape), None if hidden is None else hidden[0].unflatten(0, shape)
        logits, hidden = self._pass(tokens, view.positions, view, 1 if last_only else None), self.tap.take()
        if not last_only:
            return logits, hidden
        return logits[:, -1:], None if hidden is None else hidden[:, -1:]

    def run_packed(
        self, tokens: torch.Tensor, view: View, at: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """tokens (P, N) of a packed view, at (R): places among the P·N → logits (R, 1, V), hidden (R, 1, M·H) there."""
        logits = self._pass(tokens.view(1, -1), view.positions.reshape(1, -1), view, at)
        hidden = self.tap.take(at)
        logits = logits if logits.shape[1] == len(at) else logits[:, at]
        return logits.transpose(0, 1), None if hidden is None else hidden.transpose(0, 1)

    def _pass(self, tokens: torch.Tensor, positions: torch.Tensor, view: View, keep: int | torch.Tensor | None) -> Any:
        """The logits."""
        if self.max_positions is not None:  # later nodes are never accepted, but learned positions must exist
            positions = positions.clamp(max=self.max_positions - 1)
        return self.active.run(tokens.clamp(min=0), positions, view, keep)

    def commit(self, view: View, nodes: torch.Tensor) -> None:
        self.cache.commit(view.slots, view.length, nodes)

    def zero(self, slot: int) -> None:
        self.cache.zero(slot)

    def detach(self) -> None:
        """Give the model its attention back."""
        self.model.set_attn_implementation(self._before)
        AttentionInterface._global_mapping.pop(self._name, None)

    def close(self) -> None:
        self._undo()
        self.active.close()
        self.tap.close()
        self.detach()
        del self.cache, self._slab_cache, self.active


class PlugInError(Exception):
    """Why this model cannot run with trees; the text completes 'this model decodes plainly because …'."""


@torch.no_grad()
def kv_shapes(model: Any) -> list[tuple[int, int, int]]:
    """(kv heads, key dim, value dim) of each layer, from a two-token pass. Raises PlugInError if they differ, or if
    the model's attention or cache cannot hold a tree."""
    if uses_alibi(model.config):
        raise PlugInError("its attention adds biases by distance (ALiBi), which a tree of tokens has not")
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    name = cache_argument(set(inspect.signature(model.forward).parameters))
    cache = getattr(model(input_ids=ids, use_cache=True), name or "", None)
    if not isinstance(cache, DynamicCache):
        raise PlugInError("it keeps no cache of keys and values")
    if not holds_only_keys_and_values(cache):
        raise PlugInError("some layers keep a recurrent state, which cannot branch")
    layers: list[Any] = list(cache.layers)
    shapes = [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers]
    if len(set(shapes)) > 1:
        raise PlugInError("its layers differ in the shape of their keys and values")
    return shapes


def cache_argument(takes: set[str]) -> str | None:
    """The name of the cache in a model's forward and its outputs; the first one is that since transformers 5.24."""
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in takes), None)


def uses_alibi(config: Any) -> bool:
    """Whether positions are biases of the attention (Press et al. 2022), computed from a mask without branches."""
    attention = getattr(config, "attn_config", None)
    kind = getattr(config, "model_type", None)
    return kind == "bloom" or any(getattr(part, "alibi", False) is True for part in (config, attention))


def holds_only_keys_and_values(cache: Any) -> bool:
    layers = getattr(cache, "layers", [])
    return bool(layers) and all(
        torch.is_tensor(getattr(layer, "keys", None)) and layer.keys.dim() == 4 for layer in layers
    )

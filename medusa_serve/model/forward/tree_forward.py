"""The forward pass of an unmodified Hugging Face model over slots, in forms with one interface.

TreeForward   registered attention + SlotCache: many rows, many nodes, one pass (masked.py: the model's own attention)
PlainForward  the model's own cache, one row at a time: for models whose attention cannot be plugged (recurrent, ALiBi,
…)
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicCache

from ...errors import LoadError
from ..kernels import Kernels, choose
from .hidden_tap import decoder_layers
from .slab import SlotCache
from .split import SplitCache, layer_devices
from .view import View

ASIDE = 128  # tokens of a pass that is no sequence's


class HiddenTap:
    """Keeps the hidden states of a pass that the heads read, while the model still applies its own post-processing of
    the logits (soft caps, scales).

    indexes, as of transformers' `hidden_states`: 0 and up the input of the decoder layer with this number, -1 the input
    of the output layer, after the final norm. Raises LoadError where the model has no such layer.
    """

    def __init__(self, model: Any, indexes: Sequence[int] = (-1,)) -> None:
        self._kept: dict[int, torch.Tensor] = {}
        self.layers: tuple[int, ...] = ()  # by number, whose input is kept
        self._handles: list[Any] = []
        output = model.get_output_embeddings()
        if output is None:
            return
        wanted: dict[int, torch.nn.Module] = {-1: output}
        if any(index != -1 for index in indexes):
            layers = decoder_layers(model)
            indexes = [_normal(index, len(layers)) for index in indexes]
            wanted |= {index: layers[index] for index in indexes if index >= 0}
        self._indexes = tuple(indexes)
        self.layers = tuple(index for index in wanted if index >= 0)
        for index, module in wanted.items():
            self._handles.append(module.register_forward_pre_hook(partial(self._note, index), with_kwargs=True))

    def _note(self, index: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.keep(index, args[0] if args else kwargs["hidden_states"])

    def keep(self, index: int, hidden: torch.Tensor) -> None:
        """By whoever runs the layers without their modules."""
        self._kept[index] = hidden

    def take(self, at: torch.Tensor | None = None) -> torch.Tensor | None:
        """What the last pass left, side by side in the order of the indexes: (B, N, M·H), where N are the positions
        that the output layer saw: `at`, or the last ones."""
        kept, self._kept = self._kept, {}
        if -1 not in kept:
            return None
        last = kept[-1]
        if at is not None and last.shape[1] != len(at):
            last = last[:, at]
        chosen = slice(-last.shape[1], None) if at is None else at
        parts = [last if index == -1 else kept[index][:, chosen] for index in self._indexes]
        if any(part.shape != last.shape for part in parts):
            raise LoadError("The heads read hidden states that this model's layers do not pass on one by one.")
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def _normal(index: int, layers: int) -> int:
    """An index of `hidden_states` as HiddenTap knows it."""
    if not -layers - 1 <= index <= layers:
        raise LoadError(f"The heads read hidden state {index}, the model has only {layers} layers.")
    return -1 if index in (-1, layers) else index % (layers + 1)


class SlabCache(Cache):
    """What the model believes to be its cache: `update` writes into the slab and hands the layer's slab to the
    attention."""

    def __init__(self, slab: SlotCache | SplitCache) -> None:
        super().__init__(layers=[])
        self.slab, self.is_split = slab, isinstance(slab, SplitCache)
        self.view: Any = None  # a View and its columns during a pass
        self.columns: Any = None
        self.traced = False  # while a layer is traced, its attention writes what it gets

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if self.traced:
            return key_states, value_states
        keys, values = self.view.unpack(key_states), self.view.unpack(value_states)
        if not self.is_split:
            return self.slab.write(layer_idx, self.view.slots, self.columns, keys, values)
        view = self.view.on(keys.device)
        return self.slab.write(layer_idx, view.slots, view.columns, keys, values)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.view is None else max(self.view.host_length)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return self.get_seq_length() + self.view.num_new, 0


class TreeForward:
    """Rows of slots, each with a tree of new tokens. Raises PlugInError where the model's attention cannot be
    replaced."""

    supports_trees = True
    attends = True  # in place of the model's attention
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
        """hidden_inputs: as HiddenTap's indexes, M of them · kernels: None: the machine's own"""
        self.kernels = kernels or choose(model.device)
        self.model, self.max_positions, self.hidden_inputs = model, max_positions, tuple(hidden_inputs)
        self.compiled: Any = None  # CompiledPasses, once there are some
        self.layers: Any = None  # FusedLayers, once there are some
        self.around: Any = None  # NativePass, once there is one
        self.packs = False  # whether all passes see their rows as one: traced layers of a CPU want that
        self.exact = False  # as attention.attend's; exact.py sets it
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

    def _plug_in(self) -> None:
        model, self._name = self.model, f"medusa_tree_{id(self):x}"
        self._before = model.config._attn_implementation
        AttentionInterface.register(self._name, self._attention)
        model.set_attn_implementation(self._name)  # only warns when it cannot
        able = "position_ids" in self._takes and self._cache_name is not None
        if model.config._attn_implementation != self._name or not able:
            raise PlugInError("its attention cannot be replaced")

    def _options(self, view: View) -> dict[str, Any]:
        """What else the model is called with."""
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
            with torch.cuda.device_of(query):  # kernels of our own start on the current GPU
                view = view.on(query.device)
                out = self.kernels.attend(view.unpack(query), key, value, view, scaling, sliding_window, softcap, s_aux)
            return view.pack(out), None
        out = self.kernels.attend(
            view.unpack(query), key, value, view, scaling, sliding_window, softcap, s_aux, self.exact
        )
        return view.pack(out), None

    @property
    def view(self) -> View | None:
        """Of the pass under way."""
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
        """What a layer's cache and attention do in a pass, for a layer that was traced without them."""
        cache = self._slab_cache
        keys, values = cache.update(key, value, layer)
        out = self.kernels.attend(cache.view.unpack(query), keys, values, cache.view, scaling, window, exact=self.exact)
        return cache.view.pack(out).contiguous()

    def attend_rotated(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """The same with the rotary positions before it, where a layer's are its last step; on a CPU one kernel."""
        from ..cpu.layer_ops import rotate

        view, slabs = self._slab_cache.view, (self.cache.keys[layer], self.cache.values[layer])
        if self.exact and query.stride(3) == key.stride(3) == value.stride(3) == cos.stride(2) == sin.stride(2) == 1:
            from ..cpu.attention import fits, rotated_attention

            if fits(query, *slabs, view):
                return rotated_attention(query, key, value, cos, sin, slabs, view, scaling, window)
        return self.attend_in(layer, rotate(query, cos, sin), rotate(key, cos, sin), value, scaling, window)

    @contextlib.contextmanager
    def traced_with(self, attention: Callable[..., torch.Tensor]) -> Iterator[None]:
        """Meanwhile layers call `attention` (query, key, value, scaling, window or 0) and write no cache."""
        self._traced_attention, self._slab_cache.traced = attention, True
        try:
            yield
        finally:
            self._traced_attention, self._slab_cache.traced = None, False

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Meanwhile passes have two short slots of their own (ASIDE tokens), and no sequence's is touched."""
        kept = self.cache
        self.cache = self._slab_cache.slab = kept.like(2, ASIDE)
        try:
            yield
        finally:
            self.cache = self._slab_cache.slab = kept

    def run(
        self, tokens: torch.Tensor, view: View, last_only: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """tokens (B, N), -1 empty → logits (B, N, V), hidden (B, N, M·H); with last_only of the last token alone."""
        if self.compiled is not None and self.compiled.covers(view):
            return self.compiled.run(tokens, view)
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
        """tokens (P, N) of a packed view, at (R) places among the P·N → logits (R, 1, V), hidden (R, 1, M·H) there."""
        logits = self._pass(tokens.view(1, -1), view.positions.reshape(1, -1), view, at)
        hidden = self.tap.take(at)
        logits = logits if logits.shape[1] == len(at) else logits[:, at]
        return logits.transpose(0, 1), None if hidden is None else hidden.transpose(0, 1)

    def _pass(self, tokens: torch.Tensor, positions: torch.Tensor, view: View, keep: int | torch.Tensor | None) -> Any:
        """The logits."""
        if self.max_positions is not None:  # nodes behind it are never accepted, but learned positions must exist
            positions = positions.clamp(max=self.max_positions - 1)
        tokens = tokens.clamp(min=0)
        if self.around is not None and self.around.covers(view):
            return self.around.run(tokens, positions, view, None if isinstance(keep, int) else keep)
        extra = {"logits_to_keep": keep} if keep is not None and "logits_to_keep" in self._takes else {}
        cache = self._slab_cache
        cache.view, cache.columns = view, view.columns
        try:
            return self.model(
                input_ids=tokens,
                position_ids=positions,
                use_cache=True,
                **{str(self._cache_name): cache},
                **extra,
                **self._options(view),
            ).logits
        finally:
            cache.view = cache.columns = None

    def commit(self, view: View, nodes: torch.Tensor) -> None:
        self.cache.commit(view.slots, view.length, nodes)

    def zero(self, slot: int) -> None:
        self.cache.zero(slot)

    def detach(self) -> None:
        """Give the model back as it was."""
        self.model.set_attn_implementation(self._before)
        AttentionInterface._global_mapping.pop(self._name, None)

    def close(self) -> None:
        if self.layers is not None:
            self.layers.close()
        if self.exact:
            from ..exact import leave_rows

            leave_rows(self.model)
        self.tap.close()
        self.detach()
        del self.cache, self._slab_cache


class PlainForward:
    """One token a step, each row with a cache of the model's own kind. Correct for every causal LM; rows do not share
    passes."""

    supports_trees = False
    can_capture = False  # of its steps no CUDA graph can be made

    def __init__(
        self,
        model: Any,
        slots: int,
        history: Callable[[int, int], torch.Tensor],
        hidden_inputs: Sequence[int] = (-1,),
    ) -> None:
        """history(slot, length): the slot's first `length` token ids, to rebuild a cache that a failed pass left
        half-written · hidden_inputs: as HiddenTap's indexes"""
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
        self._seen[slot] = -1  # half-written until the pass is through
        end = length + tokens.shape[1] if known else tokens.shape[1]
        one_by_one = cache is not None and not _holds_only_keys_and_values(
            cache
        )  # a recurrent state continues by single tokens
        for part in tokens.split(1, dim=1) if one_by_one else (tokens,):
            extra = {self._cache_name: cache} if self._cache_name else {}
            out = self.model(input_ids=part, use_cache=self._cache_name is not None, **extra)
            cache = getattr(out, self._cache_name, None) if self._cache_name else None
        self._caches[slot], self._seen[slot] = cache, end
        return out

    def commit(self, view: View, nodes: torch.Tensor) -> None:
        """The model's own cache has appended the row already."""

    def zero(self, slot: int) -> None:
        self._caches[slot], self._seen[slot] = None, 0

    def close(self) -> None:
        self.tap.close()
        self._caches.clear()


class PlugInError(Exception):
    """Why this model cannot run with trees; the text completes 'this model decodes plainly because …'."""


@torch.no_grad()
def kv_shapes(model: Any) -> list[tuple[int, int, int]]:
    """(kv heads, key dim, value dim) of each layer, from a two-token pass. Raises PlugInError where they differ."""
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    name = cache_argument(set(inspect.signature(model.forward).parameters))
    cache = getattr(model(input_ids=ids, use_cache=True), name or "", None)
    if not isinstance(cache, DynamicCache):
        raise PlugInError("it keeps no cache of keys and values")
    if not _holds_only_keys_and_values(cache):
        raise PlugInError("some layers keep a recurrent state, which cannot branch")
    layers: list[Any] = list(cache.layers)
    shapes = [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers]
    if len(set(shapes)) > 1:
        raise PlugInError("its layers differ in the shape of their keys and values")
    return shapes


def cache_argument(takes: set[str]) -> str | None:
    """What a model's forward and its outputs call the cache: the first since transformers 5.24."""
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in takes), None)


def uses_alibi(config: Any) -> bool:
    """Whether positions are biases of the attention (Press et al. 2022): computed from a mask that has no branches."""
    attention = getattr(config, "attn_config", None)
    kind = getattr(config, "model_type", None)
    return kind == "bloom" or any(getattr(part, "alibi", False) is True for part in (config, attention))


def _holds_only_keys_and_values(cache: Any) -> bool:
    layers = getattr(cache, "layers", [])
    return bool(layers) and all(
        torch.is_tensor(getattr(layer, "keys", None)) and layer.keys.dim() == 4 for layer in layers
    )

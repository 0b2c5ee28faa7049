"""Trees for models whose attention cannot be replaced: their own attention gets the tree as a mask of four dimensions
(as in SpecInfer, Miao et al., 2305.09781), over the slots' keys and values gathered for the pass.

Slower than attention over the slab (keys and values are copied in every layer, no step is captured), but rows share
passes and trees are verified. The self-test shows whether a model follows the mask.
"""

from __future__ import annotations

from typing import Any

from .tree_forward import PlugInError, SlabCache, TreeForward
from .view import View


class GatheringCache(SlabCache):
    """`update` writes into the slab, and returns the keys and values of the pass's rows: (B, kv_heads, T, dim)."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        parts = super().update(key_states, value_states, layer_idx)
        view = self.view.on(key_states.device)
        return tuple(part[view.slots, : view.width].transpose(1, 2) for part in parts)


class MaskedForward(TreeForward):
    """A TreeForward with the model's own attention. Raises PlugInError if the model takes no mask."""

    attends = False
    cache_kind = GatheringCache

    def _plug_in(self) -> None:
        self.can_capture = False
        if not self._takes >= {"position_ids", "attention_mask"} or self._cache_name is None:
            raise PlugInError("its attention cannot be replaced, and it takes no mask")

    def _options(self, view: View) -> dict[str, Any]:
        return {"attention_mask": view.bias(None, None, 1, self.model.dtype)}

    def detach(self) -> None:
        """Nothing: the model was not changed."""

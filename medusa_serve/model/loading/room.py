"""How many sequences decode together, and how long they may be."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...config import EngineConfig
from ...errors import LoadError
from ..forward.split import layer_devices
from ..forward.tree_forward import PlugInError, kv_shapes
from .gpu_memory import LEAST_CONTEXT, SLACK
from .slots import plan_context, plan_slots

ASKED = "as asked"
PLAIN_SLOTS, PLAIN_WHY = 8, "the default for plain decoding"


@dataclass(frozen=True)
class Room:
    """Slots, and tokens of one sequence, each with its reason."""

    slots: int
    slots_why: str
    context: int
    context_why: str

    def smaller(self) -> tuple[Room, str]:
        """Half the slots, then half the context, and a note. Raises LoadError when one slot of LEAST_CONTEXT tokens is
        too much."""
        full, slots, context = "because the memory was full with", self.slots // 2, self.context // 2
        if slots:
            return replace(self, slots=slots, slots_why=ASKED), f"{slots} slots {full} {self.slots}"
        if context >= LEAST_CONTEXT:
            return Room(1, ASKED, context, ASKED), f"a context of {context} tokens {full} {self.context}"
        raise LoadError(
            f"Not one sequence of {self.context} tokens fits beside the model; quantise it, or take a smaller one."
        )

    def plain(self) -> Room:
        """The room for plain decoding, where slots are not planned from memory."""
        return self if self.slots_why == ASKED else replace(self, slots=PLAIN_SLOTS, slots_why=PLAIN_WHY)


@torch.no_grad()
def plan_room(model: Any, config: EngineConfig, max_positions: int | None) -> Room:
    """The slots and the context that options and memory allow. Raises LoadError when these cannot be met."""
    context, why = plan_context(config, max_positions, model.device)
    try:
        shapes = kv_shapes(model)
    except PlugInError:
        return Room(config.slots or PLAIN_SLOTS, ASKED if config.slots else PLAIN_WHY, context, why)
    per_column: Counter[torch.device] = Counter()
    for device, (kv, key, value) in zip(layer_devices(model) or [model.device] * len(shapes), shapes, strict=True):
        per_column[device] += kv * (key + value) * model.dtype.itemsize
    columns = context + SLACK
    slots, slots_why = min(plan_slots(config, size, columns, device) for device, size in per_column.items())
    return Room(slots, slots_why, context, why)

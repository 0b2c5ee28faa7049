"""How many sequences decode together, and how long they may be."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...config import AS_ASKED, Choice, EngineConfig
from ...errors import LoadError
from ..forward.split import layer_devices
from ..forward.tree_forward import PlugInError, kv_shapes
from .gpu_memory import LEAST_CONTEXT, SLACK
from .slots import plan_context, plan_slots

PLAIN_SLOTS = Choice(8, "the default for plain decoding")


@dataclass(frozen=True)
class Room:
    """Slots, and tokens of one sequence, each with its reason."""

    slots: Choice[int]
    context: Choice[int]

    def smaller(self) -> tuple[Room, str]:
        """Half the slots, then half the context, and a note. Raises LoadError when one slot of LEAST_CONTEXT tokens is
        too much."""
        full, slots, context = "because the memory was full with", self.slots.value // 2, self.context.value // 2
        if slots:
            return replace(self, slots=Choice(slots, AS_ASKED)), f"{slots} slots {full} {self.slots.value}"
        if context >= LEAST_CONTEXT:
            smaller = Room(Choice(1, AS_ASKED), Choice(context, AS_ASKED))
            return smaller, f"a context of {context} tokens {full} {self.context.value}"
        one = f"Not one sequence of {self.context.value} tokens fits beside the model"
        raise LoadError(f"{one}; quantise it, or take a smaller one.")

    def plain(self) -> Room:
        """The room for plain decoding, where slots are not planned from memory."""
        return self if self.slots.why == AS_ASKED else replace(self, slots=PLAIN_SLOTS)


@torch.no_grad()
def plan_room(model: Any, config: EngineConfig, max_positions: int | None) -> Room:
    """The slots and the context that options and memory allow. Raises LoadError when these cannot be met."""
    context = plan_context(config, max_positions, model.device)
    try:
        shapes = kv_shapes(model)
    except PlugInError:
        return Room(Choice(config.slots, AS_ASKED) if config.slots else PLAIN_SLOTS, context)
    per_column: Counter[torch.device] = Counter()
    for device, (kv, key, value) in zip(layer_devices(model) or [model.device] * len(shapes), shapes, strict=True):
        per_column[device] += kv * (key + value) * model.dtype.itemsize
    columns = context.value + SLACK
    return Room(min(plan_slots(config, size, columns, device) for device, size in per_column.items()), context)

"""From a loaded model to a runner that has passed its self-test, or decodes plainly and says why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..config import EngineConfig
from .draft import Drafter
from .forward import PlainForward, PlugInError, TreeForward, kv_shapes
from .plan import plan_context, plan_slots, plan_trees
from .runner import ModelRunner
from .selftest import check, references
from .tables import SlotTables
from .tree import Tree

SLACK = 64  # columns behind a full slot, for the largest tree


@dataclass(frozen=True)
class Built:
    runner: ModelRunner
    notes: list[str] = field(default_factory=list)
    tree_error: float | None = None  # the self-test's largest relative error; None: plain decoding


@torch.no_grad()
def build_runner(
    model: Any,
    config: EngineConfig,
    *,
    eos_ids: list[int],
    max_positions: int | None,
    drafter: Drafter | None = None,
    ranks: Any = None,
) -> Built:
    """Plan, plug in, check. Raises LoadError when the plan cannot be met."""
    device = model.device
    context, context_why = plan_context(config, max_positions, device)
    trees = plan_trees(config, drafter.num_heads if drafter else 0, ranks)
    try:
        prompts, wanted = references(model, device)
        per_column = sum(kv * (key + value) for kv, key, value in kv_shapes(model)) * model.dtype.itemsize
        slots, slots_why = plan_slots(config, per_column, context + SLACK, device)
        forward: TreeForward | PlainForward = TreeForward(model, slots, context + SLACK, 0, max_positions)
        try:
            error = check(forward, prompts, wanted, slots)  # type: ignore[arg-type]
        except Exception:
            forward.close()
            raise
        plain_because = None
    except PlugInError as reason:
        plain_because, error = str(reason), None
        slots, slots_why = config.slots or 8, "as asked" if config.slots else "the default for plain decoding"
    trees = trees if plain_because is None else {}
    drafter = drafter if trees else None
    tables = _tables(trees, drafter, slots, context + SLACK, eos_ids, device)
    notes = [f"{slots} slots ({slots_why}) of {context} tokens ({context_why})"]
    if plain_because is not None:
        forward = PlainForward(model, slots, lambda slot, length: tables.history[slot, :length])
        notes.append(f"this model decodes plainly, one row at a time, because {plain_because}")
    vocab_size = model.get_input_embeddings().num_embeddings
    runner = ModelRunner(
        forward, tables, trees=trees, drafter=drafter, eos_ids=eos_ids, vocab_size=vocab_size, max_context=context
    )
    return Built(runner, notes, error)


def _tables(
    trees: dict[int, Tree], drafter: Drafter | None, slots: int, columns: int, eos_ids: list[int], device: torch.device
) -> SlotTables:
    chain = max((tree.num_lookup for tree in trees.values()), default=0)
    heads, ranks = (drafter.num_heads, drafter.num_ranks) if drafter and trees else (0, 0)
    return SlotTables(slots, columns, eos_ids, heads, ranks, chain, device)

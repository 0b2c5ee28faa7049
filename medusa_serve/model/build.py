"""From a loaded model to a runner that has passed its self-test, or decodes plainly and says why."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..config import EngineConfig
from ..errors import LoadError
from .drafting.draft import Drafter
from .drafting.drafters import ParallelDrafter, SequentialDrafter
from .forward.masked_forward import MaskedForward
from .forward.plain_forward import PlainForward
from .forward.tree_forward import PlugInError, TreeForward
from .gpu.background import SOON, Fusing, fuses
from .gpu.graphs import StepGraphs
from .kernels import Kernels, choose
from .loading.default_model import cache_folder
from .loading.gpu_memory import SLACK
from .loading.process_lock import give_back
from .loading.room import Room, plan_room
from .runner import ModelRunner
from .selftest import check, make_exact, references
from .shapes import Shape, expected_tokens, plan_shapes
from .step import Step
from .tables import SlotTables
from .timing import time_steps, worth_timing
from .weights.int4 import int4_kind_of

PREFILL_ROWS = {"cpu": 1, "cuda": 64}  # prompts of one prefill pass; one keeps a CPU busy


@dataclass(frozen=True)
class Built:
    """notes: the choices, with their reasons. Work that is done later adds its note to this list."""

    runner: ModelRunner
    notes: list[str] = field(default_factory=list)
    tree_error: float | None = None  # the self-test's largest relative error; None: plain decoding


@dataclass(frozen=True)
class _Plugged:
    """A forward with trees. error: of the self-test · packed: runs this test on packed passes · notes: how it runs"""

    forward: TreeForward
    error: float
    packed: Callable[[], float]
    notes: list[str]


def build_that_fits(model: Any, config: EngineConfig, *, max_positions: int | None, **rest: Any) -> Built:
    """As build_runner. If the memory is too small, it tries again with less room and adds a note. Raises LoadError when
    the smallest room does not fit either."""
    room, notes = plan_room(model, config, max_positions), list[str]()
    while True:
        with contextlib.suppress(torch.OutOfMemoryError):
            built = build_runner(model, config, max_positions=max_positions, room=room, **rest)
            built.notes[:0] = notes  # the same list: later work adds its notes to it
            return built
        gc.collect()  # the failed attempt's tensors
        if torch.cuda.is_available():
            give_back()
        room, note = room.smaller()
        notes.append(note)


@torch.no_grad()
def build_runner(
    model: Any,
    config: EngineConfig,
    *,
    eos_ids: list[int],
    max_positions: int | None,
    drafter: Drafter | None = None,
    what: str | None = None,
    later: bool = False,
    room: Room | None = None,
    kernels: Kernels | None = None,
) -> Built:
    """Plan, plug in, check, and time the steps where there is a choice of tree sizes. Raises LoadError when the plan
    cannot be met.

    what: the name of model and heads under which step times are kept; None: steps are not timed · later: slow work on
    a GPU, compiling above all, is left to `runner.rest`, so that the first answers need not wait for it · room: None:
    planned here
    """
    device = model.device
    kernels = kernels or choose(device)
    room = room or plan_room(model, config, max_positions)
    shapes = plan_shapes(config, drafter, device)
    more_notes = list[str]()
    if config.compile and device.type == "cpu":
        more_notes.append("no compiled passes because only a GPU's layers are compiled")
    plugged, plain_because = None, ""
    try:
        plugged = _plug_in(model, config, room, max_positions, hidden_inputs(drafter), kernels)
        more_notes += plugged.notes
    except PlugInError as reason:
        if config.exact:
            raise LoadError(f"The exact mode cannot be had: this model decodes plainly, because {reason}.") from reason
        room, shapes, plain_because = room.plain(), {1: shapes[1]}, str(reason)
    drafter = drafter if len(shapes) > 1 else None
    num_lookup = max(shape.num_lookup for shape in shapes.values())
    most = drafter.max_nodes if drafter else 0
    (slots, slots_why), (context, context_why) = room.slots, room.context
    tables = SlotTables(slots, context + SLACK, eos_ids, most, num_lookup, device)
    notes = [f"{slots} slots ({slots_why}) of {context} tokens ({context_why})", *more_notes]
    if plugged is None:
        notes.append(f"this model decodes plainly, one row at a time, because {plain_because}")
    if isinstance(drafter, SequentialDrafter | ParallelDrafter):
        drafter = drafter.using(kernels)
    runner = runner_of(
        plugged.forward if plugged else _plain(model, tables, hidden_inputs(drafter)),
        tables,
        kernels,
        shapes=shapes,
        drafter=drafter,
        eos_ids=eos_ids,
        vocab_size=model.get_input_embeddings().num_embeddings,
        max_context=context,
        expected=expected_tokens(sorted(shapes), drafter),
    )
    _speed_up(runner, plugged, config, what, notes, later=later)
    return Built(runner, notes, plugged.error if plugged else None)


def _plain(model: Any, tables: SlotTables, indexes: tuple[int, ...]) -> PlainForward:
    slots = tables.length.shape[0]
    return PlainForward(model, slots, lambda slot, length: tables.history[slot, :length], indexes)


def _speed_up(
    runner: ModelRunner,
    plugged: _Plugged | None,
    config: EngineConfig,
    what: str | None,
    notes: list[str],
    *,
    later: bool,
) -> None:
    """Fuse the layers where possible, now or later, and time the steps. Adds the results to `notes`."""
    model = runner.forward.model
    if what is not None and plugged is not None and plugged.forward.active.layers is not None:
        what = f"{what}, layers merged{int4_kind_of(model).note}"
    weights = sum(parameter.numel() for parameter in (*model.parameters(), *model.buffers()))
    name = f"{what}, {weights} numbers" if what is not None and worth_timing(runner, weights) else ""
    if plugged is not None and fuses(plugged.forward, config):
        fusing = Fusing(runner, plugged.packed, config.compile, name, cache_folder())
        notes.append(SOON)
        runner.plan(fusing.plan(notes))
        if not later:
            runner.finish()
    elif name:
        timing, note = time_steps(runner, name, cache_folder())
        runner.plan(timing)
        notes.append(note)


def runner_of(
    forward: TreeForward | PlainForward,
    tables: SlotTables,
    kernels: Kernels,
    *,
    shapes: dict[int, Shape],
    drafter: Drafter | None,
    **sizes: Any,
) -> ModelRunner:
    """A runner. On a GPU its steps are captured, if the model allows it.

    shapes: of a step, by node count, including 1 · drafter: None: only the lookup drafts · sizes: the rest of
    ModelRunner's arguments"""
    device, (slots, columns) = tables.history.device, tables.history.shape
    captured = device.type == "cuda" and forward.can_capture
    cache: Any = getattr(forward, "cache", None)
    reads_lengths = captured and kernels.reads_lengths(max(cache.keys.shape[-1], cache.values.shape[-1]))
    packed = captured or getattr(forward, "packs", False)
    step = Step(kernels, tables, forward, drafter, shapes, packed, reads_lengths)
    prefill_rows = min(slots, PREFILL_ROWS[device.type]) if forward.supports_trees else 1
    graphs = None
    if captured:
        graphs = StepGraphs(
            step, step.prefill, device=device, num_slots=slots, columns=columns, prefill_rows=prefill_rows,
            reads_lengths=reads_lengths,
        )  # fmt: skip
    return ModelRunner(step, graphs, prefill_rows=prefill_rows, **sizes)


def hidden_inputs(drafter: Any) -> tuple[int, ...]:
    """Indexes of the hidden states that the drafter's heads read; the last one if they do not say."""
    return getattr(getattr(drafter, "heads", None), "hidden_indexes", (-1,))


def _plug_in(
    model: Any,
    config: EngineConfig,
    room: Room,
    max_positions: int | None,
    indexes: tuple[int, ...],
    kernels: Kernels,
) -> _Plugged:
    """Raises PlugInError, with the reason, if the model can only decode plainly."""
    prompts, wanted = references(model, model.device)
    given = (model, room.slots.value, room.context.value + SLACK, max_positions, indexes, kernels)
    notes: list[str] = []
    try:
        forward, error = _checked(TreeForward, given, prompts, wanted)
    except PlugInError as first:
        try:
            forward, error = _checked(MaskedForward, given, prompts, wanted)
        except Exception as second:  # the model's own code may not know this kind of call: it may raise anything
            raise first from second
        notes.append(f"the tree is a mask for this model's own attention, because {first}; no step is captured")
    packed = partial(check, forward, prompts, wanted, room.slots.value, packed=True)
    if _may_trace(forward, config):
        from .cpu.layers import native_layers

        with torch.inference_mode():
            notes.append(native_layers(forward, packed))
    try:
        unasked = config.exact is None and not forward.attends
        exact = make_exact(forward, False if unasked else config.exact, room.slots.value)
    except LoadError:
        forward.close()
        raise
    return _Plugged(forward, error, packed, [*notes, *([exact] if exact else [])])


def _checked(kind: type[TreeForward], given: tuple[Any, ...], prompts: Any, wanted: Any) -> tuple[TreeForward, float]:
    """A forward that has passed the self-test, and its error. Raises PlugInError if the model cannot be plugged in, and
    what `check` raises."""
    forward = kind(*given)
    try:
        return forward, check(forward, prompts, wanted, given[1])
    except Exception:
        forward.close()
        raise


def _may_trace(forward: TreeForward, config: EngineConfig) -> bool:
    """Whether to trace the layers' passes. Only on a CPU, and not if the config turns compiling off."""
    model = forward.model
    wanted = config.compile is not False and model.device.type == "cpu" and model.dtype == torch.bfloat16
    return wanted and forward.kernels.name == "numba" and forward.attends and not forward.is_split

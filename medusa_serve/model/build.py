"""From a loaded model to a runner that has passed its self-test, or decodes plainly and says why."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ..config import EngineConfig
from ..errors import LoadError
from .compiled import compile_passes
from .drafting.draft import Drafter
from .drafting.drafters import SequentialDrafter
from .exact import make_exact
from .forward.attention import has_numba
from .forward.masked_forward import MaskedForward
from .forward.split import layer_devices
from .forward.tree_forward import PlainForward, PlugInError, TreeForward, kv_shapes, uses_alibi
from .gpu.background import SOON, Fusing, fuses
from .gpu.capture import give_back
from .loading.default_model import cache_folder
from .loading.gpu_memory import LEAST_CONTEXT, SLACK
from .loading.slots import plan_context, plan_slots
from .runner import ModelRunner
from .selftest import check, references
from .shapes import expected_tokens, plan_shapes
from .tables import SlotTables
from .timing import time_steps, worth_timing
from .weights.int4 import Int4Linear, int4_kind_of


@dataclass(frozen=True)
class Built:
    """notes: the choices, with their reasons; what is done later is told in them when it is done"""

    runner: ModelRunner
    notes: list[str] = field(default_factory=list)
    tree_error: float | None = None  # the self-test's largest relative error; None: plain decoding


def build_that_fits(model: Any, config: EngineConfig, **rest: Any) -> Built:
    """As build_runner; where the memory turns out too small, with half the slots, then half the context, and a note.
    Raises LoadError when one slot of LEAST_CONTEXT tokens is too much."""
    tried: list[tuple[int, int]] = []
    notes: list[str] = []
    while True:
        with contextlib.suppress(torch.OutOfMemoryError):
            built = build_runner(model, config, **rest, tried=tried)
            built.notes[:0] = notes  # the same list: what is done later is told in it
            return built
        gc.collect()  # the failed attempt's tensors
        if torch.cuda.is_available():
            give_back()
        slots, context = tried[-1] if tried else (1, 0)
        if slots > 1:
            config = replace(config, slots=slots // 2)
            notes.append(f"{slots // 2} slots because the memory was full with {slots}")
        elif context // 2 >= LEAST_CONTEXT:
            config = replace(config, slots=1, max_context=context // 2)
            notes.append(f"a context of {context // 2} tokens because the memory was full with {context}")
        else:
            raise LoadError(
                f"Not one sequence of {context} tokens fits beside the model; quantise it, or take a smaller."
            )


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
    tried: list[tuple[int, int]] | None = None,
) -> Built:
    """tried: gets the slots and the context once they are chosen · later: what takes a GPU seconds, compiling above
    all, is left to `runner.rest`; the first answers then need not wait for it.

    Plan, plug in, check, and measure steps where the size of tree is to be chosen; `what` names model and heads
    among the measurements that are kept, without it none is made. Raises LoadError when the plan cannot be met."""
    device = model.device
    context, context_why = plan_context(config, max_positions, device)
    shapes = plan_shapes(config, drafter, device)
    columns = context + SLACK
    indexes, more_notes = hidden_inputs(drafter), list[str]()
    if config.compile and int4_kind_of(model) is not Int4Linear:
        config = replace(config, compile=None)
        more_notes.append("no compiled passes because own kernels make this model's products faster than torch's")
    plugged, slots, slots_why, error, plain_because, packed = _plug_in(
        model, config, columns, max_positions, indexes, more_notes, tried
    )
    if plain_because is not None:
        shapes = {1: shapes[1]}
    drafter = drafter if len(shapes) > 1 else None
    num_lookup = max(shape.num_lookup for shape in shapes.values())
    tables = SlotTables(slots, columns, eos_ids, drafter.max_nodes if drafter else 0, num_lookup, device)
    notes = [f"{slots} slots ({slots_why}) of {context} tokens ({context_why})", *more_notes]
    forward = plugged or PlainForward(
        model, slots, lambda slot, length: tables.history[slot, :length], hidden_inputs(drafter)
    )
    if plugged is None:
        notes.append(f"this model decodes plainly, one row at a time, because {plain_because}")
    if plugged is not None and plugged.layers is not None:
        what = what and f"{what}, layers merged{int4_kind_of(model).note}"
    if config.compile and plugged is not None and plugged.attends:
        notes.append(compile_passes(plugged, drafter, shapes, config, cache_folder()))
        what = what and f"{what}, compiled {plugged.compiled.sizes if plugged.compiled else 'nothing'}"
    if isinstance(drafter, SequentialDrafter) and has_numba():
        drafter.use_kernels()
    vocab_size = model.get_input_embeddings().num_embeddings
    runner = ModelRunner(
        forward,
        tables,
        shapes=shapes,
        drafter=drafter,
        eos_ids=eos_ids,
        vocab_size=vocab_size,
        max_context=context,
        expected=expected_tokens(sorted(shapes), drafter),
    )
    weights = sum(parameter.numel() for parameter in (*model.parameters(), *model.buffers()))
    name = f"{what}, {weights} numbers" if what is not None and worth_timing(runner, weights) else ""
    if plugged is not None and packed is not None and fuses(plugged, config):
        fusing = Fusing(runner, packed, config.compile, name, cache_folder())
        notes.append(SOON)
        fusing.prove()
        runner.later = fusing.parts(notes)
        if not later:
            runner.finish()
    elif name:
        notes.append(time_steps(runner, name, cache_folder()))
    return Built(runner, notes, error)


def _checked(kind: type[TreeForward], place: tuple[Any, ...], prompts: Any, wanted: Any) -> tuple[TreeForward, float]:
    """A forward that has passed the self-test, and its error. Raises PlugInError where the model cannot be plugged in,
    or as `check`."""
    forward = kind(*place)
    try:
        return forward, check(forward, prompts, wanted, place[1])
    except Exception:
        forward.close()
        raise


def hidden_inputs(drafter: Any) -> tuple[int, ...]:
    """The hidden states that the drafter's heads read: what they say, or the last one."""
    return getattr(getattr(drafter, "heads", None), "hidden_indexes", (-1,))


def _plug_in(
    model: Any,
    config: EngineConfig,
    columns: int,
    max_positions: int | None,
    hidden_inputs: tuple[int, ...],
    notes: list[str],
    tried: list[tuple[int, int]] | None = None,
) -> tuple[TreeForward | None, int, str, float | None, str | None, Callable[[], float] | None]:
    """(forward, slots, why so many, the self-test's error, None, that test of packed passes), or without a forward and
    test and with the reason in the last place but one."""
    try:
        if uses_alibi(model.config):
            raise PlugInError("its attention adds biases by distance (ALiBi), which a tree of tokens has not")
        prompts, wanted = references(model, model.device)
        shapes = kv_shapes(model)
        per_column: Counter[torch.device] = Counter()
        for place, (kv, key, value) in zip(layer_devices(model) or [model.device] * len(shapes), shapes, strict=True):
            per_column[place] += kv * (key + value) * model.dtype.itemsize
        slots, why = min(plan_slots(config, size, columns, place) for place, size in per_column.items())
        if tried is not None:
            tried.append((slots, columns - SLACK))
        place = (model, slots, columns, max_positions, hidden_inputs)
        try:
            forward, error = _checked(TreeForward, place, prompts, wanted)
        except PlugInError as first:
            try:
                forward, error = _checked(MaskedForward, place, prompts, wanted)
            except Exception as second:  # a model's own code, called in a way it may not know: whatever it raises
                raise first from second
            notes.append(f"the tree is a mask for this model's own attention, because {first}; no step is captured")
        packed = partial(check, forward, prompts, wanted, slots, packed=True)
        if _may_trace(forward, config):
            from .cpu.layers import native_layers

            with torch.inference_mode():
                notes.append(native_layers(forward, packed))
        try:
            unasked = config.exact is None and (config.compile or not forward.attends)
            exact = make_exact(forward, False if unasked else config.exact, slots)
        except LoadError:
            forward.close()
            raise
        notes += [exact] if exact else []
    except PlugInError as reason:
        if config.exact:
            raise LoadError(f"The exact mode cannot be had: this model decodes plainly, because {reason}.") from reason
        slots, why = (config.slots, "as asked") if config.slots else (8, "the default for plain decoding")
        return None, slots, why, None, str(reason), None
    return forward, slots, why, error, None, packed


def _may_trace(forward: TreeForward, config: EngineConfig) -> bool:
    """Whether the layers' passes on a CPU are to be traced: not where they are compiled whole, or left as they are."""
    model = forward.model
    wanted = config.compile is None and model.device.type == "cpu" and model.dtype == torch.bfloat16
    return wanted and has_numba() and forward.attends and not forward.is_split

"""Work that takes seconds and makes a GPU's steps faster: it compiles layers and heads, and times the new steps. The
first answers do not wait for it: it is a generator, and an idle engine does one part at a time, so that a request that
comes meanwhile waits only for the part under way."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config import EngineConfig
from ..timing import Timing, known_times, time_steps, try_largest
from .compiled_heads import fuse_heads
from .layers import compiles, fuse_layers

if TYPE_CHECKING:
    from ..forward.tree_forward import TreeForward
    from ..runner import ModelRunner

SOON = "decoder layers are fused while the engine idles"
LOOK_S = 0.05  # between two checks of a thread


def fuses(forward: TreeForward, config: EngineConfig) -> bool:
    """Whether there is such work: if steps are captured, unless the config says that layers stay unchanged."""
    return forward.model.device.type == "cuda" and forward.can_capture and config.compile is not False


class Fusing:
    """The work for a runner. Its slots must be free whenever a part is done.

    check: selftest.check of packed passes over slots 0 and 1, which are set aside for it · wanted: as in fuse_layers ·
    what: the model's name among the step times that are kept in `cache`; "": nothing is timed
    """

    def __init__(
        self, runner: ModelRunner, check: Callable[[], float], wanted: bool | None, what: str, cache: Path
    ) -> None:
        self._runner, self._check, self._wanted, self._what, self._cache = runner, check, wanted, what, cache
        self._forward: Any = runner.forward

    def plan(self, notes: list[str]) -> Timing:
        """Before the first request: the work, and the known times of the steps after it. In notes, the outcome replaces
        SOON. Raises torch.OutOfMemoryError where the memory is too small for the largest step."""
        if not self._what:
            return Timing(faster=self._parts(notes))
        expected = self._name("compiled" if compiles(self._forward, self._wanted) else "merged")
        known = known_times(self._runner, expected, self._cache)
        if not known:
            try_largest(self._runner)
        return Timing(later_ms=known, faster=self._parts(notes))

    def _parts(self, notes: list[str]) -> Generator[None, None, Timing]:
        runner, forward, drop = self._runner, self._forward, self._runner.drop_captures
        wants = compiles(forward, self._wanted)
        yield from imported("torch.export._trace", *(["torch._inductor.compile_fx"] if wants else []))
        made = [(yield from fuse_layers(forward, self._aside, drop, wanted=self._wanted))]
        layers, heads = forward.active.layers, getattr(runner.drafter, "heads", None)
        compiled = layers is not None and layers.compiled
        if compiled and heads is not None:
            width = len(forward.hidden_inputs) * forward.model.config.get_text_config().hidden_size
            made.append((yield from fuse_heads(heads, width, drop)))
        timing = Timing()
        if self._what:
            kind = "plain" if layers is None else "compiled" if compiled else "merged"
            timing, note = time_steps(runner, self._name(kind), self._cache, proven=True)
            made.append(note)
        at = notes.index(SOON)
        notes[at : at + 1] = made
        return timing

    def _aside(self) -> float:
        with self._forward.aside():
            return self._check()

    def _name(self, kind: str) -> str:
        """The name of step times: they hold for one kind of layers."""
        return f"{self._what}, layers {kind}"


def imported(*names: str) -> Iterator[None]:
    """Import modules in a thread: that takes seconds, but other threads can run meanwhile. An import that fails here
    raises its error where the module is used."""

    def run() -> None:
        with contextlib.suppress(Exception):
            for name in names:
                importlib.import_module(name)

    thread = threading.Thread(target=run, name="medusa-import", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(LOOK_S)
        yield

"""The composition root: loader → runner → batch manager. The command line, the server, notebooks and benchmarks all
start here."""

from __future__ import annotations

import queue
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from .config import EngineConfig
from .engine.batch_manager import BatchManager
from .errors import InvalidConfig, InvalidRequest, QueueFull
from .types import Completion, Delta, SamplingParams, Sink

if TYPE_CHECKING:
    from .model.build import Built
    from .model.drafting.choose import ChosenDrafter

Messages = Sequence[dict[str, str]]
Prompt = str | Messages
Result = TypeVar("Result")


class LLM:
    """A model with its batch manager running. A context manager closes it at the end. Closing ends every sequence
    and frees the device memory. Without a reference, or when the process ends, it closes by itself.

    LLM("smollm2-135m"), LLM(EngineConfig(...)) or LLM("folder", slots=4): options are EngineConfig's fields, unknown
    ones are errors. Raises InvalidConfig, LoadError.

    model_name, codec, manager, notes (the automatic choices with their reasons) and forecast (of one sequence: nodes,
    tokens per step, speed-up over plain decoding; None where nothing was measured) are plain attributes.
    """

    def __init__(
        self,
        model: str | EngineConfig | None = None,
        *,
        load: Callable[[EngineConfig], Any] | None = None,
        **options: Any,
    ) -> None:
        """load: makes the LoadedModel from the config, for a model that has no name (random weights)"""
        self.config = _config(model, options)
        loaded, heads, built = _elsewhere(lambda: _loaded(self.config, load))
        self.model_name, self.codec = loaded.name, loaded.codec
        self.device, self.dtype = str(loaded.device), loaded.numbers
        self.heads_name = heads.name
        self._notes = (loaded.notes, heads.notes, built.notes)
        self.tree_error = built.tree_error
        self.manager = BatchManager(built.runner, self.codec, self.config, model_name=self.model_name)
        self._close = weakref.finalize(self, self.manager.close)  # a running pass would abort the process's exit
        self.manager.start()
        runner = built.runner
        self._facts: dict[str, Any] = {
            "slots": runner.num_slots,
            "max_context": runner.max_context,
            "nodes": list(runner.node_choices),
        }
        self._runner = runner

    @property
    def notes(self) -> list[str]:
        """The automatic choices with their reasons; they change when the engine has done the work it left for later."""
        return [note for notes in self._notes for note in notes]

    @property
    def forecast(self) -> tuple[int, float, float] | None:
        return _forecast(self._runner)

    def describe(self) -> dict[str, Any]:
        """The model, its drafters and its limits as plain data, for /health and start-up lines."""
        drafts = [
            name for name, on in ((self.heads_name, self.heads_name != "none"), ("lookup", self.config.lookup)) if on
        ]
        return {
            "model": self.model_name,
            "heads": self.heads_name,
            "drafts": drafts if len(self._facts["nodes"]) > 1 else [],
            "device": self.device,
            "dtype": self.dtype,
            **self._facts,
        }

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Completions in input order; all prompts share passes. A prompt is a string (raw text) or a list of messages
        (chat template). params: one for all prompts, or one for each. Raises InvalidRequest for a prompt that cannot be
        served; the others are then cancelled."""
        return self.generate_ids([self.encode(prompt) for prompt in _as_list(prompts)], params)

    def generate_ids(
        self,
        encoded: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        at_once: int | None = None,
    ) -> list[Completion]:
        """As `generate`, for prompts that are token ids already. at_once: how many may be open at a time (None: as many
        as the queue takes)"""
        each = _each(params, len(encoded))
        inbox: queue.SimpleQueue[list[tuple[str, Delta]]] = queue.SimpleQueue()
        done: dict[str, Completion] = {}
        waiting, ids = list(reversed(list(zip(encoded, each, strict=True)))), []
        open_ids: set[str] = set()
        try:
            while waiting or open_ids:
                while waiting and (at_once is None or len(open_ids) < at_once):
                    try:
                        ids.append(self.manager.submit(*waiting[-1], inbox.put))
                    except QueueFull:
                        if not open_ids:
                            raise
                        break  # the rest follow as ours finish
                    waiting.pop()
                    open_ids.add(ids[-1])
                for sequence_id, delta in inbox.get():
                    if delta.error is not None:
                        raise delta.error
                    if delta.completion is not None:
                        done[sequence_id] = delta.completion
                        open_ids.discard(sequence_id)
        finally:
            for sequence_id in open_ids:
                self.manager.cancel(sequence_id)
        return [done[sequence_id] for sequence_id in ids]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, until: threading.Event | None = None
    ) -> Generator[Delta, None, None]:
        """The Deltas of one prompt as steps finish; the last one carries the Completion. Leaving the loop early cancels
        the sequence. So does setting `until`, from any thread: then no Delta follows, and no Completion."""
        inbox: queue.SimpleQueue[list[tuple[str, Delta]]] = queue.SimpleQueue()
        sequence_id = self.submit(prompt, params, inbox.put)
        ended = False
        try:
            while not ended and (news := _next(inbox, until)):
                for _, delta in news:
                    ended = delta.is_last
                    if delta.error is not None:
                        raise delta.error
                    yield delta
        finally:
            if not ended:
                self.manager.cancel(sequence_id)

    def submit(self, prompt: Prompt, params: SamplingParams | None, sink: Sink) -> str:
        """Start one prompt; its Deltas go to `sink`, on the engine thread. → its id, for `manager.cancel`."""
        return self.manager.submit(self.encode(prompt), _checked(params), sink)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids: of raw text, or of messages through the chat template. Raises InvalidRequest."""
        if isinstance(prompt, str):
            return self.codec.encode(prompt)
        if isinstance(prompt, Sequence) and all(isinstance(message, dict) for message in prompt):
            return self.codec.encode_chat(list(prompt))
        raise InvalidRequest("A prompt is a string or a list of messages.", param="prompt")

    def close(self) -> None:
        self._close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _loaded(config: EngineConfig, load: Callable[[EngineConfig], Any] | None) -> tuple[Any, ChosenDrafter, Built]:
    from .model.build import build_that_fits
    from .model.drafting.choose import choose_drafter
    from .model.loading.load import load_model
    from .model.loading.source import memory_as_load_error

    loaded = (load or load_model)(config)
    with memory_as_load_error(config.model):
        chosen = choose_drafter(config, loaded)
        built = build_that_fits(
            loaded.model,
            config,
            eos_ids=sorted(loaded.eos_ids),
            max_positions=loaded.max_positions,
            drafter=chosen.drafter,
            what=f"{loaded.name} in {loaded.numbers}, heads {chosen.name}",
            later=True,
        )
    return loaded, chosen, built


def _forecast(runner: Any) -> tuple[int, float, float] | None:
    """(nodes, tokens per step, speed-up), from the measured step times and the acceptance found in calibration."""
    ms = runner.step_ms or runner.later_ms
    if not ms or not runner.has_heads:
        return None
    speeds = [
        (tokens / ms[1, nodes], nodes, tokens)
        for nodes, tokens in zip(runner.node_choices, (1.0, *runner.expected[1:]), strict=True)
    ]
    best, nodes, tokens = max(speeds)
    return nodes, tokens, best / speeds[0][0]


def _elsewhere(work: Callable[[], Result]) -> Result:
    """Run `work` in a thread that ends with it. Each thread that computes keeps OpenMP workers. When two threads
    together have more workers than cores, these sleep after every product instead of waiting for the next one, and the
    engine's steps take twice as long (measured on two cores). The calling thread gives up its workers, too."""
    if "torch" in sys.modules:
        from .model.kernels import give_up_workers

        give_up_workers()
    done: list[Result] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="medusa-load", daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]


def _next(inbox: queue.SimpleQueue[Any], until: threading.Event | None) -> list[tuple[str, Delta]]:
    """The next Deltas of the inbox; an empty list once `until` is set."""
    while until is not None and not until.is_set():
        try:
            return inbox.get(timeout=0.05)
        except queue.Empty:
            continue
    return [] if until is not None else inbox.get()


def _config(model: str | EngineConfig | None, options: dict[str, Any]) -> EngineConfig:
    base = model if isinstance(model, EngineConfig) else EngineConfig() if model is None else EngineConfig(model=model)
    unknown = set(options) - set(EngineConfig.__dataclass_fields__)
    if unknown:
        raise InvalidConfig(f"Unknown option {sorted(unknown)[0]!r}.", param=sorted(unknown)[0])
    return replace(base, **options)


def _checked(params: SamplingParams | None) -> SamplingParams:
    if params is not None and not isinstance(params, SamplingParams):
        raise InvalidRequest(f"params must be SamplingParams, not {type(params).__name__}.", param="params")
    return params or SamplingParams()


def _each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """One SamplingParams for each prompt."""
    if not isinstance(params, Sequence):
        return [_checked(params)] * count
    if len(params) != count:
        raise InvalidRequest(f"There are {count} prompts and {len(params)} params.", param="params")
    return [_checked(one) for one in params]


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, from one or many; a list of dicts is one conversation."""
    if isinstance(prompts, str) or (
        isinstance(prompts, Sequence) and prompts and all(isinstance(item, dict) for item in prompts)
    ):
        return [prompts]  # type: ignore[list-item]
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise InvalidRequest("A prompt is a string or a list of messages; give one, or a list of them.", param="prompt")
    return list(prompts)  # type: ignore[arg-type]

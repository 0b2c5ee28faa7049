"""From prompts to heads in one call: load the model, make its answers, train, and report.

train_from_prompts("smollm2-135m", "prompts.txt", minutes=20, out="my-heads")
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config import EngineConfig
from ..errors import InvalidConfig, LoadError
from ..model.loading.choose import choose_device
from ..model.loading.load import LoadedModel, load_model, load_to_answer
from .distill import DistillConfig, Generate, Made, distill, engine_generate
from .finish import Measured
from .prompts import Prompt, read_prompts, split
from .report import running
from .shards import read_answers
from .train_config import Report, TrainConfig
from .train_heads import check_output, is_out_of_memory, state_path, train

DISTILL_SHARE = {"cpu": 0.25, "cuda": 0.4}  # of the minutes, for answers; a CPU makes more than it can learn from
SLOTS = {"cpu": 16, "cuda": 512}
PREFILL_TOKENS = 16384
MIN_PROMPTS = 2  # one to train on and one to measure on

Note = Callable[[str], None]


@contextmanager
def answering(loaded: LoadedModel, config: DistillConfig, slots: int) -> Iterator[Generate]:
    """The serving engine without heads, lookup and text, with full prefill passes."""
    context = config.max_prompt + config.max_tokens
    limit = min(context, loaded.max_positions or context)
    plain = EngineConfig(
        model=loaded.name,
        heads="none",
        tree="off",
        lookup=False,
        slots=slots,
        max_context=limit,
        prefill_chunk=PREFILL_TOKENS,
        max_queue=slots,
    )
    with running(loaded.model, plain, loaded.eos_ids, loaded.max_positions) as (manager, _):
        yield engine_generate(manager, config.max_tokens)


def make_answers(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    out: str | Path,
    config: DistillConfig,
    *,
    slots: int | None = None,
    note: Note = print,
) -> Made:
    """Distil into the folder `out`, and go on where an earlier run stopped. Halve the slots until they fit."""
    vocab = loaded.model.get_input_embeddings().num_embeddings
    slots, line, deadline = slots or SLOTS[loaded.device.type], ProgressLine(), None
    if config.seconds is not None:
        deadline = time.monotonic() + config.seconds
    while True:
        try:
            with answering(loaded, config, slots) as generate:
                made = distill(
                    generate, loaded.codec, prompts, out, config,
                    model_name=loaded.name, vocab_size=vocab, progress=lambda made: line.show(made.line),
                )  # fmt: skip
            line.end(made.line)
            return made
        except KeyboardInterrupt:
            line.leave()
            raise
        except (LoadError, RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) and not is_out_of_memory(error.__cause__ or error) or slots <= 1:
                raise
            slots //= 2
        note(f"{2 * slots} sequences at once do not fit into memory; going on with {slots}")
        if loaded.device.type == "cuda":
            torch.cuda.empty_cache()
        if deadline is not None:
            config = replace(config, seconds=max(1.0, deadline - time.monotonic()))


def train_from_prompts(
    model: str | EngineConfig,
    prompts: str | Path,
    *,
    minutes: float,
    out: str | Path,
    family: str = "sequential",
    answers: str | Path | None = None,
    answer_tokens: int = DistillConfig.max_tokens,
    note: Note = print,
    **options: Any,
) -> Measured:
    """Make answers for DISTILL_SHARE of the minutes, train for the rest, then calibrate and report through the engine
    (a tenth of the training's time, at most 20 seconds). The heads are in `out`, ready for --heads.

    answers: the folder of the answers (default: `<out>.answers`); it stays there for another training · answer_tokens:
    of an answer, at most · options: TrainConfig's fields. The same call after an interruption goes on: answers that
    exist are not made again. Raises InvalidConfig and LoadError.
    """
    if not minutes > 0:
        raise InvalidConfig("minutes must be positive.", param="minutes")
    unknown = set(options) - set(TrainConfig.__dataclass_fields__)
    if unknown:
        raise InvalidConfig(f"Unknown option {sorted(unknown)[0]!r}.", param=sorted(unknown)[0])
    source = model if isinstance(model, EngineConfig) else EngineConfig(model=model)
    share = DISTILL_SHARE[choose_device(source.device).value.type]
    config = TrainConfig(family=family, out=str(out), minutes=minutes * (1 - share), **options)  # type: ignore[arg-type]
    check_output(config)  # before anything is loaded
    training, _ = split(read_prompts(prompts))
    if len(training) < MIN_PROMPTS:
        raise LoadError(f"{prompts} holds too few prompts to train on: {len(training)} and the held-out ones.")
    folder = Path(answers or f"{str(out).rstrip('/')}.answers")
    serving = load_to_answer(source)
    if not under_way(out):  # a training that goes on needs the answers it began with
        config_of_answers = DistillConfig(seconds=60 * minutes * share, max_tokens=answer_tokens)
        make_answers(serving, training, folder, config_of_answers, note=note)
    # heads learn from the weights that the user named, even if the answers came from quantized ones
    loaded = load_model(source) if serving.weights and source.quantize == "none" else serving
    line = ProgressLine()

    def show(report: Report) -> None:
        line.end(report.line)

    return train(
        loaded.model, read_answers(folder), config, serving=serving.model, model_name=loaded.name,
        eos_ids=loaded.eos_ids, max_positions=loaded.max_positions, progress=show, note=note,
    )  # fmt: skip


def under_way(out: str | Path) -> bool:
    """Whether a training into this folder was interrupted; the same call goes on with it."""
    return state_path(str(out)).is_file()


class ProgressLine:
    """One line on stderr. A terminal shows it in place; elsewhere (a notebook, a log) it is printed now and then."""

    def __init__(self, every: float = 0.5, every_elsewhere: float = 15.0) -> None:
        self._tty = sys.stderr.isatty()
        self._every = every if self._tty else every_elsewhere
        self._shown = 0.0

    def show(self, text: str) -> None:
        now = time.monotonic()
        if now - self._shown >= self._every:
            self._shown = now
            print(f"\r{text}\x1b[K" if self._tty else text, end="" if self._tty else "\n", file=sys.stderr, flush=True)

    def leave(self) -> None:
        """Keep the line as it is; what is printed next begins a new line."""
        if self._tty and self._shown:
            print(file=sys.stderr, flush=True)

    def end(self, text: str) -> None:
        print(f"\r{text}\x1b[K" if self._tty else text, file=sys.stderr, flush=True)

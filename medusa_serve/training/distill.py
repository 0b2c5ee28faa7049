"""The model's own answers to prompts, at mixed temperatures: what the heads learn from.

Self-distillation: heads draft what this model says next, so its own answers are the best text to learn from (Medusa,
Cai et al. 2024, §3.1.3). The serving engine makes them, many sequences at a time.
"""

from __future__ import annotations

import hashlib
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..config import check_int
from ..errors import InvalidConfig, InvalidRequest, LoadError, QueueFull
from ..types import Delta, SamplingParams, TextCodec
from .prompts import Prompt
from .shards import done_indexes, open_folder, write_shard

ENCODE = 512  # prompts that are tokenized at once
LOOP = 8  # tokens; an answer that has the same 8 tokens in a row three times is a loop


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How answers are made.

    temperatures  prompt i gets one of them, by its index and the seed; 0 is greedy
    max_tokens    of an answer
    max_prompt    longer prompts (in tokens) are left out
    seconds       after this time no answer is begun or finished; None: all prompts are answered
    cut_loops     an answer ends where 8 tokens begin for the third time: loops are easy, heads would look too good
    shard_answers answers in a shard: a killed run loses at most this many
    """

    temperatures: tuple[float, ...] = (0.0, 0.3, 0.7, 1.0)
    max_tokens: int = 256
    max_prompt: int = 640
    seconds: float | None = None
    cut_loops: bool = True
    shard_answers: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperatures or not all(isinstance(t, (int, float)) and 0 <= t <= 100 for t in self.temperatures):
            raise InvalidConfig("temperatures must be numbers from 0 to 100, at least one.", param="temperatures")
        if self.seconds is not None and not self.seconds > 0:
            raise InvalidConfig("seconds must be positive.", param="seconds")
        check_int(self, "max_tokens", 2, 2**20)
        check_int(self, "max_prompt", 1, 2**20)
        check_int(self, "shard_answers", 1, 2**20)
        check_int(self, "seed", 0, 2**31 - 1)


class Job(NamedTuple):
    """One answer to make. It depends only on the prompt's index and the config, not on the order of the work."""

    prompt: int
    seed: int
    temperature: float
    prompt_ids: tuple[int, ...]


class Made(NamedTuple):
    """How far a run is; `seconds` and the counts are of this run alone."""

    answers: int
    tokens: int
    seconds: float
    total: int

    @property
    def line(self) -> str:
        rate = self.tokens / self.seconds if self.seconds else 0.0
        return f"answers {self.answers}/{self.total}  tokens {self.tokens:,}  {rate:,.0f} tokens/s"


# Answers as they finish, in any order. When the iterator is closed early, it cancels the unfinished answers.
Generate = Callable[[Iterator[Job]], Iterator[tuple[Job, Sequence[int]]]]


def distill(
    generate: Generate,
    codec: TextCodec,
    prompts: Sequence[Prompt],
    out: str | Path,
    config: DistillConfig,
    *,
    model_name: str,
    vocab_size: int,
    progress: Callable[[Made], None] = lambda made: None,
) -> Made:
    """Answer the prompts into the folder `out`, going on where an earlier run stopped.

    Raises LoadError before any work when `out` holds something else, or answers made with other options.
    """
    open_folder(out, describe(config, prompts, model_name, vocab_size))
    done = done_indexes(out)
    started, made, rows = time.monotonic(), Made(0, 0, 0.0, len(prompts) - len(done)), []
    answers = generate(jobs(codec, prompts, config, done))
    try:
        for job, ids in answers:
            ids = ids[: first_loop(ids)] if config.cut_loops else ids
            if ids:
                rows.append((*job, ids))
            made = Made(made.answers + 1, made.tokens + len(ids), time.monotonic() - started, made.total)
            if len(rows) >= config.shard_answers:
                full, rows = rows, []  # first: an interrupt after the writing must not write them again
                write_shard(out, full)
            progress(made)
            if config.seconds is not None and made.seconds > config.seconds:
                break
    finally:  # also when interrupted: what is finished is kept
        if rows:
            write_shard(out, rows)
        close = getattr(answers, "close", None)
        if close is not None:
            close()
    return made


def describe(config: DistillConfig, prompts: Sequence[Prompt], model_name: str, vocab_size: int) -> dict[str, Any]:
    """What must be equal for a run to go on in the same folder; the time limit and the shard size may change."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(prompt.text.encode("utf-8", "surrogatepass") + b"\0")
    options = {name: value for name, value in asdict(config).items() if name not in ("seconds", "shard_answers")}
    options["temperatures"] = list(config.temperatures)
    return {"model": model_name, "vocab_size": vocab_size, "prompts": digest.hexdigest(), **options}


def jobs(codec: TextCodec, prompts: Sequence[Prompt], config: DistillConfig, done: Iterable[int]) -> Iterator[Job]:
    """The jobs that are left. Prompts that the template refuses or that are too long are skipped."""
    skip = set(done)
    left = [index for index in range(len(prompts)) if index not in skip]
    for start in range(0, len(left), ENCODE):
        block = left[start : start + ENCODE]
        for index, ids in zip(block, codec.encode_many([prompts[index].text for index in block]), strict=True):
            if ids and len(ids) <= config.max_prompt:
                number = int.from_bytes(hashlib.sha256(f"{config.seed}:{index}".encode()).digest()[:8], "little")
                temperature = float(config.temperatures[number % len(config.temperatures)])
                yield Job(index, number >> 33, temperature, tuple(ids))


def encode(codec: TextCodec, text: str) -> list[int]:
    """A prompt as the server would send it: with the chat template if there is one. Heads that were trained on another
    template have a low acceptance."""
    return codec.encode_chat([{"role": "user", "content": text}]) if codec.has_chat_template else codec.encode(text)


def first_loop(ids: Sequence[int]) -> int | None:
    """Where 8 tokens in a row begin for the third time; None if that never happens."""
    count: dict[tuple[int, ...], int] = {}
    for start in range(len(ids) - LOOP + 1):
        run = tuple(ids[start : start + LOOP])
        count[run] = count.get(run, 0) + 1
        if count[run] == 3:
            return start
    return None


def engine_generate(manager: Any, max_tokens: int) -> Generate:
    """Answers by a running batch manager (LLM.manager): the queue is kept full, a refused prompt is skipped."""

    def generate(todo: Iterator[Job]) -> Iterator[tuple[Job, Sequence[int]]]:
        inbox: queue.SimpleQueue[list[tuple[str, Delta]]] = queue.SimpleQueue()
        open_jobs: dict[str, Job] = {}
        job = next(todo, None)
        try:
            while job is not None or open_jobs:
                while job is not None:
                    params = SamplingParams(max_tokens=max_tokens, temperature=job.temperature, seed=job.seed)
                    try:
                        open_jobs[manager.submit(job.prompt_ids, params, inbox.put)] = job
                    except QueueFull:
                        if not open_jobs:
                            raise
                        break  # the others follow when some of these are finished
                    except InvalidRequest:
                        pass  # too long for this context
                    job = next(todo, None)
                if open_jobs:
                    yield from _finished(inbox.get(), open_jobs)
        finally:
            for sequence_id in open_jobs:
                manager.cancel(sequence_id)

    return generate


def _finished(deltas: list[tuple[str, Delta]], open_jobs: dict[str, Job]) -> Iterator[tuple[Job, Sequence[int]]]:
    for sequence_id, delta in deltas:
        if delta.error is not None:
            raise LoadError(f"The engine failed while making answers: {delta.error.message}") from delta.error
        if delta.completion is not None:
            yield open_jobs.pop(sequence_id), delta.completion.token_ids

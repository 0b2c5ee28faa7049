"""Train heads on a model's own answers, for a time or a number of steps; then calibrate, report and save them.

Only the heads change. Their master weights are fp32; the body runs in the base's dtype under autocast, the loss in
fp32. The base runs once over the answers, if there is memory to keep its hidden states (hidden_store.py). When a run
was interrupted, the same command goes on from `<out>.training/state.pt`.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LoadError
from ..model.drafting.files import save_heads
from ..model.drafting.heads import SequentialHeads, num_parameters
from .batches import make_batch, plan_epoch, usable
from .calibrate import forecast, top_shares
from .finish import Measured, Subject, choose_held_out, describe, finish, measure
from .hidden_store import HiddenStore, memory_to_spare
from .loss import soft_loss
from .optimizer_step import MAX_SKIPPED, Stepper, schedule
from .shards import Answers
from .teacher import Teacher, draft_vocabulary, head_features, new_heads
from .train_config import Report, TrainConfig

# A CPU makes few steps in its minutes, so its batches are small and its rate is high: 30 steps on 934 tokens of the
# default model's answers gave 1.33 tokens per step with 8 static nodes, and 1.26 at a rate of 1e-3
BATCH_ROWS = {"cpu": 256, "cuda": 8192}
LR = {"cpu": 3e-3, "cuda": 1e-3}
VALUE_EVERY = 10  # steps: the loss is only for the report
# the most of the time that is left for the base's hidden states before the first step: a GPU runs large passes far
# faster than small ones; a CPU saves nothing, and no step may ever need some of the answers
FILL_SHARE = {"cpu": 0.0, "cuda": 0.3}
LOOKING_SHARE = 0.1  # the most of the time for the progress reports: on a slow CPU one takes as long as ten steps
REPORT_SHARE = 0.1  # the most of the training's time for the engine's answers at its end
# options that may be different when a run goes on
FREE = ("out", "minutes", "batch_rows", "keep_gib", "checkpoint_seconds", "report_seconds", "licence")
COUNTS = ("step", "epoch", "place", "tokens", "elapsed", "prepared", "batch_rows")


def check_output(config: TrainConfig) -> None:
    """Raises LoadError if the output folder exists or cannot be made: called before any work, and before a model is
    loaded."""
    if Path(config.out).exists():
        raise LoadError(f"The output folder {config.out} exists; choose another, or delete it.")
    parent = Path(config.out).absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoadError(f"The output folder {config.out} cannot be made: {error.strerror}.") from error
    if not os.access(parent, os.W_OK):
        raise LoadError(f"The output folder {config.out} cannot be made: {parent} is not writable.")


def train(
    model: Any,
    answers: Answers,
    config: TrainConfig,
    *,
    serving: Any = None,
    model_name: str = "",
    eos_ids: Collection[int] = (),
    max_positions: int | None = None,
    progress: Callable[[Report], None] = lambda report: None,
    note: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Train, calibrate, report, save into config.out; returns what was measured on the held-out answers.

    model: the base, frozen and in eval mode, on its device · serving: the base that the report's engine runs, None: the
    same · eos_ids, max_positions: the model's, for the report.
    Raises LoadError: the output exists, answers of another vocabulary, too few answers, a batch that does not fit (it
    names the size that does), an earlier run with other options.
    """
    check_output(config)
    teacher = Teacher(model, config.hidden_inputs)
    if answers.vocab_size != teacher.vocab_size:
        raise LoadError(
            f"The answers have a vocabulary of {answers.vocab_size}, the model has {teacher.vocab_size}: "
            "they were made by another model."
        )
    run = Run(teacher, answers, config, model_name)
    run.resume(note)
    run.fit(note)
    run.fill(note)
    try:
        run.loop(progress)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise LoadError(
            f"A step of {run.batch_rows} answer rows does not fit into memory any more; batch_rows "
            f"{max(1, run.batch_rows // 2)} should. Nothing is lost: the same command goes on from step {run.step}."
        ) from error
    finally:  # also when interrupted; no state has bad numbers, because such steps are skipped
        if run.step:
            run.save()
    origin = run.provenance()
    run.release()
    measured = finish(
        run.subject(), run.held_out, config, origin, trial=run.state_path.parent / "heads", serving=serving,
        eos_ids=eos_ids, max_positions=max_positions, seconds=REPORT_SHARE * run.elapsed, note=note,
    )  # fmt: skip
    shutil.rmtree(run.state_path.parent, ignore_errors=True)
    return measured


class Run:
    """The state of a training: heads, optimizer, and the place in the data: the next batch of the epoch's plan."""

    def __init__(self, teacher: Teacher, answers: Answers, config: TrainConfig, model_name: str) -> None:
        self.teacher, self.answers, self.config, self.model_name = teacher, answers, config, model_name
        numbers = usable(answers, config.max_length)
        self.held_out, self.numbers = choose_held_out(answers, numbers, config.held_out)
        if not len(self.numbers):
            raise LoadError("There are too few answers to train on: all of them are held out.")
        self.device = teacher.device
        self.heads = new_heads(config, teacher, draft_vocabulary(answers, config.draft_vocab))
        self.output = teacher.output(self.heads.token_map)
        depths = torch.arange(config.num_heads, device=self.device, dtype=torch.float64)
        self.weights = (config.decay**depths).float()
        self.lr = config.lr or LR[self.device.type]
        self.stepper = Stepper(self.heads, self.lr, config.weight_decay, teacher.dtype)
        self.store = HiddenStore(teacher, answers)
        self.batch_rows = config.batch_rows or BATCH_ROWS[self.device.type]
        self.step = self.epoch = self.place = self.tokens = 0
        self.elapsed = self.prepared = 0.0  # seconds: of all, and before the first step
        self._kept: dict[int, Tensor] = {}  # Subject.kept
        self._transient = 0  # bytes that a step takes while it runs
        self.state_path = state_path(config.out)

    def autocast(self) -> Any:
        half = self.teacher.dtype in (torch.float16, torch.bfloat16)
        return torch.autocast(self.device.type, dtype=self.teacher.dtype if half else None, enabled=half)

    def subject(self) -> Subject:
        """For measuring; a pass without gradients may have twice the rows of a step."""
        return Subject(self.heads, self.teacher, self.answers, 2 * self.batch_rows, self.autocast, self._kept)

    # ---- steps -------------------------------------------------------------------------------------------------------

    def loop(self, progress: Callable[[Report], None]) -> None:
        config, saved, due = self.config, self.elapsed, 0.0
        started = time.monotonic() - self.elapsed
        for numbers in self.batches():
            if self.fraction >= 1.0:
                break
            self.learn(numbers)
            self.elapsed = time.monotonic() - started
            if self.step % MAX_SKIPPED == 0:
                self.stepper.check()
            if self.elapsed - saved >= config.checkpoint_seconds:
                self.save()
                saved = self.elapsed
            if self.elapsed >= due:
                progress(self.report())
                cost, self.elapsed = time.monotonic() - started - self.elapsed, time.monotonic() - started
                due = self.elapsed + max(config.report_seconds, cost / LOOKING_SHARE)
        if self.step:
            progress(self.report())

    @property
    def fraction(self) -> float:
        """How much of the steps is done, or of the time from the first step on."""
        if self.config.steps is not None:
            return self.step / self.config.steps
        assert self.config.minutes is not None
        return (self.elapsed - self.prepared) / max(1e-9, 60.0 * self.config.minutes - self.prepared)

    def plan(self) -> list[np.ndarray]:
        """The batches of this epoch."""
        return plan_epoch(self.answers, self.numbers, self.batch_rows, self.config.seed, self.epoch)

    def batches(self) -> Iterator[np.ndarray]:
        """Batches of sequence numbers without end, from the run's place on; `learn` moves the place."""
        while True:
            plan = self.plan()
            while self.place < len(plan):
                yield plan[self.place]
            self.epoch, self.place = self.epoch + 1, 0

    def learn(self, numbers: np.ndarray) -> None:
        """One step. If gradients are not finite, the step is skipped and counted."""
        rate = self.lr * schedule(self.fraction, self.config.warmup)
        self.stepper.step(rate, self.gradients(numbers, value=self.step % VALUE_EVERY == 0))
        self.step, self.place = self.step + 1, self.place + 1
        self.tokens += int((self.answers.answer_len[numbers] - 1).sum())

    def gradients(self, numbers: np.ndarray, *, value: bool) -> Tensor:
        """The loss (NaN without `value`); sets the parameters' gradients: its own, times the scale."""
        batch, inputs, last = self.store.load(numbers)
        with self.autocast():
            features = head_features(self.heads, inputs, batch)
        loss = soft_loss(
            features.detach(), last, batch.offset, self.output, self.weights,
            scale=self.stepper.scale, temperature=self.config.teacher_temperature, value=value,
        )  # fmt: skip
        features.backward(loss.grad)
        return loss.total

    def report(self) -> Report:
        seen = measure(self.subject(), self.held_out[:64])
        shares, stepper = (top_shares(seen, 1), top_shares(seen, 5)), self.stepper
        loss, skipped, fraction = float(stepper.loss), int(stepper.skipped), min(1.0, self.fraction)
        return Report(self.step, fraction, self.elapsed, loss, self.tokens, skipped, *shares, forecast(seen))

    # ---- before the first step ---------------------------------------------------------------------------------------

    def fit(self, note: Callable[[str], None]) -> None:
        """Try the largest pass of the base and the largest batch before the first step; halve them until they fit. If
        the user set batch_rows and it does not fit, the error names the size that does."""
        longest = int(self.answers.length[self.numbers].max())
        tokens = self.store.pass_tokens
        if self.device.type == "cuda":  # a CPU's pass is small: it takes seconds and little memory
            self.store.pass_tokens = self._fitting(tokens, longest, lambda size: self.store.try_pass(size, longest))
        asked = self.batch_rows
        self.batch_rows = self._fitting(asked, int(self.answers.answer_len[self.numbers].max()), self._try_step)
        if self.batch_rows < asked:
            if self.config.batch_rows is not None:
                raise LoadError(
                    f"A step of {asked} answer rows does not fit into memory; batch_rows {self.batch_rows} does."
                )
            note(f"steps of {self.batch_rows} answer rows, because {asked} do not fit into memory")

    def _fitting(self, size: int, least: int, attempt: Callable[[int], None]) -> int:
        """The largest of size, size / 2, … that `attempt` has the memory for; `least` is tried last."""
        while not self._fits(attempt, size):
            if size <= least:
                raise LoadError(f"Not even {size} tokens at once fit into the memory of {self.device}.")
            size = max(least, size // 2)
        return size

    def _fits(self, attempt: Callable[[int], None], size: int) -> bool:
        """Whether there is memory for `attempt`; `_transient` keeps how much it took."""
        cuda, fits = self.device.type == "cuda", True
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            attempt(size)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        self.stepper.clear()
        if cuda:
            peak = torch.cuda.max_memory_reserved(self.device)
            torch.cuda.empty_cache()
            if fits:
                self._transient = max(self._transient, peak - torch.cuda.memory_reserved(self.device))
        return fits

    def _try_step(self, rows: int) -> None:
        self.batch_rows = rows
        self.store.reserve(rows)
        self.gradients(max(self.plan(), key=lambda numbers: int(self.answers.answer_len[numbers].sum())), value=True)

    def fill(self, note: Callable[[str], None]) -> None:
        """Compute the base's hidden states of the answers into the store, in the order of the next batches, as many as
        memory and time allow."""
        started, gib = time.monotonic(), self.config.keep_gib
        moments = 8 * num_parameters(self.heads)  # the optimizer makes them at its first step
        budget = memory_to_spare(self.device, self._transient + moments) if gib is None else gib * 2**30
        plan = self.plan()
        order = np.concatenate(plan[self.place :] + plan[: self.place])
        order, everything = self.store.choose(order, budget), len(order)
        seconds = math.inf
        if self.config.minutes is not None:
            seconds = FILL_SHARE[self.device.type] * (60.0 * self.config.minutes - self.elapsed)
        if len(order):
            note(f"the base reads {len(order):,} of {everything:,} answers once, and their hidden states are kept")
        self.store.keep(order, self.batch_rows, seconds)
        if len(order) < everything:
            note(f"{everything - len(order):,} of {everything:,} answers pass through the base at each step again")
        self.prepared += time.monotonic() - started
        self.elapsed += time.monotonic() - started

    # ---- keeping -----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the state, complete or not at all, and the heads as they are now: they can be used in any case."""
        state = {
            "config": _comparable(self.config, self.answers),
            "heads": self.heads.state_dict(),
            "stepper": self.stepper.state(),
            **{name: getattr(self, name) for name in COUNTS},
        }
        self.state_path.parent.mkdir(parents=True, exist_ok=True)
        part = self.state_path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.state_path)
        info = describe(self.heads, self.teacher, None, None, self.provenance())
        save_heads(self.heads, info, self.state_path.parent / "heads", overwrite=True)

    def resume(self, note: Callable[[str], None]) -> None:
        """Go on from a saved state if there is one; else set the fresh heads to the base's scale."""
        if not self.state_path.is_file():
            first = make_batch(self.answers, self.held_out[:8]).to(self.device)
            if isinstance(self.heads, SequentialHeads):
                self.heads.match_scale(self.teacher.hidden(first.ids)[1][first.at])
            return
        try:
            state = torch.load(self.state_path, map_location=self.device, weights_only=True)
        except Exception as error:  # errors of pickle and zip, of many types
            raise LoadError(f"{self.state_path} is damaged ({error}); delete {self.state_path.parent}.") from error
        mine = _comparable(self.config, self.answers)
        for name, value in mine.items():
            if state["config"].get(name) != value:
                raise LoadError(
                    f"{self.state_path.parent} holds a run with {name} {state['config'].get(name)!r}, asked is "
                    f"{value!r}; give the same options to go on, or delete that folder."
                )
        self.heads.load_state_dict(state["heads"])
        self.stepper.load(state["stepper"])
        for name in COUNTS:
            setattr(self, name, state[name])
        if self.config.batch_rows is not None:  # about the same place among batches of another size
            self.place = self.place * self.batch_rows // self.config.batch_rows
            self.batch_rows = self.config.batch_rows
        note(f"going on from step {self.step} after {self.elapsed / 60:.1f} minutes")

    def release(self) -> None:
        """Free what only steps need: a GPU has no memory for it and the engine."""
        self.stepper.clear()
        del self.store, self.stepper
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def provenance(self) -> dict[str, Any]:
        """For the provenance of the heads."""
        return {
            "base": self.model_name,
            "answers": len(self.answers),
            "answer_tokens": self.answers.num_answer_tokens,
            "positions_trained": self.tokens,
            "epochs": round(self.tokens / max(1, int((self.answers.answer_len[self.numbers] - 1).sum())), 2),
            "steps": self.step,
            "skipped_steps": int(self.stepper.skipped),
            "minutes": round(self.elapsed / 60, 2),
            "loss": round(float(self.stepper.loss), 4),
            "batch_rows": self.batch_rows,
            "lr": self.lr,
            "decay": self.config.decay,
        }


def state_path(out: str) -> Path:
    """The state file of a training into the folder `out`, until it is done."""
    return Path(out.rstrip("/") + ".training") / "state.pt"


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def _comparable(config: TrainConfig, answers: Answers) -> dict[str, Any]:
    """What must be equal in a saved run and the run that goes on from it."""
    options = {name: value for name, value in asdict(config).items() if name not in FREE}
    options["hidden_inputs"] = list(options["hidden_inputs"])
    return {**options, "answers": len(answers), "answer_tokens": answers.num_answer_tokens, "model": answers.model}

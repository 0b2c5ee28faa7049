"""Train heads on a model's own answers: time-budgeted, resumable, ending with calibrated heads in a folder.

Nothing but the heads changes. Their master weights are fp32; the body runs in the base's dtype under autocast, the loss
in fp32. A run that is interrupted goes on from `<out>.training/state.pt` when the same command is given again.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import check_int
from ..errors import InvalidConfig, LoadError
from ..model.checkpoints import save_heads
from ..model.heads import Heads, SequentialHeads
from .batches import Batch, make_batch, plan_epoch, usable
from .calibrate import forecast, top_shares
from .finish import Measured, choose_held_out, describe, finish, measure
from .loss import soft_loss
from .shards import Answers
from .teacher import Teacher, draft_vocabulary, head_features, new_heads

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
CLIP, FLOOR = 1.0, 0.02  # gradient norm at most; the learning rate ends at this share of its peak
MAX_SKIPPED = 50  # steps in a row without finite gradients: something is wrong for good
FREE = ("out", "minutes", "checkpoint_seconds", "report_seconds", "licence")  # may change when a run goes on


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What is trained, and for how long. Exactly one of minutes and steps is set.

    num_heads      depths: heads of the Medusa family, the deepest depth of the sequential one
    num_layers     residual blocks a head, or blocks a cell · width, inner, readout: sizes of the sequential cell
    draft_vocab    the most frequent tokens of the answers; 0: the whole vocabulary
    batch_tokens   of one step, padding and prompts counted; None: from the device, halved until it fits
    decay          depth d counts decay^d in the loss
    held_out       answers that never train; the forecast is made on them
    """

    family: Literal["medusa", "sequential"]
    out: str
    minutes: float | None = None
    steps: int | None = None
    num_heads: int = 5
    num_layers: int = 1
    width: int | None = None
    inner: int = 1024
    readout: int = 512
    hidden_inputs: tuple[int, ...] = (-1,)
    draft_vocab: int = 16384
    batch_tokens: int | None = None
    max_length: int = 1024
    lr: float = 1e-3
    warmup: float = 0.03
    weight_decay: float = 0.01
    decay: float = 0.8
    teacher_temperature: float = 1.0
    held_out: int = 256
    seed: int = 0
    checkpoint_seconds: float = 60.0
    report_seconds: float = 30.0
    licence: str = ""

    def __post_init__(self) -> None:
        if self.family not in ("medusa", "sequential"):
            raise InvalidConfig(f"family must be medusa or sequential, not {self.family!r}.", param="family")
        if not isinstance(self.out, str) or not self.out.strip():
            raise InvalidConfig("out must name a folder.", param="out")
        if (self.minutes is None) == (self.steps is None):
            raise InvalidConfig("Set either minutes or steps.", param="minutes")
        for name, low, high in (("num_heads", 1, 16), ("num_layers", 1, 8), ("inner", 1, 2**16), ("readout", 1, 2**16)):
            check_int(self, name, low, high)
        for name, low in (("steps", 1), ("width", 1), ("batch_tokens", 1)):
            check_int(self, name, low, 2**31, optional=True)
        for name, low in (("draft_vocab", 0), ("max_length", 4), ("held_out", 1), ("seed", 0)):
            check_int(self, name, low, 2**31)
        for name, above in (("minutes", 0), ("lr", 0), ("decay", 0), ("teacher_temperature", 0)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and above < value < math.inf):
                raise InvalidConfig(f"{name} must be a positive number, not {value!r}.", param=name)
        if self.family == "medusa" and tuple(self.hidden_inputs) != (-1,):
            raise InvalidConfig("Medusa heads read the last hidden state only.", param="hidden_inputs")


@dataclass(frozen=True)
class Report:
    """Where a run stands. top1, top5: shares per depth on held-out answers; forecast: acceptance by nodes."""

    step: int
    fraction: float
    elapsed: float
    loss: float
    tokens: int
    skipped: int
    top1: list[float]
    top5: list[float]
    forecast: dict[int, float]

    @property
    def line(self) -> str:
        bar = "█" * int(self.fraction * 20)
        per = " ".join
        return (
            f"{bar:░<20} {self.fraction:4.0%} {int(self.elapsed) // 60}:{int(self.elapsed) % 60:02d} step {self.step}"
            f"  loss {self.loss:.3f}  top-1 {per(f'{x:.0%}' for x in self.top1)}"
            f"  top-5 {per(f'{x:.0%}' for x in self.top5)}"
            f"  forecast {per(f'{n}:{x:.2f}' for n, x in self.forecast.items())}"
            f"  {self.tokens / max(self.elapsed, 1e-9):,.0f} tokens/s"
            + (f"  {self.skipped} skipped" * bool(self.skipped))
        )


def check_output(config: TrainConfig) -> None:
    """Raises LoadError when the output exists: called before any work, and by a caller before it loads a model."""
    if Path(config.out).exists():
        raise LoadError(f"The output folder {config.out} exists; choose another, or delete it.")


def train(
    model: Any,
    answers: Answers,
    config: TrainConfig,
    *,
    model_name: str = "",
    progress: Callable[[Report], None] = lambda report: None,
    note: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Train, calibrate, save into config.out; returns what was measured on the held-out answers.

    model: the base, frozen and in eval mode, on its device. Raises LoadError: output exists, answers of another
    vocabulary, too few answers, a batch that does not fit (with the size that does), an earlier run with other options.
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
    try:
        run.loop(progress)
    finally:  # also when interrupted; a state with bad numbers is never kept, because such steps are skipped
        if run.step:
            run.save()
    measured = finish(run.heads, teacher, answers, run.held_out, config, run.facts(), autocast=run.autocast)
    shutil.rmtree(run.state_path.parent, ignore_errors=True)
    return measured


class Run:
    """The state of a training: heads, optimizer, and where in the data it stands."""

    def __init__(self, teacher: Teacher, answers: Answers, config: TrainConfig, model_name: str) -> None:
        self.teacher, self.answers, self.config, self.model_name = teacher, answers, config, model_name
        numbers = usable(answers, config.max_length)
        self.held_out, self.numbers = choose_held_out(answers, numbers, config.held_out)
        if not len(self.numbers):
            raise LoadError("There are too few answers to train on: none is left beside those held out.")
        self.device = teacher.device
        self.heads = new_heads(config, teacher, draft_vocabulary(answers, config.draft_vocab))
        self.output = teacher.output(self.heads.token_map)
        self.weights = config.decay ** torch.arange(config.num_heads, device=self.device, dtype=torch.float64)
        self.weights = self.weights.float()
        self.optimizer = _optimizer(self.heads, config)
        self.batch_tokens = config.batch_tokens or BATCH_TOKENS[self.device.type]
        self.step = self.epoch = self.place = self.tokens = self.skipped = 0
        self.elapsed, self.loss = 0.0, math.nan
        self.scale = 2.0**12 if teacher.dtype == torch.float16 else 1.0  # of the gradient, against underflow
        self._good = self._bad = 0
        self.state_path = Path(config.out.rstrip("/") + ".training") / "state.pt"

    def autocast(self) -> Any:
        half = self.teacher.dtype in (torch.float16, torch.bfloat16)
        return torch.autocast(self.device.type, dtype=self.teacher.dtype if half else None, enabled=half)

    # ---- steps -------------------------------------------------------------------------------------------------------

    def loop(self, progress: Callable[[Report], None]) -> None:
        config, saved, reported = self.config, self.elapsed, -math.inf
        started = time.monotonic() - self.elapsed
        for batch in self.batches():
            if self.fraction >= 1.0:
                break
            self.learn(batch)
            self.elapsed = time.monotonic() - started
            if self.elapsed - saved >= config.checkpoint_seconds:
                self.save()
                saved = self.elapsed
            if self.elapsed - reported >= config.report_seconds:
                progress(self.report())
                reported = self.elapsed
        if self.step:
            progress(self.report())

    @property
    def fraction(self) -> float:
        """How much of the budget is spent: by steps, or by time."""
        if self.config.steps is not None:
            return self.step / self.config.steps
        assert self.config.minutes is not None
        return self.elapsed / (60.0 * self.config.minutes)

    def batches(self) -> Iterator[Batch]:
        """From where the run stands, for ever; `learn` moves on to the next place."""
        while True:
            plan = plan_epoch(self.answers, self.numbers, self.batch_tokens, self.config.seed, self.epoch)
            while self.place < len(plan):
                yield make_batch(self.answers, plan[self.place]).to(self.device)
            self.epoch, self.place = self.epoch + 1, 0

    def learn(self, batch: Batch) -> None:
        """One step. Gradients that are not finite are thrown away and counted, and the fp16 scale is halved."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * schedule(self.fraction, self.config.warmup)
        loss, grad_norm = self.gradients(batch)
        if not math.isfinite(grad_norm):
            self.skipped, self._good, self._bad = self.skipped + 1, 0, self._bad + 1
            self.scale = max(1.0, self.scale / 2)
            if self._bad > MAX_SKIPPED:
                raise LoadError(f"{self._bad} training steps in a row gave no finite numbers in {self.teacher.dtype}.")
        else:
            self.optimizer.step()
            self._good, self._bad = self._good + 1, 0
            if self.teacher.dtype == torch.float16 and self._good % 500 == 0:
                self.scale = min(2.0**20, self.scale * 2)
            if self.step % 10 == 0 or not math.isfinite(self.loss):
                value = float(loss)
                self.loss = value if not math.isfinite(self.loss) else 0.8 * self.loss + 0.2 * value
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.place, self.tokens = self.step + 1, self.place + 1, self.tokens + len(batch.at)

    def gradients(self, batch: Batch) -> tuple[Tensor, float]:
        """(loss, norm of the gradient); the parameters' gradients are unscaled and clipped."""
        inputs, last = self.teacher.hidden(batch.ids)
        with self.autocast():
            features = head_features(self.heads, inputs[batch.at], batch)
        loss = soft_loss(
            features.detach(), last[batch.at + 1], batch.place, self.output, self.weights,
            scale=self.scale, temperature=self.config.teacher_temperature,
        )  # fmt: skip
        features.backward(loss.grad)
        parameters = [parameter for parameter in self.heads.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, CLIP * self.scale)) / self.scale
        if self.scale != 1.0:
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1.0 / self.scale)
        return loss.total, norm

    def report(self) -> Report:
        seen = measure(self.heads, self.teacher, self.answers, self.held_out[:64], self.batch_tokens, self.autocast)
        shares = top_shares(seen, 1), top_shares(seen, 5)
        fraction = min(1.0, self.fraction)
        return Report(self.step, fraction, self.elapsed, self.loss, self.tokens, self.skipped, *shares, forecast(seen))

    def fit(self, note: Callable[[str], None]) -> None:
        """Try the largest batch before anything is spent on it; halve until it fits. A size that was asked for and
        does not fit is an error that names the one that does."""
        asked = self.batch_tokens
        while not self._fits():
            if self.batch_tokens <= self.config.max_length:
                raise LoadError(f"Not even {self.batch_tokens} tokens a step fit into the memory of {self.device}.")
            self.batch_tokens //= 2
        if self.batch_tokens < asked:
            if self.config.batch_tokens is not None:
                raise LoadError(
                    f"A step of {asked} tokens does not fit into memory; batch_tokens {self.batch_tokens} does."
                )
            note(f"steps of {self.batch_tokens} tokens, because {asked} do not fit into memory")

    def _fits(self) -> bool:
        plan = plan_epoch(self.answers, self.numbers, self.batch_tokens, self.config.seed, self.epoch)
        answers = self.answers
        largest = max(
            plan, key=lambda batch: int(answers.length[batch].max()) * len(batch) + answers.answer_len[batch].sum()
        )
        try:
            self.gradients(make_batch(answers, largest).to(self.device))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return True

    # ---- keeping -----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the state, never half, and beside it the heads as they are: these can be used whatever happens."""
        state = {
            "config": _comparable(self.config, self.answers),
            "batch_tokens": self.batch_tokens,
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **{name: getattr(self, name) for name in ("step", "epoch", "place", "tokens", "skipped")},
            **{name: getattr(self, name) for name in ("elapsed", "loss", "scale")},
        }
        self.state_path.parent.mkdir(parents=True, exist_ok=True)
        part = self.state_path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.state_path)
        info = describe(self.heads, self.teacher, None, None, self.facts())
        save_heads(self.heads, info, self.state_path.parent / "heads", overwrite=True)

    def resume(self, note: Callable[[str], None]) -> None:
        """Go on from a saved state, if there is one; else set the fresh heads to the base's scale."""
        if not self.state_path.is_file():
            first = make_batch(self.answers, self.held_out[:8]).to(self.device)
            if isinstance(self.heads, SequentialHeads):
                self.heads.match_scale(self.teacher.hidden(first.ids)[1][first.at])
            return
        try:
            state = torch.load(self.state_path, map_location=self.device, weights_only=True)
        except Exception as error:  # pickle and zip errors of many types
            raise LoadError(f"{self.state_path} is damaged ({error}); delete {self.state_path.parent}.") from error
        mine = _comparable(self.config, self.answers)
        for name, value in mine.items():
            if state["config"].get(name) != value:
                raise LoadError(
                    f"{self.state_path.parent} holds a run with {name} {state['config'].get(name)!r}, asked is "
                    f"{value!r}; give the same options to go on, or delete that folder."
                )
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("step", "epoch", "place", "tokens", "skipped", "elapsed", "loss", "scale", "batch_tokens"):
            setattr(self, name, state[name])
        note(f"going on from step {self.step} after {self.elapsed / 60:.1f} minutes")

    def facts(self) -> dict[str, Any]:
        """For the provenance of the heads."""
        return {
            "base": self.model_name,
            "answers": len(self.answers),
            "answer_tokens": self.answers.num_answer_tokens,
            "positions_trained": self.tokens,
            "epochs": round(self.tokens / max(1, int((self.answers.answer_len[self.numbers] - 1).sum())), 2),
            "steps": self.step,
            "skipped_steps": self.skipped,
            "minutes": round(self.elapsed / 60, 2),
            "loss": round(self.loss, 4),
            "batch_tokens": self.batch_tokens,
            "lr": self.config.lr,
            "decay": self.config.decay,
        }


def schedule(fraction: float, warmup: float) -> float:
    """Share of the peak learning rate: linear warm-up, then a half cosine down to FLOOR."""
    if fraction < warmup:
        return max(fraction / warmup, 1e-3)
    part = min(1.0, (fraction - warmup) / max(1e-9, 1.0 - warmup))
    return FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + math.cos(math.pi * part))


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def _optimizer(heads: Heads, config: TrainConfig) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in heads.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in heads.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=next(heads.parameters()).is_cuda)


def _comparable(config: TrainConfig, answers: Answers) -> dict[str, Any]:
    """What must agree between a saved run and the one that goes on from it."""
    options = {name: value for name, value in asdict(config).items() if name not in FREE}
    options["hidden_inputs"] = list(options["hidden_inputs"])
    return {**options, "answers": len(answers), "answer_tokens": answers.num_answer_tokens, "model": answers.model}

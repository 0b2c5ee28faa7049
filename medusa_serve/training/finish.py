"""The end of a training: measure the heads on held-out answers, calibrate, report through the engine, save."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..model.drafting.files import save_heads
from ..model.drafting.heads import Heads, HeadsInfo, SequentialHeads, num_parameters
from ..model.drafting.tree import NUM_RANKS
from .batches import Batch, in_order, make_batch
from .calibrate import PAST_END, SAMPLED, Noise, Ranks, conditional_ranks, fit_tau, forecast, top_shares, true_ranks
from .distill import first_loop
from .report import EngineReport, engine_report
from .shards import Answers
from .teacher import Teacher, head_features

if TYPE_CHECKING:
    from .train_heads import TrainConfig

TAU_ROWS = 8192  # rows that a calibration of tau looks at
KEPT = 2**28  # bytes of the held-out answers' hidden states


@dataclass(frozen=True)
class Measured:
    """What trained heads do on held-out answers: shares per depth, acceptance by nodes as forecast with static trees
    (greedy, and at T = 0.7 where there are such answers) and as the serving engine has it, and the calibration that was
    saved with them. path: of the heads' file."""

    path: str
    loss: float
    top1: list[float]
    top5: list[float]
    greedy: dict[int, float]
    sampled: dict[int, float]
    engine: EngineReport
    ranks: list[list[float]]
    tau: list[float]
    noise_tau: list[float] | None
    provenance: dict[str, Any]

    @property
    def lines(self) -> list[str]:
        """For a person."""
        told = [("the engine, greedy", self.engine.greedy), (f"the engine at T = {SAMPLED}", self.engine.sampled)]
        told += [("forecast with static trees, greedy", self.greedy), (f"the same at T = {SAMPLED}", self.sampled)]
        rows = [(name, "  ".join(f"{nodes}: {x:.2f}" for nodes, x in values.items())) for name, values in told]
        lines = [f"  {name:36}{row}" for name, row in rows if row]
        return [f"The heads are in {self.path}.", "Tokens per step by tree nodes, on held-out prompts:", *lines]


def sampled_ones(answers: Answers, numbers: np.ndarray) -> tuple[np.ndarray, bool]:
    """Those of the numbers whose answers were sampled near T = 0.7, and True; where there are none, those sampled at
    whatever T there is, and False."""
    temperature = answers.temperature[numbers]
    near = np.abs(temperature - SAMPLED) < 1e-4
    return (numbers[near], True) if near.any() else (numbers[temperature > 0], False)


def choose_held_out(answers: Answers, numbers: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(held out, training) sequence numbers: at most a tenth is held out, half of it greedy answers and half answers
    near T = 0.7 (or at what T there is), in a fixed random order, greedy first. Greedy ones alone say what greedy
    decoding accepts."""
    order = np.random.default_rng(2024).permutation(numbers)
    count = max(1, min(count, len(order) // 10))
    greedy = order[answers.temperature[order] == 0]
    chosen = [greedy[: max(1, count // 2)], sampled_ones(answers, order)[0][: count // 2]]
    if not len(greedy):  # nothing greedy at hand: any answers, then
        chosen = [order[:count]]
    held = np.concatenate(chosen)
    return held, np.setdiff1d(numbers, held)


@dataclass(frozen=True)
class Subject:
    """What is measured: heads on the base that they hang on, by its answers. size: tokens of a pass · autocast: the
    context of one; loaded heads need none, as they are in the base's dtype · kept: by an answer's number what heads
    read at its rows, as far as KEPT bytes go: a training measures the same answers again and again."""

    heads: Heads
    teacher: Teacher
    answers: Answers
    size: int
    autocast: Callable[[], Any] = nullcontext
    kept: dict[int, Tensor] = field(default_factory=dict)

    def hidden(self, batch: Batch, lengths: np.ndarray) -> Tensor:
        """What the heads read at a batch's rows, (R, M·H)."""
        numbers, kept = batch.sequence.tolist(), self.kept
        if all(number in kept for number in numbers):
            return torch.cat([kept[number] for number in numbers])
        rows = self.teacher.hidden(batch.ids)[0][batch.at]
        if sum(each.nbytes for each in kept.values()) + rows.nbytes <= KEPT:
            kept.update(zip(numbers, rows.split(lengths.tolist()), strict=True))
        return rows


class Rows(NamedTuple):
    """Some answers as the heads see them. lengths: rows of each answer · features (R, D, H) · targets (R, D) base ids ·
    left (R): depths with a target · noise: of sampled answers"""

    chosen: np.ndarray
    lengths: np.ndarray
    features: Tensor
    targets: Tensor
    left: Tensor
    noise: Noise | None


def passes(subject: Subject, numbers: np.ndarray, *, sampled: bool) -> Iterator[Rows]:
    """These answers in order, a batch at a time. sampled: all of them are, each with its own seed and temperature."""
    heads, teacher, answers = subject.heads, subject.teacher, subject.answers
    for chosen in in_order(answers, numbers, subject.size):
        batch, lengths = make_batch(answers, chosen).to(teacher.device), answers.answer_len[chosen] - 1
        with torch.no_grad(), subject.autocast():
            features = head_features(heads, subject.hidden(batch, lengths), batch)
        noise = None
        if sampled:
            first = answers.prompt_len[chosen] + 1  # position of the first drafted token, after the pending one
            facts = (answers.temperature[chosen], answers.seed[chosen], first)
            warmth, seed, start = (torch.from_numpy(np.repeat(x, lengths)).to(teacher.device) for x in facts)
            noise = Noise(warmth, seed, start + batch.place)
        yield Rows(chosen, lengths, features, batch.tokens(heads.max_depth, first=2), batch.left, noise)


def measure(subject: Subject, numbers: np.ndarray, *, sampled: bool = False) -> Ranks:
    """Ranks of the true tokens in these answers, in order of the numbers. sampled: all of these answers were, and are
    ranked with each one's own noise."""
    answers, token_map, vocab = subject.answers, subject.heads.token_map, subject.teacher.vocab_size
    output, parts = subject.teacher.output(token_map), []
    for rows in passes(subject, numbers, sampled=sampled):
        ranks = true_ranks(rows.features, rows.targets, rows.left, output, token_map, vocab, rows.noise)
        said = [answers.sequence(n)[int(answers.prompt_len[n]) :].tolist() for n in rows.chosen]
        looped = np.array([first_loop(answer) is not None for answer in said])
        parts.append(Ranks(ranks.cpu().numpy(), rows.lengths, looped))
    joined = parts[0]
    for part in parts[1:]:
        joined = joined.joined(part)
    return joined


def calibrate_tau(subject: Subject, numbers: np.ndarray, *, sampled: bool) -> list[float]:
    """Per depth, tau from a part of these greedy answers, or noise_tau from sampled ones; rows whose earlier tokens
    were no candidates are left out."""
    parts: list[Rows] = []
    for rows in passes(subject, numbers, sampled=sampled):
        parts.append(rows)
        if sum(len(part.left) for part in parts) >= TAU_ROWS:
            break
    features, targets = torch.cat([part.features for part in parts]), torch.cat([part.targets for part in parts])
    left = torch.cat([part.left for part in parts])
    drawn = [part.noise for part in parts if part.noise is not None]
    noise = Noise(*(torch.cat(each) for each in zip(*drawn, strict=True))) if drawn else None
    token_map, vocab = subject.heads.token_map, subject.teacher.vocab_size
    output = subject.teacher.output(token_map)
    rank = true_ranks(features, targets, left, output, token_map, vocab, noise)
    alive = torch.ones(len(left), dtype=torch.bool, device=left.device)
    taus = []
    for depth in range(subject.heads.max_depth):
        alive = alive & (rank[:, depth] != PAST_END)
        mine = None if noise is None else noise.of(alive)
        tau = fit_tau(features[alive, depth], targets[alive, depth], output, token_map, vocab, mine, depth)
        taus.append(round(tau, 4))
        alive = alive & (rank[:, depth] < NUM_RANKS)
    return taus


def finish(
    subject: Subject,
    held_out: np.ndarray,
    config: TrainConfig,
    facts: dict[str, Any],
    *,
    trial: Path,
    serving: Any = None,
    eos_ids: Collection[int] = (),
    max_positions: int | None = None,
    seconds: float = 20.0,
    note: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Measure, calibrate, save into config.out with provenance.

    seconds: for the engine's answers · trial: a folder where the engine finds the heads before config.out exists, so
    that after an interruption here the same command still goes on · serving: the base as that engine has it, None: as
    the teacher
    """
    heads, teacher, answers = subject.heads, subject.teacher, subject.answers
    cold = held_out[answers.temperature[held_out] == 0]
    cold = cold if len(cold) else held_out
    warm, near = sampled_ones(answers, held_out)
    greedy = measure(subject, cold)
    table = conditional_ranks(greedy)
    tau = calibrate_tau(subject, cold, sampled=False)
    noise_tau = calibrate_tau(subject, warm, sampled=True) if len(warm) else None
    sampled = forecast(measure(subject, warm, sampled=True)) if near else {}
    ahead = forecast(greedy, table)
    provenance = {
        **facts,
        "static_trees_greedy": {str(n): round(x, 3) for n, x in ahead.items()},
        f"static_trees_T{SAMPLED}": {str(n): round(x, 3) for n, x in sampled.items()},
        "machine": machine(teacher.device),
        "software": f"torch {torch.__version__}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "licence": config.licence,
    }
    info = describe(heads, teacher, table, tau, provenance, noise_tau)
    save_heads(heads, info, trial, overwrite=True)
    engine, said = engine_report(
        teacher.model if serving is None else serving, trial, answers, held_out, eos_ids=eos_ids,
        max_positions=max_positions, seconds=seconds,
    )  # fmt: skip
    note(said)
    provenance |= engine.facts()
    path = save_heads(heads, replace(info, provenance=provenance), config.out)
    shares = top_shares(greedy, 1), top_shares(greedy, 5)
    return Measured(str(path), float(facts["loss"]), *shares, ahead, sampled, engine, table, tau, noise_tau, provenance)


def describe(
    heads: Heads,
    teacher: Teacher,
    table: list[list[float]] | None,
    tau: list[float] | None,
    provenance: dict[str, Any],
    noise_tau: list[float] | None = None,
) -> HeadsInfo:
    mapped: Tensor | None = heads.token_map
    return HeadsInfo(
        family=heads.family,
        num_heads=heads.max_depth,
        num_layers=len(heads.cell) if isinstance(heads, SequentialHeads) else heads.weight.shape[0],
        hidden_size=heads.hidden_size,
        vocab_size=teacher.vocab_size,
        tied=True,
        bias=True,
        token_map=0 if mapped is None else len(mapped),
        num_parameters=num_parameters(heads),
        hidden_inputs=teacher.hidden_inputs,
        ranks=table and [[round(share, 6) for share in row] for row in table],
        tau=tau,
        noise_tau=noise_tau,
        provenance=provenance,
    )


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"

"""After the last step: measure the heads on held-out answers, calibrate, report through the engine, save."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..model.drafting.files import save_heads
from ..model.drafting.heads import Heads, HeadsInfo, SequentialHeads, num_parameters
from ..model.drafting.tree import NUM_RANKS
from .batches import Batch, in_order, make_batch
from .calibrate import PAST_END, SAMPLED, Noise, Ranks, conditional_ranks, fit_tau, forecast, top_shares, true_ranks
from .report import EngineReport, engine_report
from .shards import Answers
from .teacher import Teacher, head_features
from .train_config import TrainConfig

TAU_ROWS = 8192  # rows for a calibration of tau
KEPT = 2**28  # bytes for the held-out answers' hidden states


@dataclass(frozen=True)
class Measured:
    """Trained heads on held-out answers: shares per depth, acceptance by nodes as forecast with static trees (greedy,
    and at T = 0.7 if there are such answers) and as measured in the serving engine, and the calibration that is saved
    with the heads. path: of the heads' file."""

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
        shown = [("the engine, greedy", self.engine.greedy), (f"the engine at T = {SAMPLED}", self.engine.sampled)]
        shown += [("forecast with static trees, greedy", self.greedy), (f"the same at T = {SAMPLED}", self.sampled)]
        rows = [(name, "  ".join(f"{nodes}: {x:.2f}" for nodes, x in values.items())) for name, values in shown]
        lines = [f"  {name:36}{row}" for name, row in rows if row]
        return [f"The heads are in {self.path}.", "Tokens per step by tree nodes, on held-out prompts:", *lines]


def sampled_ones(answers: Answers, numbers: np.ndarray) -> tuple[np.ndarray, bool]:
    """The numbers of the answers at T = 0.7, and True. If there are none: of the answers at any T > 0, and False."""
    temperature = answers.temperature[numbers]
    near = np.abs(temperature - SAMPLED) < 1e-4
    return (numbers[near], True) if near.any() else (numbers[temperature > 0], False)


def choose_held_out(answers: Answers, numbers: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(held out, training) sequence numbers. At most a tenth is held out: half greedy answers, half answers at T = 0.7
    (or at any T > 0), in a fixed random order, greedy first. Only greedy answers show what greedy decoding accepts."""
    order = np.random.default_rng(2024).permutation(numbers)
    count = max(1, min(count, len(order) // 10))
    greedy = order[answers.temperature[order] == 0]
    chosen = [greedy[: max(1, count // 2)], sampled_ones(answers, order)[0][: count // 2]]
    if not len(greedy):  # no greedy answers: take any
        chosen = [order[:count]]
    held = np.concatenate(chosen)
    return held, np.setdiff1d(numbers, held)


@dataclass(frozen=True)
class Subject:
    """What is measured: heads on their base, by the base's answers. size: tokens of a pass · autocast: the context of a
    pass; loaded heads need none, they are in the base's dtype · kept: an answer's number → what heads read at its rows,
    up to KEPT bytes: a training measures the same answers many times."""

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
    left (R): depths with a target · noise: of sampled answers, else None"""

    chosen: np.ndarray
    lengths: np.ndarray
    features: Tensor
    targets: Tensor
    left: Tensor
    noise: Noise | None


def passes(subject: Subject, numbers: np.ndarray, *, sampled: bool) -> Iterator[Rows]:
    """These answers in order, batch by batch. sampled: all are sampled, each with its own seed and temperature."""
    heads, teacher, answers = subject.heads, subject.teacher, subject.answers
    for chosen in in_order(answers, numbers, subject.size):
        batch, lengths = make_batch(answers, chosen).to(teacher.device), answers.answer_len[chosen] - 1
        with torch.no_grad(), subject.autocast():
            features = head_features(heads, subject.hidden(batch, lengths), batch)
        noise = None
        if sampled:
            first = answers.prompt_len[chosen] + 1  # position of the first drafted token, after the pending one
            given = (answers.temperature[chosen], answers.seed[chosen], first)
            heat, seed, start = (torch.from_numpy(np.repeat(x, lengths)).to(teacher.device) for x in given)
            noise = Noise(heat, seed, start + batch.offset)
        yield Rows(chosen, lengths, features, batch.tokens(heads.max_depth, first=2), batch.left, noise)


def measure(subject: Subject, numbers: np.ndarray, *, sampled: bool = False) -> Ranks:
    """Ranks of the true tokens in these answers, in order of the numbers. sampled: all these answers are sampled, and
    each is ranked with its own noise."""
    token_map, vocab = subject.heads.token_map, subject.teacher.vocab_size
    output, ranks, lengths = subject.teacher.output(token_map), [], []
    for rows in passes(subject, numbers, sampled=sampled):
        found = true_ranks(rows.features, rows.targets, rows.left, output, token_map, vocab, rows.noise)
        ranks.append(found.cpu().numpy())
        lengths.append(rows.lengths)
    return Ranks(np.concatenate(ranks), np.concatenate(lengths))


def calibrate_tau(subject: Subject, numbers: np.ndarray, *, sampled: bool) -> list[float]:
    """Per depth, tau from the first of these greedy answers, or noise_tau from sampled ones. A row is left out once a
    token before the depth was no candidate."""
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
    known: dict[str, Any],
    *,
    trial: Path,
    serving: Any = None,
    eos_ids: Collection[int] = (),
    max_positions: int | None = None,
    seconds: float = 20.0,
    note: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Measure, calibrate, save into config.out with provenance.

    known: provenance that the training knows, with its loss · seconds: for the engine's answers · trial: a folder
    where the engine finds the heads before config.out exists, so that the same command can go on after an interruption
    here · serving: the base that the engine runs, None: the teacher's
    """
    heads, teacher, answers = subject.heads, subject.teacher, subject.answers
    greedy_ones = held_out[answers.temperature[held_out] == 0]
    greedy_ones = greedy_ones if len(greedy_ones) else held_out
    drawn, near = sampled_ones(answers, held_out)
    greedy = measure(subject, greedy_ones)
    table = conditional_ranks(greedy)
    tau = calibrate_tau(subject, greedy_ones, sampled=False)
    noise_tau = calibrate_tau(subject, drawn, sampled=True) if len(drawn) else None
    sampled = forecast(measure(subject, drawn, sampled=True)) if near else {}
    ahead = forecast(greedy, table)
    provenance = {
        **known,
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
    provenance |= engine.provenance()
    path = save_heads(heads, replace(info, provenance=provenance), config.out)
    shares = top_shares(greedy, 1), top_shares(greedy, 5)
    return Measured(str(path), float(known["loss"]), *shares, ahead, sampled, engine, table, tau, noise_tau, provenance)


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

"""The end of a training: measure the heads on held-out answers, calibrate, report through the engine, save."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..model.checkpoints import save_heads
from ..model.heads import Heads, HeadsInfo, SequentialHeads, num_parameters
from ..model.tree import NUM_RANKS
from .batches import in_order, make_batch
from .calibrate import PAST_END, SAMPLED, Noise, Ranks, conditional_ranks, fit_tau, forecast, top_shares, true_ranks
from .distill import first_loop
from .report import EngineReport, engine_report
from .shards import Answers
from .teacher import Teacher, head_features

if TYPE_CHECKING:
    from .train_heads import TrainConfig

TAU_ROWS = 8192  # rows that a calibration of tau looks at


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


def choose_held_out(answers: Answers, numbers: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(held out, training) sequence numbers: at most a tenth is held out, half of it greedy answers and half answers
    near T = 0.7 (or at what T there is), in a fixed random order, greedy first. Greedy ones alone say what greedy
    decoding accepts."""
    order = np.random.default_rng(2024).permutation(numbers)
    count = max(1, min(count, len(order) // 10))
    greedy = order[answers.temperature[order] == 0]
    warm = order[np.abs(answers.temperature[order] - SAMPLED) < 1e-4]
    warm = warm if len(warm) else order[answers.temperature[order] > 0]
    chosen = [greedy[: max(1, count // 2)], warm[: count // 2]]
    if not len(greedy):  # nothing greedy at hand: any answers, then
        chosen = [order[:count]]
    held = np.concatenate(chosen)
    return held, np.setdiff1d(numbers, held)


class Rows(NamedTuple):
    """Some answers as the heads see them. lengths: rows of each answer · features (R, D, H) · targets (R, D) base ids ·
    left (R): depths with a target · noise: of sampled answers"""

    chosen: np.ndarray
    lengths: np.ndarray
    features: Tensor
    targets: Tensor
    left: Tensor
    noise: Noise | None


def passes(
    heads: Heads,
    teacher: Teacher,
    answers: Answers,
    numbers: np.ndarray,
    batch_tokens: int,
    autocast: Callable[[], Any],
    sampled: bool,
) -> Iterator[Rows]:
    """These answers in order, a batch at a time. sampled: all of them are, each with its own seed and temperature."""
    for chosen in in_order(answers, numbers, batch_tokens):
        batch = make_batch(answers, chosen).to(teacher.device)
        with torch.no_grad(), autocast():
            features = head_features(heads, teacher.hidden(batch.ids)[0][batch.at], batch)
        lengths = answers.answer_len[chosen] - 1
        noise = None
        if sampled:
            first = answers.prompt_len[chosen] + 1  # position of the first drafted token, after the pending one
            facts = (answers.temperature[chosen], answers.seed[chosen], first)
            warmth, seed, start = (torch.from_numpy(np.repeat(x, lengths)).to(teacher.device) for x in facts)
            noise = Noise(warmth, seed, start + batch.place)
        yield Rows(chosen, lengths, features, batch.tokens(heads.max_depth, first=2), batch.left, noise)


def measure(
    heads: Heads,
    teacher: Teacher,
    answers: Answers,
    numbers: np.ndarray,
    batch_tokens: int,
    autocast: Callable[[], Any],
    temperature: float = 0.0,
) -> Ranks:
    """Ranks of the true tokens in these answers, in order of the numbers. temperature > 0: of answers that were sampled
    at this temperature, ranked with each one's own noise."""
    output, token_map = teacher.output(heads.token_map), heads.token_map
    parts = []
    for rows in passes(heads, teacher, answers, numbers, batch_tokens, autocast, temperature > 0):
        ranks = true_ranks(rows.features, rows.targets, rows.left, output, token_map, teacher.vocab_size, rows.noise)
        said = [answers.sequence(n)[int(answers.prompt_len[n]) :].tolist() for n in rows.chosen]
        looped = np.array([first_loop(answer) is not None for answer in said])
        parts.append(Ranks(ranks.cpu().numpy(), rows.lengths, looped))
    joined = parts[0]
    for part in parts[1:]:
        joined = joined.joined(part)
    return joined


def calibrate_tau(
    heads: Heads,
    teacher: Teacher,
    answers: Answers,
    numbers: np.ndarray,
    batch_tokens: int,
    autocast: Callable[[], Any],
    sampled: bool,
) -> list[float]:
    """Per depth, tau from a part of these greedy answers, or noise_tau from sampled ones; rows whose earlier tokens
    were no candidates are left out."""
    parts: list[Rows] = []
    for rows in passes(heads, teacher, answers, numbers, batch_tokens, autocast, sampled):
        parts.append(rows)
        if sum(len(part.left) for part in parts) >= TAU_ROWS:
            break
    features, targets = torch.cat([part.features for part in parts]), torch.cat([part.targets for part in parts])
    left = torch.cat([part.left for part in parts])
    drawn = [part.noise for part in parts if part.noise is not None]
    noise = Noise(*(torch.cat(each) for each in zip(*drawn, strict=True))) if drawn else None
    output, token_map, vocab = teacher.output(heads.token_map), heads.token_map, teacher.vocab_size
    rank = true_ranks(features, targets, left, output, token_map, vocab, noise)
    alive = torch.ones(len(left), dtype=torch.bool, device=left.device)
    taus = []
    for depth in range(heads.max_depth):
        alive = alive & (rank[:, depth] != PAST_END)
        mine = None if noise is None else noise.of(alive)
        tau = fit_tau(features[alive, depth], targets[alive, depth], output, token_map, vocab, mine, depth)
        taus.append(round(tau, 4))
        alive = alive & (rank[:, depth] < NUM_RANKS)
    return taus


def finish(
    heads: Heads,
    teacher: Teacher,
    answers: Answers,
    held_out: np.ndarray,
    config: TrainConfig,
    facts: dict[str, Any],
    *,
    size: int,
    autocast: Callable[[], Any],
    trial: Path,
    eos_ids: Collection[int] = (),
    max_positions: int | None = None,
    seconds: float = 20.0,
    note: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Measure, calibrate, save into config.out with provenance.

    size: tokens of a measuring pass · seconds: for the engine's answers · trial: a folder where the engine finds the
    heads before config.out exists, so that after an interruption here the same command still goes on
    """
    cold = held_out[answers.temperature[held_out] == 0]
    cold = cold if len(cold) else held_out
    warm = held_out[np.abs(answers.temperature[held_out] - SAMPLED) < 1e-4]
    greedy = measure(heads, teacher, answers, cold, size, autocast)
    table = conditional_ranks(greedy)
    tau = calibrate_tau(heads, teacher, answers, cold, size, autocast, sampled=False)
    hot = warm if len(warm) else held_out[answers.temperature[held_out] > 0]
    noise_tau = calibrate_tau(heads, teacher, answers, hot, size, autocast, sampled=True) if len(hot) else None
    sampled = forecast(measure(heads, teacher, answers, warm, size, autocast, SAMPLED)) if len(warm) else {}
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
        teacher.model, trial, answers, held_out, eos_ids=eos_ids, max_positions=max_positions, seconds=seconds
    )
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

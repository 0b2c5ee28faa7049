"""The end of a training: measure the heads on held-out answers, calibrate, save."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..model.checkpoints import save_heads
from ..model.heads import Heads, HeadsInfo, SequentialHeads, num_parameters
from .batches import in_order, make_batch
from .calibrate import PAST_END, Ranks, conditional_ranks, fit_tau, forecast, top_shares, true_ranks
from .distill import first_loop
from .shards import Answers
from .teacher import Teacher, head_features

if TYPE_CHECKING:
    from .train_heads import TrainConfig

SAMPLED = 0.7  # the temperature whose acceptance is forecast beside the greedy one


@dataclass(frozen=True)
class Measured:
    """What trained heads do on held-out answers: shares per depth, acceptance by nodes (greedy, and at T = 0.7 where
    there are such answers), and the calibration that was saved with them."""

    path: str
    loss: float
    top1: list[float]
    top5: list[float]
    greedy: dict[int, float]
    sampled: dict[int, float]
    ranks: list[list[float]]
    tau: list[float]
    provenance: dict[str, Any]


def choose_held_out(answers: Answers, numbers: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(held out, training) sequence numbers: at most a tenth is held out, half of it greedy answers and half answers
    near T = 0.7, in a fixed random order, greedy first. Greedy ones alone say what greedy decoding accepts."""
    order = np.random.default_rng(2024).permutation(numbers)
    count = max(1, min(count, len(order) // 10))
    greedy = order[answers.temperature[order] == 0]
    warm = order[np.abs(answers.temperature[order] - SAMPLED) < 1e-4]
    chosen = [greedy[: max(1, count // 2)], warm[: count // 2]]
    if not len(greedy):  # nothing greedy at hand: any answers, then
        chosen = [order[:count]]
    held = np.concatenate(chosen)
    return held, np.setdiff1d(numbers, held)


@torch.no_grad()
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
    for chosen in in_order(answers, numbers, batch_tokens):
        batch = make_batch(answers, chosen).to(teacher.device)
        inputs, _ = teacher.hidden(batch.ids)
        with autocast():
            features = head_features(heads, inputs[batch.at], batch)
        lengths = answers.answer_len[chosen] - 1
        each = torch.from_numpy(np.repeat(np.arange(len(chosen)), lengths)).to(teacher.device)
        ranks = true_ranks(
            features, batch.tokens(heads.max_depth, first=2), batch.left, output, token_map, teacher.vocab_size,
            temperature=temperature,
            seed=torch.from_numpy(answers.seed[chosen]).to(teacher.device)[each],
            position=batch.at % batch.ids.shape[1] + 2,
        )  # fmt: skip
        looped = np.array(
            [first_loop(answers.sequence(n)[int(answers.prompt_len[n]) :].tolist()) is not None for n in chosen]
        )
        parts.append(Ranks(ranks.cpu().numpy(), lengths, looped))
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
) -> list[float]:
    """Per depth, from a part of these answers; rows whose earlier tokens were no candidates are left out."""
    features, targets, ranks, rows = [], [], [], 0
    output, token_map, vocab = teacher.output(heads.token_map), heads.token_map, teacher.vocab_size
    for chosen in in_order(answers, numbers, batch_tokens):
        batch = make_batch(answers, chosen).to(teacher.device)
        with torch.no_grad(), autocast():
            found = head_features(heads, teacher.hidden(batch.ids)[0][batch.at], batch)
        true = batch.tokens(heads.max_depth, first=2)
        ranks.append(true_ranks(found, true, batch.left, output, token_map, vocab))
        features.append(found)
        targets.append(true)
        rows += len(true)
        if rows >= 8192:
            break
    joined, true, rank = torch.cat(features), torch.cat(targets), torch.cat(ranks)
    alive = torch.ones(len(true), dtype=torch.bool, device=teacher.device)
    taus = []
    for depth in range(heads.max_depth):
        alive = alive & (rank[:, depth] != PAST_END)
        tau = fit_tau(joined[alive, depth], true[alive, depth], output, token_map, vocab)
        taus.append(round(tau, 4))
        alive = alive & (rank[:, depth] < 10)
    return taus


def finish(
    heads: Heads,
    teacher: Teacher,
    answers: Answers,
    held_out: np.ndarray,
    config: TrainConfig,
    facts: dict[str, Any],
    *,
    autocast: Callable[[], Any],
) -> Measured:
    """Measure, calibrate, save into config.out with provenance."""
    size = int(facts["batch_tokens"])
    cold = held_out[answers.temperature[held_out] == 0]
    cold = cold if len(cold) else held_out
    warm = held_out[np.abs(answers.temperature[held_out] - SAMPLED) < 1e-4]
    greedy = measure(heads, teacher, answers, cold, size, autocast)
    table = conditional_ranks(greedy)
    tau = calibrate_tau(heads, teacher, answers, cold, size, autocast)
    sampled = forecast(measure(heads, teacher, answers, warm, size, autocast, SAMPLED)) if len(warm) else {}
    ahead = forecast(greedy, table)
    provenance = {
        **facts,
        "forecast_greedy": {str(n): round(x, 3) for n, x in ahead.items()},
        f"forecast_T{SAMPLED}": {str(n): round(x, 3) for n, x in sampled.items()},
        "machine": machine(teacher.device),
        "software": f"torch {torch.__version__}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "licence": config.licence,
    }
    info = describe(heads, teacher, table, tau, provenance)
    path = save_heads(heads, info, config.out)
    shares = top_shares(greedy, 1), top_shares(greedy, 5)
    return Measured(str(path), float(facts["loss"]), *shares, ahead, sampled, table, tau, provenance)


def describe(
    heads: Heads,
    teacher: Teacher,
    table: list[list[float]] | None,
    tau: list[float] | None,
    provenance: dict[str, Any],
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
        provenance=provenance,
    )


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"

"""Drafters that are always right, always wrong or random, an engine around a tiny model that a test steps by hand, and
the loss of training as it is defined."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from medusa_serve.config import EngineConfig
from medusa_serve.engine.batch_manager import BatchManager
from medusa_serve.model.build import build_runner
from medusa_serve.model.drafting.draft import StaticDrafter
from medusa_serve.model.drafting.tree import most_probable
from medusa_serve.types import Completion, SamplingParams
from tests.fakes import Collector, FakeCodec

NUM_HEADS, NUM_RANKS = 4, 10

# P(rank r of head d is right | the path so far is), for trees of a usual shape: a smoothed version of the accuracies
# that FasterDecoding/Medusa published for Vicuna-7B (assets/medusa_acc.csv).
DEFAULT_RANKS = tuple(
    tuple(first * share for share in (1.0, 0.2, 0.1, 0.06, 0.04, 0.03, 0.02, 0.015, 0.01, 0.01))
    for first in (0.56, 0.45, 0.40, 0.36, 0.33)
)


class Oracle(StaticDrafter):
    """Knows what follows each prompt (`truth`: prompt → continuation) and drafts that, or never that, or noise.

    `tables` must be set to the runner's: a sequence is recognised by the prompt in its slot.
    """

    def __init__(self, kind: str, vocab: int, truth: dict[tuple[int, ...], list[int]] | None = None) -> None:
        super().__init__(NUM_HEADS, NUM_RANKS, most_probable(DEFAULT_RANKS[:NUM_HEADS], 64))
        self.kind, self.vocab, self.truth = kind, vocab, truth or {}
        self.tables: Any = None
        self._generator = torch.Generator().manual_seed(0)

    def candidates(self, slots, hidden, pending, length, sampling):
        if self.kind == "random":
            shape = (len(slots), self.num_heads, self.num_ranks)
            return torch.randint(self.vocab, shape, generator=self._generator)
        return torch.stack([self._row(int(slot), int(at)) for slot, at in zip(slots, length, strict=True)])

    def _row(self, slot: int, length: int) -> torch.Tensor:
        history = self.tables.history[slot].tolist()
        prompt = next(prompt for prompt in self.truth if tuple(history[: len(prompt)]) == prompt)
        rest = self.truth[prompt][length + 1 - len(prompt) :]
        rows = []
        for depth in range(self.num_heads):
            right = rest[depth] if depth < len(rest) else 0
            ranks = [(right + rank + (self.kind == "wrong")) % self.vocab for rank in range(self.num_ranks)]
            rows.append(ranks)
        return torch.tensor(rows)


@contextmanager
def engine(
    model: Any, config: EngineConfig, drafter: Oracle | None = None, eos: tuple[int, ...] = ()
) -> Iterator[BatchManager]:
    """A batch manager without a thread over `model`; the model is given back unplugged."""
    built = build_runner(
        model, config, eos_ids=list(eos), max_positions=model.config.max_position_embeddings, drafter=drafter
    )
    assert built.tree_error is not None, built.notes
    if drafter is not None:
        drafter.tables = built.runner.tables
    manager = BatchManager(built.runner, IdsCodec(), config, model_name="tiny")
    manager.runner = built.runner
    try:
        yield manager
        manager.step()  # an idle turn audits the slots
    finally:
        manager.close()


class IdsCodec(FakeCodec):
    """Ids are tested, not text: every id prints as nothing."""

    def decode(self, ids):
        return ""


def run(manager: BatchManager, jobs: list[tuple[list[int], SamplingParams]], join_every: int = 0) -> list[Completion]:
    """All jobs to their end, one more joining every `join_every` steps (0: all at once). Raises what a sequence
    raised."""
    sink, ids, waiting = Collector(), [], list(jobs)
    for step in range(100_000):
        while waiting and (join_every == 0 or step >= join_every * (len(jobs) - len(waiting))):
            prompt, params = waiting.pop(0)
            ids.append(manager.submit(prompt, params, sink))
        manager.step()
        if not waiting and not manager._open:
            break
    lasts = [sink.last(id) for id in ids]
    for last in lasts:
        assert last is not None
        if last.error is not None:
            raise last.error
    return [last.completion for last in lasts]


def plain_loss(
    features: Tensor, teacher: Tensor, place: Tensor, output: Any, weights: Tensor, temperature: float = 1.0
) -> Tensor:
    """training.loss.soft_loss as it is defined: every logit at once, gradients by autograd."""
    rows, depths, _ = features.shape
    log_q = output.log_probs(features)  # (R, D, V')
    p = output.log_probs(teacher, temperature).exp()
    total = features.new_zeros(())
    for row in range(rows):
        for depth in range(depths):
            if row + depth < rows and int(place[row + depth]) >= depth:
                total = total - weights[depth] * (p[row + depth] * log_q[row, depth]).sum()
    return total / rows

"""Before a training: how many answers this machine makes in the time, and what heads learn from as many."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ..config import EngineConfig
from ..errors import LoadError
from ..model.loading.gpu_facts import release
from ..model.loading.load import load_to_answer
from .distill import DistillConfig
from .pipeline import DISTILL_SHARE, make_answers
from .prompts import read_prompts, split

# (tokens of answers, tokens per step with 8 nodes), sequential heads of the default model on held-out prompts, greedy:
# a minute on a CPU, one prompt · 48 s on one H200, forecast with a static tree · the heads that ship, in the serving
# engine. From one point to the next it grows with the logarithm
LEARNT = ((1, 1.0), (1_090, 1.36), (241_000, 1.85), (15_012_194, 2.49))


@dataclass(frozen=True)
class Forecast:
    """rate: tokens of answers a second on this machine · minutes: for all · share: of the minutes, for answers"""

    rate: float
    minutes: float
    share: float

    @property
    def tokens(self) -> float:
        """Tokens of answers that are made in their share of the time."""
        return self.rate * 60 * self.minutes * self.share

    @property
    def acceptance(self) -> float:
        """Tokens per step with 8 nodes, about."""
        return learnt_from(self.tokens)

    def __str__(self) -> str:
        most = LEARNT[-1]
        minutes = most[0] / self.rate / 60 / self.share
        return (
            f"{self.minutes:g} minutes: {self.share:.0%} of them for some {self.tokens:,.0f} tokens of answers "
            f"({self.rate:,.0f} a second here), the rest for training.\n"
            f"Heads of the default model made {self.acceptance:.1f} tokens per step of as many (8 nodes; 1 is plain "
            f"decoding), and {most[1]:.1f} of {most[0]:,}, which would take {minutes:,.0f} minutes here.\n"
            "Another model may learn faster or slower; the training itself says how it goes."
        )


def learnt_from(tokens: float) -> float:
    """Tokens per step with 8 nodes, from this many tokens of answers."""
    for (few, low), (many, high) in zip(LEARNT, LEARNT[1:], strict=False):
        if tokens <= many:
            return low + (high - low) * math.log(max(tokens, few) / few) / math.log(many / few)
    return LEARNT[-1][1]


def forecast(
    config: EngineConfig,
    prompts: str | Path,
    *,
    minutes: float,
    answers: str | Path,
    seconds: float,
    answer_tokens: int,
) -> Forecast:
    """Make answers for some seconds; the training goes on with their folder. Raises LoadError."""
    training, _ = split(read_prompts(prompts))
    loaded = load_to_answer(config)
    share = DISTILL_SHARE[loaded.device.type]
    try:
        made = make_answers(loaded, training, answers, DistillConfig(seconds=seconds, max_tokens=answer_tokens))
    finally:
        del loaded
        release()
    if not made.tokens:
        raise LoadError("No answer was finished in the time of the forecast; give it more, or shorter answers.")
    return Forecast(made.tokens / made.seconds, minutes, share)

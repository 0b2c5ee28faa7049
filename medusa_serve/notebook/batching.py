"""One prompt alone, then many at once: what sharing passes gives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..types import Completion

if TYPE_CHECKING:
    from .server import Server


@dataclass(frozen=True)
class Batching:
    """Tokens per second of all answers together, prefill included. slots: how many decode at a time."""

    alone: float
    together: float
    slots: int
    answers: list[Completion]

    @property
    def gain(self) -> float:
        return self.together / self.alone

    def __str__(self) -> str:
        return (
            f"1 prompt           {self.alone:8.1f} tokens/s\n"
            f"{len(self.answers)} prompts at once {self.together:8.1f} tokens/s, {self.gain:.1f}× "
            f"({self.slots} decode at a time)"
        )


async def one_and_many(server: Server, prompts: Sequence[str], max_tokens: int) -> Batching:
    """The first prompt alone, then all of them, awaited together."""
    began = time.monotonic()
    one = await server.generate_async(prompts[0], max_tokens=max_tokens)
    alone = one.completion_tokens / (time.monotonic() - began)
    began = time.monotonic()
    answers = await asyncio.gather(*(server.generate_async(prompt, max_tokens=max_tokens) for prompt in prompts))
    together = sum(answer.completion_tokens for answer in answers) / (time.monotonic() - began)
    return Batching(alone, together, server.describe()["slots"], list(answers))

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
    """The first prompt alone, all of them, awaited together, and the first alone again: a machine that others use too
    is not equally fast at both ends."""

    async def timed(some: Sequence[str]) -> tuple[list[Completion], float]:
        began = time.monotonic()
        answers = await asyncio.gather(*(server.generate_async(prompt, max_tokens=max_tokens) for prompt in some))
        return list(answers), time.monotonic() - began

    before, many, after = [await timed(some) for some in (prompts[:1], prompts, prompts[:1])]
    alone, together = (
        sum(answer.completion_tokens for answers, _ in runs for answer in answers) / sum(seconds for _, seconds in runs)
        for runs in ((before, after), (many,))
    )
    return Batching(alone, together, server.describe()["slots"], many[0])

"""One prompt alone, then many at once: how much faster a shared pass is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from ..types import Completion


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


async def one_and_many(
    generate: Callable[[str], Awaitable[Completion]], prompts: Sequence[str], slots: int
) -> Batching:
    """The first prompt alone, all of them together, and the first alone again, as a shared machine may become faster or
    slower meanwhile."""

    async def timed(some: Sequence[str]) -> tuple[list[Completion], float]:
        began = time.monotonic()
        answers = await asyncio.gather(*map(generate, some))
        return list(answers), time.monotonic() - began

    before, many, after = [await timed(some) for some in (prompts[:1], prompts, prompts[:1])]
    alone, together = (
        sum(answer.completion_tokens for answers, _ in runs for answer in answers) / sum(seconds for _, seconds in runs)
        for runs in ((before, after), (many,))
    )
    return Batching(alone, together, slots, many[0])

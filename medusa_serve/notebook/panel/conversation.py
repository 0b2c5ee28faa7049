"""A conversation as plain data: who said what, what came in one step, and what no longer fits into the context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ...types import Delta

Messages = list[dict[str, str]]


class StepText(NamedTuple):
    """The text of one step. tokens: how many it has; plain decoding has 1"""

    text: str
    tokens: int


@dataclass
class Turn:
    role: Literal["user", "assistant"]
    steps: list[StepText] = field(default_factory=list)
    stopped: bool = False  # by the user, not by the model

    @property
    def text(self) -> str:
        return "".join(step.text for step in self.steps)

    def add(self, delta: Delta) -> None:
        """Half a character or half a stop string comes with the step that completes it."""
        if delta.text:
            self.steps.append(StepText(delta.text, max(delta.tokens, default=1)))


class Conversation:
    """turns: those still sent to the model · dropped: the number of older ones that are not"""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.dropped = 0

    def ask(self, text: str) -> None:
        self.turns.append(Turn("user", [StepText(text, 1)]))

    def begin_answer(self) -> Turn:
        """A new turn for an answer; the last one must be a question."""
        self.turns.append(Turn("assistant"))
        return self.turns[-1]

    def take_back_answer(self) -> bool:
        """Forget the last answer; → whether there is a question to answer."""
        if self.turns and self.turns[-1].role == "assistant":
            self.turns.pop()
        return bool(self.turns)

    def clear(self) -> None:
        self.turns.clear()
        self.dropped = 0

    def messages(self, system: str = "") -> Messages:
        """For the chat template, without an answer that has not begun."""
        said = [{"role": turn.role, "content": turn.text} for turn in self.turns if turn.steps]
        return [*([{"role": "system", "content": system}] if system else []), *said]

    def fit(self, count: Callable[[Messages], int], room: int, system: str = "") -> int:
        """Drop the oldest question and its answer until `count(messages)` is at most `room` tokens, but never the last
        question; → how many turns were dropped now."""
        dropped = 0
        while len(self.turns) > 1 and count(self.messages(system)) > room:
            later = [at for at, turn in enumerate(self.turns) if at and turn.role == "user"]
            if not later:
                break
            del self.turns[: later[0]]
            dropped += later[0]
        self.dropped += dropped
        return dropped

"""A conversation as plain data: who said what, which pieces came in one step, and what no longer fits the context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ...types import Delta

Messages = list[dict[str, str]]


class Piece(NamedTuple):
    """Text that came together. run: tokens of the step that brought it; 1 is what plain decoding brings."""

    text: str
    run: int


@dataclass
class Turn:
    role: Literal["user", "assistant"]
    pieces: list[Piece] = field(default_factory=list)
    stopped: bool = False  # ended by a person, not by the model

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    def add(self, delta: Delta) -> None:
        """Text that was held back (half a character, half a stop string) comes with the step that completes it."""
        if delta.text:
            self.pieces.append(Piece(delta.text, max(delta.tokens, default=1)))


class Conversation:
    """turns: what is still sent to the model · dropped: how many older ones are not."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.dropped = 0

    def ask(self, text: str) -> None:
        self.turns.append(Turn("user", [Piece(text, 1)]))

    def begin_answer(self) -> Turn:
        """The turn that an answer goes into; the last one must be a question."""
        self.turns.append(Turn("assistant"))
        return self.turns[-1]

    def take_back_answer(self) -> bool:
        """Forget the last answer; whether a question is left to be answered."""
        if self.turns and self.turns[-1].role == "assistant":
            self.turns.pop()
        return bool(self.turns)

    def clear(self) -> None:
        self.turns.clear()
        self.dropped = 0

    def messages(self, system: str = "") -> Messages:
        """For the chat template; an answer that has not begun is left out."""
        said = [{"role": turn.role, "content": turn.text} for turn in self.turns if turn.pieces]
        return [*([{"role": "system", "content": system}] if system else []), *said]

    def fit(self, count: Callable[[Messages], int], room: int, system: str = "") -> int:
        """Drop the oldest question and its answer until `count(messages)` is at most `room`; the last question always
        stays. → how many turns were dropped now."""
        dropped = 0
        while len(self.turns) > 1 and count(self.messages(system)) > room:
            later = [at for at, turn in enumerate(self.turns) if at and turn.role == "user"]
            if not later:
                break
            del self.turns[: later[0]]
            dropped += later[0]
        self.dropped += dropped
        return dropped

"""Heads for a model, trained in a notebook: a forecast, the training, and where the heads are kept. Every cell can run
again: answers that exist are used, an interrupted training goes on, a finished one is not repeated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import EngineConfig
from ..errors import InvalidConfig
from ..types import Completion
from . import env
from .background import stop_running

if TYPE_CHECKING:
    from ..training.forecast import Forecast


@dataclass(frozen=True)
class HeadsTraining:
    """out: the folder for the heads · minutes: for answers and training · answer_tokens: of an answer, at most"""

    model: str
    out: Path
    minutes: float
    prompts: str
    answer_tokens: int
    family: str

    @property
    def answers(self) -> Path:
        return self.out.with_name(f"{self.out.name}.answers")

    @property
    def done(self) -> bool:
        return (self.out / "config.json").is_file()

    def forecast(self, *, seconds: float = 20.0) -> Forecast | str:
        """What to expect, measured for `seconds`; the answers made meanwhile are kept."""
        from ..training.forecast import forecast
        from ..training.pipeline import under_way

        if self.done:
            return f"The heads are in {self.out} already; to train others, delete that folder."
        if under_way(self.out):  # it needs the answers that it began with, and a forecast would add others
            return (
                f"A training was interrupted, and goes on from its last state with the answers it began with; to begin "
                f"anew, delete {self.out}.training."
            )
        stop_running()
        return forecast(
            self._engine(), self.prompts, minutes=self.minutes, answers=self.answers, seconds=seconds,
            answer_tokens=self.answer_tokens,
        )  # fmt: skip

    def run(self) -> str:
        """Train, unless that is done; → the heads' folder, for `launch(model, heads=…)`."""
        from ..training.pipeline import train_from_prompts

        if self.done:
            print(f"already trained: {self.out}")
            return str(self.out)
        stop_running()
        measured = train_from_prompts(
            self._engine(), self.prompts, minutes=self.minutes, out=self.out, family=self.family,
            answers=self.answers, answer_tokens=self.answer_tokens,
        )  # fmt: skip
        print(*measured.lines, sep="\n")
        return str(self.out)

    def _engine(self) -> EngineConfig:
        return EngineConfig(model=self.model, quantize="none")


def heads_for(
    model: str,
    *,
    minutes: float,
    prompts: str = "",
    answer_tokens: int = 256,
    family: str = "sequential",
    drive: bool = False,
) -> HeadsTraining:
    """What is to be trained, and where it is kept: on Drive, in Kaggle's working folder, or beside the notebook.

    prompts: a file (one a line, or JSONL) or an id for the library `datasets`; "": the package's four thousand
    drive: in Colab, mount Drive, which asks the user
    """
    if not minutes > 0:
        raise InvalidConfig("minutes must be positive.", param="minutes")
    if drive:
        env.mount_drive()
    starter = Path(__file__).parents[1] / "training/starter_prompts.jsonl.xz"
    out = env.keep_in() / "medusa_heads" / model.rstrip("/").split("/")[-1]
    return HeadsTraining(model, out, minutes, prompts or str(starter), answer_tokens, family)


def tokens_per_step(answers: Iterable[Completion]) -> float:
    """Over all of them; prefill emits the first token of each."""
    answers = list(answers)
    return sum(answer.completion_tokens - 1 for answer in answers) / max(1, sum(answer.steps for answer in answers))

"""The prompts that a bench asks when it is given none: our own words."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import NamedTuple


class Prompts(NamedTuple):
    """Our own words: texts to summarise or rewrite, with the tasks, and questions."""

    passages: list[str]
    tasks: list[str]
    questions: list[str]

    @property
    def rewrites(self) -> list[str]:
        return [task.format(text) for task in self.tasks for text in self.passages]


def read_prompts() -> Prompts:
    return Prompts(**json.loads(files(__package__).joinpath("prompts.json").read_text(encoding="utf-8")))

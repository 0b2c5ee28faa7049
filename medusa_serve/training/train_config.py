"""The options of a training, and the line that reports how far it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..config import check_int
from ..errors import InvalidConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What is trained, and for how long. Exactly one of minutes and steps is set.

    num_heads      depths: heads of the Medusa family, the deepest depth of the sequential one
    num_layers     residual blocks of a head, or blocks of a cell · width, inner, readout: sizes of the sequential cell
    hidden_inputs  what sequential heads read, as indexes of transformers' `hidden_states`: -1, the last one, first
    draft_vocab    the most frequent tokens of the answers; 0: the whole vocabulary
    batch_rows     positions of answers that one step learns from; None: from the device, halved until they fit
    lr             the highest rate; None: from the device
    keep_gib       memory for the base's hidden states, on its device; None: all that is free; 0: none is kept
    decay          depth d counts decay^d in the loss
    held_out       answers that never train; the forecast uses them
    """

    family: Literal["medusa", "sequential"]
    out: str
    minutes: float | None = None
    steps: int | None = None
    num_heads: int = 5
    num_layers: int = 1
    width: int | None = None
    inner: int = 1024
    readout: int = 512
    hidden_inputs: tuple[int, ...] = (-1,)
    draft_vocab: int = 16384
    batch_rows: int | None = None
    keep_gib: float | None = None
    max_length: int = 1024
    lr: float | None = None
    warmup: float = 0.03
    weight_decay: float = 0.01
    decay: float = 0.8
    teacher_temperature: float = 1.0
    held_out: int = 256
    seed: int = 0
    checkpoint_seconds: float = 60.0
    report_seconds: float = 30.0
    licence: str = ""

    def __post_init__(self) -> None:
        if self.family not in ("medusa", "sequential"):
            raise InvalidConfig(f"family must be medusa or sequential, not {self.family!r}.", param="family")
        if not isinstance(self.out, str) or not self.out.strip():
            raise InvalidConfig("out must name a folder.", param="out")
        if (self.minutes is None) == (self.steps is None):
            raise InvalidConfig("Set either minutes or steps.", param="minutes")
        for name, low, high in (("num_heads", 1, 16), ("num_layers", 1, 8), ("inner", 1, 2**16), ("readout", 1, 2**16)):
            check_int(self, name, low, high)
        for name, low in (("steps", 1), ("width", 1), ("batch_rows", 1)):
            check_int(self, name, low, 2**31, optional=True)
        for name, low in (("draft_vocab", 0), ("max_length", 4), ("held_out", 1), ("seed", 0)):
            check_int(self, name, low, 2**31)
        for name, above in (("minutes", 0), ("lr", 0), ("decay", 0), ("teacher_temperature", 0)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and above < value < math.inf):
                raise InvalidConfig(f"{name} must be a positive number, not {value!r}.", param=name)
        if self.keep_gib is not None and not (
            isinstance(self.keep_gib, (int, float)) and 0 <= self.keep_gib < math.inf
        ):
            raise InvalidConfig(f"keep_gib must be a number of GiB, not {self.keep_gib!r}.", param="keep_gib")
        if self.family == "medusa" and tuple(self.hidden_inputs) != (-1,):
            raise InvalidConfig("Medusa heads read the last hidden state only.", param="hidden_inputs")


@dataclass(frozen=True)
class Report:
    """How far a run is. top1, top5: shares per depth on held-out answers · forecast: acceptance by nodes with static
    trees; the trees that the server makes for each step mostly accept more."""

    step: int
    fraction: float
    elapsed: float
    loss: float
    tokens: int
    skipped: int
    top1: list[float]
    top5: list[float]
    forecast: dict[int, float]

    @property
    def line(self) -> str:
        bar = "█" * int(self.fraction * 20)
        per = " ".join
        return (
            f"{bar:░<20} {self.fraction:4.0%} {int(self.elapsed) // 60}:{int(self.elapsed) % 60:02d} step {self.step}"
            f"  loss {self.loss:.3f}  top-1 {per(f'{x:.0%}' for x in self.top1)}"
            f"  top-5 {per(f'{x:.0%}' for x in self.top5)}"
            f"  static forecast {per(f'{n}:{x:.2f}' for n, x in self.forecast.items())}"
            f"  {self.tokens / max(self.elapsed, 1e-9):,.0f} tokens/s"
            + (f"  {self.skipped} skipped" * bool(self.skipped))
        )

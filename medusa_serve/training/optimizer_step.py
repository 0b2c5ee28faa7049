"""The optimizer's step. It never waits for the device: if gradients are not finite, the step changes nothing and is
counted, all on the device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import LoadError
from ..model.drafting.heads import Heads
from .muon import Muon

CLIP, FLOOR = 1.0, 0.02  # the largest gradient norm; the learning rate ends at this share of its peak
MAX_SKIPPED = 50  # steps in a row without finite gradients: the training stops
HALF_SCALE, MAX_SCALE, GROW = 2.0**12, 2.0**20, 500  # of fp16 gradients; it doubles after GROW good steps
GAUGES = ("loss", "skipped", "bad", "good", "scale")


class Stepper:
    """Muon for the matrices of the heads, AdamW for the other parameters, both at one learning rate. After 2,500 steps
    the default model's heads had 3.02 tokens per step, and 2.93 with AdamW alone.

    Numbers on the device: loss (a moving average) · skipped · bad and good: steps in a row · scale: the gradients that
    `step` finds are this many times too large, against underflow in fp16."""

    def __init__(self, heads: Heads, lr: float, weight_decay: float, dtype: torch.dtype) -> None:
        """dtype: of the heads' body, the base's"""
        self.dtype = dtype
        named = dict(heads.named_parameters())
        self.parameters = list(named.values())
        vectors: list[Tensor] = []
        matrices: list[Tensor] = []
        for name, parameter in named.items():
            (vectors if parameter.dim() < 2 or name.endswith("bias") else matrices).append(parameter)
        # only fused AdamW takes found_inf and grad_scale, which torch.amp.GradScaler sets too
        self.adamw: Any = torch.optim.AdamW(vectors, lr=lr, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
        self.muon = Muon(matrices, weight_decay, dtype)
        device = self.parameters[0].device
        self.loss = torch.full((), math.nan, device=device)
        self.skipped, self.bad, self.good = (torch.zeros((), device=device) for _ in range(3))
        self.scale = torch.full((), HALF_SCALE if dtype == torch.float16 else 1.0, device=device)

    def step(self, lr: float, loss: Tensor) -> None:
        """Clip, learn and forget the gradients. loss: NaN if it was not computed."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))) / self.scale
        found = (~norm.isfinite()).float()
        divisor = self.scale * (norm / CLIP).clamp(min=1.0)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.found_inf, self.adamw.grad_scale = found, divisor
        self.adamw.step()
        self.muon.step(lr, found, divisor)
        self.clear()
        self._count(found, loss.float())

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _count(self, found: Tensor, loss: Tensor) -> None:
        self.skipped += found
        self.bad.add_(1).mul_(found)
        self.good.add_(1).mul_(1 - found)
        if self.dtype == torch.float16:
            grown = torch.where((self.good > 0) & (self.good % GROW == 0), 2.0, 1.0)
            self.scale.mul_(torch.where(found > 0, 0.5, grown)).clamp_(1.0, MAX_SCALE)
        average = torch.where(self.loss.isfinite(), 0.8 * self.loss + 0.2 * loss, loss)
        self.loss = torch.where(loss.isfinite() & (found == 0), average, self.loss)

    def check(self) -> None:
        """Waits for the device. Raises LoadError when no step of the last MAX_SKIPPED gave finite gradients."""
        if self.bad >= MAX_SKIPPED:
            raise LoadError(f"{int(self.bad)} training steps in a row gave no finite numbers in {self.dtype}.")

    def state(self) -> dict[str, Any]:
        return {"adamw": self.adamw.state_dict(), "moments": self.muon.moments} | {g: getattr(self, g) for g in GAUGES}

    def load(self, state: dict[str, Any]) -> None:
        self.adamw.load_state_dict(state["adamw"])
        for moment, kept in zip(self.muon.moments, state["moments"], strict=True):
            moment.copy_(kept)
        for name in GAUGES:
            setattr(self, name, state[name])


def schedule(fraction: float, warmup: float) -> float:
    """Share of the peak learning rate: linear warm-up, then a half cosine down to FLOOR."""
    if fraction < warmup:
        return max(fraction / warmup, 1e-3)
    part = min(1.0, (fraction - warmup) / max(1e-9, 1.0 - warmup))
    return FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + math.cos(math.pi * part))

"""The optimizer's step, which never waits for the device: a step whose gradients are not finite changes nothing and is
counted, both on the device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import LoadError
from ..model.heads import Heads

CLIP, FLOOR = 1.0, 0.02  # gradient norm at most; the learning rate ends at this share of its peak
MAX_SKIPPED = 50  # steps in a row without finite gradients: something is wrong for good
HALF_SCALE, MAX_SCALE, GROW = 2.0**12, 2.0**20, 500  # of fp16 gradients; it doubles after so many good steps in a row
GAUGES = ("loss", "skipped", "bad", "good", "scale")


class Stepper:
    """AdamW over the heads. On the device, numbers each: loss (a moving average) · skipped · bad and good, steps in a
    row · scale, by which the gradients that `step` finds are too large, against underflow in fp16."""

    def __init__(self, heads: Heads, lr: float, weight_decay: float, dtype: torch.dtype) -> None:
        """dtype: of the heads' body, the base's"""
        self.dtype = dtype
        self.parameters = list(heads.parameters())
        matrices = [parameter for parameter in self.parameters if parameter.dim() > 1]
        others = [parameter for parameter in self.parameters if parameter.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        # fused: the one that takes found_inf and grad_scale, as torch.amp.GradScaler gives them
        self.optimizer: Any = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
        device = self.parameters[0].device
        self.loss = torch.full((), math.nan, device=device)
        self.skipped, self.bad, self.good = (torch.zeros((), device=device) for _ in range(3))
        self.scale = torch.full((), HALF_SCALE if dtype == torch.float16 else 1.0, device=device)

    def step(self, lr: float, loss: Tensor) -> None:
        """Clip, learn and forget the gradients. loss: NaN where it was not computed."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))) / self.scale
        self.optimizer.found_inf = (~norm.isfinite()).float()
        self.optimizer.grad_scale = self.scale * (norm / CLIP).clamp(min=1.0)  # what the gradients are divided by
        self.optimizer.step()
        self.clear()
        self._count(self.optimizer.found_inf, loss.float())

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

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
        return {"optimizer": self.optimizer.state_dict(), **{name: getattr(self, name) for name in GAUGES}}

    def load(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        for name in GAUGES:
            setattr(self, name, state[name])


def schedule(fraction: float, warmup: float) -> float:
    """Share of the peak learning rate: linear warm-up, then a half cosine down to FLOOR."""
    if fraction < warmup:
        return max(fraction / warmup, 1e-3)
    part = min(1.0, (fraction - warmup) / max(1e-9, 1.0 - warmup))
    return FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + math.cos(math.pi * part))

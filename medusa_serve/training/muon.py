"""Muon (Jordan et al. 2024; Liu et al., 2502.16982) for stacks of matrices: momentum, made orthogonal.

torch.optim.Muon is the same for single matrices, but computes in bfloat16 only: a CPU without bfloat16 instructions is
eight times slower with it than with float32. It also cannot skip a step. A test holds both equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

MOMENTUM = 0.95
# of the quintic Newton-Schulz iteration: as steep at zero as it can be, and ends with singular values of 0.7 to 1.2
COEFFICIENTS, ROUNDS = (3.4445, -4.7750, 2.0315), 5
EPS = 1e-7  # the least norm
RMS = 0.2  # of AdamW's updates, so that both learn at one rate


class Muon:
    """moments: momentum of the gradients, shaped as the stacks"""

    def __init__(self, stacks: Iterable[Tensor], weight_decay: float, dtype: torch.dtype) -> None:
        """stacks: parameters (…, out, in) · dtype: of the matrix products"""
        self.stacks, self.weight_decay, self.dtype = list(stacks), weight_decay, dtype
        self.moments = [torch.zeros_like(stack) for stack in self.stacks]

    @torch.no_grad()
    def step(self, lr: float, found: Tensor, divisor: Tensor) -> None:
        """Learn from the stacks' gradients, divided by `divisor`; nothing changes if `found` is one. Both are () float
        on the device; nothing waits for it."""
        good = 1.0 - found
        for stack, moment in zip(self.stacks, self.moments, strict=True):
            assert stack.grad is not None
            gradient = torch.where(found > 0, 0.0, stack.grad / divisor)
            moment.lerp_(gradient, (1.0 - MOMENTUM) * good)
            update = orthogonal(gradient.lerp(moment, MOMENTUM), self.dtype)
            rate = lr * RMS * math.sqrt(max(stack.shape[-2:]))
            stack.mul_(1.0 - lr * self.weight_decay * good)
            stack.sub_(update * (rate * good))


def orthogonal(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """(…, out, in) → the same singular vectors, all singular values about 1; computed in `dtype`, as float32."""
    a, b, c = COEFFICIENTS
    x = matrices.float().reshape(-1, *matrices.shape[-2:])
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPS)).to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape).float()

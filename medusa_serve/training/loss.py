"""Soft labels without K × T × V logits: rows go through the output layer in chunks, forward and back at once.

The teacher of (row g, depth d) is the base's own distribution at row g + d (see batches.py), so each chunk of teacher
rows is computed once and serves all depths. It is restricted to the draft vocabulary and renormalised: the heads can
only rank what they can draft. The gradient of the cross-entropy in the logits is softmax(student) - teacher, so no
graph is kept here; the caller sends the gradient in the features back through the heads' body. Cross-entropy against
the teacher's distribution, not its sample, is Hydra's and EAGLE's "soft" loss (Ankner et al. 2024; Li et al. 2024).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = {"cpu": 1 << 23, "cuda": 1 << 26}  # logits of a chunk: a few fp32 copies of it exist at a time


class Output(NamedTuple):
    """The shared output layer over the draft vocabulary: weight (V', H), bias (V') or None, and the base's soft cap
    of its logits (Gemma), which both sides get."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    def logits(self, x: Tensor) -> Tensor:
        """x (R, H) → (R, V'), in the weight's dtype, without the soft cap: as the drafter ranks them."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)

    def log_probs(self, x: Tensor, temperature: float = 1.0) -> Tensor:
        """x (R, H) → (R, V') float32 (float64 stays)."""
        return torch.log_softmax(self.capped(self.logits(x)) / temperature, dim=-1)

    def probs(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """logits (R, V') → (R, V') float32 (float64 stays)."""
        if self.softcap is not None or temperature != 1.0:
            return torch.softmax(self.capped(logits) / temperature, dim=-1)
        # the cast is part of it: fp16 logits on a GPU are read once
        return torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def capped(self, logits: Tensor) -> Tensor:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def chunk(self) -> int:
        """Rows that go through at once."""
        return max(1, CHUNK.get(self.weight.device.type, CHUNK["cuda"]) // self.weight.shape[0])


class Loss(NamedTuple):
    """grad (R, D, H) of the loss in the features, times `scale` · total: Σ over depths of weight × cross-entropy, a
    number per row (it is divided by the rows) · per_depth (D) mean cross-entropies; the last two NaN unless asked for.
    """

    total: Tensor
    per_depth: Tensor
    grad: Tensor


@torch.no_grad()
def soft_loss(
    features: Tensor,
    teacher: Tensor,
    place: Tensor,
    output: Output,
    weights: Tensor,
    *,
    scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    chunk: int | None = None,
    value: bool = True,
) -> Loss:
    """Depth-weighted cross-entropy of students against teachers, and its gradient.

    features (R, D, H) of the heads · teacher (R, H): the base's hidden states one position after the rows · place (R):
    index of a row in its sequence; (row g, depth d) counts where place[g + d] >= d, that is, both lie in one sequence
    · weights (D) · scale multiplies the gradient (fp16) · temperature of the teacher · value: the loss itself too
    """
    rows, depths, _ = features.shape
    step = chunk or output.chunk()
    grad = torch.zeros_like(features)
    sums = torch.zeros(depths, dtype=torch.float64, device=features.device)
    for start in range(0, rows, step):
        end = min(start + step, rows)
        target = output.probs(output.logits(teacher[start:end]), temperature)
        for depth in range(min(depths, end)):
            low = max(start, depth)
            mine, p = slice(low - depth, end - depth), target[low - start :]
            z = output.logits(features[mine, depth])
            q, counted = output.probs(z), place[low:end] >= depth
            if value:
                sums[depth] += (_cross_entropy(output.capped(z), q, p) * counted).sum()
            slope = _difference(q, p, output.weight.dtype)
            if output.softcap is not None:  # d tanh
                slope *= 1.0 - (output.capped(z) / output.softcap).square()
            # a row's weight is a factor of its gradient too, which is much narrower than the slope
            grad[mine, depth] = (slope @ output.weight).to(grad.dtype) * (counted * weights[depth])[:, None]
    per_row = max(rows, 1)
    grad *= scale / per_row  # afterwards: in fp16 the small slopes would vanish before the product
    if not value:
        sums.fill_(torch.nan)
        return Loss(sums.sum(), sums, grad)
    counts = torch.stack([(place >= depth).sum() for depth in range(depths)])
    return Loss((sums * weights).sum() / per_row, sums / counts.clamp(min=1), grad)


def _cross_entropy(z: Tensor, q: Tensor, p: Tensor) -> Tensor:
    """-Σ p log q of each row, for q = softmax(z): as Σ p = 1 it is logsumexp(z) - Σ p z, and log q is never made.
    All (R, V') → (R)."""
    most, at = z.max(dim=-1)
    normaliser = most - q.gather(-1, at[:, None])[:, 0].log()
    return normaliser - torch.einsum("rv,rv->r", p, z)


def _difference(q: Tensor, p: Tensor, dtype: torch.dtype) -> Tensor:
    """q - p in `dtype`, q overwritten or cast in the same pass."""
    return q.sub_(p) if q.dtype == dtype else torch.sub(q, p, out=torch.empty_like(q, dtype=dtype))

"""Weight-only int8 on a CPU: each row of a linear layer's weight has 255 steps and one scale. A product reads half the
bytes of bfloat16.

Products go through torch's `_weight_int8pack_mm` (bfloat16 in and out, float32 sums). For 1 to 64 rows each row's
result has the same bits, whatever the other rows are. `MAX_ROWS` keeps this true for any number of rows: a tree, a
batch and a prompt's chunks get the same logits. The text is that of the model in int8, a changed model.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

MAX_ROWS = 64  # rows of one product
COVERS = 0.9  # this share of the weights that a pass reads must be in linear layers
WIDTH = 32  # the kernel reads full vectors: with other numbers of inputs it returns garbage, or crashes


class Int8Linear(nn.Module):
    """weight (out, in) int8 · scale (out) bfloat16: the layer's weight is weight × scale · bias (out) or None"""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.out_features, self.in_features = self.shape

    @property
    def shape(self) -> tuple[int, int]:
        out, inputs = self.weight.shape
        return out, inputs

    @staticmethod
    def arranged(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The tensors of `quantized`, in the kernel's order."""
        return weight, scale

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether it can be an Int8Linear. Subclasses of nn.Linear may compute something else."""
        return type(module) is nn.Linear and module.in_features % WIDTH == 0

    @classmethod
    def of(cls, linear: nn.Linear) -> Self:
        bias = None if linear.bias is None else linear.bias.detach().bfloat16()
        return cls(*cls.arranged(*quantized(linear.weight.detach())), bias)

    @staticmethod
    def can_merge(layers: list[Any]) -> bool:
        """Whether these can become one."""
        return len({layer.in_features for layer in layers}) == 1 and all(layer.bias is None for layer in layers)

    @classmethod
    def merged(cls, layers: list[Int8Linear]) -> Int8Linear:
        """One layer with the outputs of all; the layers then share its weights."""
        merged = cls(torch.cat([layer.weight for layer in layers]), torch.cat([layer.scale for layer in layers]))
        sizes = [layer.out_features for layer in layers]
        for layer, weight, scale in zip(layers, merged.weight.split(sizes), merged.scale.split(sizes), strict=True):
            layer.weight, layer.scale = weight, scale
        return merged

    def forward(self, x: Tensor) -> Tensor:
        out = int8_product(x, self.weight, self.scale)
        return out if self.bias is None else out + self.bias


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) float → int8, and the scale (out) in bfloat16: each row's largest number becomes 127."""
    scale = (weight.abs().amax(dim=1).float() / 127).clamp(min=1e-30).bfloat16()
    # divided by the rounded scale, so that its rounding costs nothing
    steps = (weight.float() / scale.float()[:, None]).round_().clamp_(-127, 127)
    return steps.to(torch.int8), scale


def int8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x (…, in), any float type → (…, out) bfloat16. Raises ValueError where `in` is no multiple of WIDTH."""
    if weight.shape[1] % WIDTH:
        raise ValueError(f"int8 products need a multiple of {WIDTH} inputs, not {weight.shape[1]}")
    flat = x.reshape(-1, x.shape[-1]).bfloat16().contiguous()
    if flat.shape[0] <= MAX_ROWS:
        out = torch._weight_int8pack_mm(flat, weight, scale)
    else:
        out = torch.cat([torch._weight_int8pack_mm(part, weight, scale) for part in flat.split(MAX_ROWS)])
    return out.view(*x.shape[:-1], -1)


@torch.no_grad()
def quantize_linears(module: nn.Module, kind: type[Int8Linear] = Int8Linear) -> None:
    """Replace every linear layer that fits by an Int8Linear: of this kind where the layer fits it."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and Int8Linear.fits(child):
                setattr(parent, name, (kind if kind.fits(child) else Int8Linear).of(child))


def linear_share(model: Any) -> float:
    """The share of the weights read by every pass that is in linear layers that fit. A pass reads only a few rows of
    the input embedding, which does not count."""
    inside = {id(p): p.numel() for m in model.modules() if Int8Linear.fits(m) for p in m.parameters()}
    embedding = {id(p) for p in model.get_input_embeddings().parameters()} - inside.keys()
    every = {id(p): p.numel() for p in model.parameters() if id(p) not in embedding}
    return sum(inside.values()) / max(1, sum(every.values()))

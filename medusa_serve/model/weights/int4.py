"""Weights that are few-bit numbers already, as a dequantised GGUF's are: products read the small numbers again.

A group of 32 weights of a row on 16 equal steps (Q4_1) is a scale, a zero and 4-bit steps. A group on the steps
-127 … 127 (Q8_0) is two such parts, the high and the low four bits. Only scale and zero are rounded, to bfloat16: the
default model's text then differs from float32's as rarely as bfloat16's does.

Products go through torch's own `_weight_int4pack_mm_for_cpu` (bfloat16 in and out, float32 sums), or through a subclass
of this machine's own where that is faster. Each row's result is bitwise the same, whatever the other rows are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from .int8 import MAX_ROWS, Int8Linear

GROUP = 32  # weights of a row that share a scale
BLOCK = 64  # output rows of a block in the kernel's own order
ROW_MULTIPLE = 16  # the kernel packs that many output rows together
OFF_GRID = 1e-5  # of a tensor's largest weight: how far from its step float32 may put a weight
PEEK_ROWS = 64  # of a file's tensor that are looked at before anything is loaded
ROWS_AT_ONCE = 1024  # of a weight that is looked at: an output layer's temporaries would be gigabytes

Parts = list[tuple[Tensor, Tensor]]


class Int4Linear(nn.Module):
    """packed (P, out, in / 2) uint8 in the kernel's own order · scales (P, in / 32, out, 2) bfloat16: scale and zero, a
    weight is the sum over the P parts of (step - 8) × scale + zero · bias (out) or None"""

    packed: Tensor
    scales: Tensor
    bias: Tensor | None
    note = ""  # a mark of this class in the names of step times

    def __init__(self, packed: Tensor, scales: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self.out_features, self.in_features = self.shape
        self._parts: Parts | None = None  # views, each of which costs as much as a kernel's call

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[1], self.scales.shape[1] * GROUP

    @staticmethod
    def int8() -> type[Int8Linear]:
        """The layers of int8 weights that go with these."""
        return Int8Linear

    @staticmethod
    def arranged(steps: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """A part as few_bit_parts gives it, as the kernel reads it."""
        return torch._convert_weight_to_int4pack_for_cpu(steps.int(), 2), scales.transpose(0, 1)

    @classmethod
    def of(cls, linear: nn.Linear, find: Callable[[Tensor], Parts | None] | None = None) -> Self | None:
        """None where the layer's weights are no such numbers. find: few_bit_parts, or what gives the same faster"""
        shape, dtype = linear.weight.shape, linear.weight.dtype
        if type(linear) is not nn.Linear or dtype != torch.float32 or shape[1] % GROUP or shape[0] % ROW_MULTIPLE:
            return None
        blocks: list[Parts] = []
        for rows in linear.weight.detach().split(ROWS_AT_ONCE):
            parts = (find or few_bit_parts)(rows)
            if parts is None or len(parts) != len((blocks or [parts])[0]):
                return None
            blocks.append(parts)
        bias = None if linear.bias is None else linear.bias.detach().bfloat16()
        return cls._made([tuple(map(torch.cat, zip(*part, strict=True))) for part in zip(*blocks, strict=True)], bias)

    @classmethod
    def _made(cls, parts: list[Any], bias: Tensor | None = None) -> Self:
        packed, scales = zip(*(cls.arranged(*part) for part in parts), strict=True)
        return cls(torch.stack(packed), torch.stack(scales).contiguous(), bias)

    @classmethod
    def rounded(cls, weight: Tensor) -> Self:
        """weight (out, in) float → the nearest of 16 steps between each group's ends: for drafts, which need not be
        exact."""
        groups = weight.float().unflatten(1, (-1, GROUP))
        low = groups.amin(dim=2)
        scale = (groups.amax(dim=2) - low) / 15
        return cls._made([part_of(_steps(groups - low[..., None], scale).flatten(1), scale, low + 8 * scale)])

    @classmethod
    def random(cls, out_features: int, in_features: int) -> Self:
        """Of one part, to time products."""
        steps = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8)
        return cls._made([(steps, torch.rand(out_features, in_features // GROUP, 2).bfloat16())])

    @staticmethod
    def can_merge(layers: list[Any]) -> bool:
        """Whether these may become one: in the kernel's order whole blocks of rows follow each other."""
        inputs = {(layer.in_features, layer.packed.shape[0]) for layer in layers}
        return len(inputs) == 1 and all(layer.bias is None and layer.out_features % BLOCK == 0 for layer in layers)

    @classmethod
    def merged(cls, layers: list[Any]) -> Self:
        """One layer with the outputs of all, whose weights the layers share."""
        sizes = [layer.out_features for layer in layers]
        whole = cls(
            torch.cat([layer.packed for layer in layers], dim=1), torch.cat([layer.scales for layer in layers], dim=2)
        )
        for layer, rows in zip(layers, whole.packed.split(sizes, dim=1), strict=True):
            layer.packed, layer._parts = rows, None
        return whole

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3 and x.shape[0] == 1 and x.shape[1] <= MAX_ROWS and x.dtype == torch.bfloat16:
            out = self._product(x[0].contiguous())[None]
            return out if self.bias is None else out + self.bias
        flat = x.reshape(-1, self.in_features).bfloat16().contiguous()
        parts = [self._product(rows) for rows in flat.split(MAX_ROWS)]
        out = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias

    def _product(self, x: Tensor) -> Tensor:
        parts = self._parts
        if parts is None or torch.compiler.is_compiling():
            parts = list(zip(self.packed, self.scales, strict=True))
            self._parts = None if torch.compiler.is_compiling() else parts
        out = None
        for packed, scales in parts:
            part = self._part(x, packed, scales)
            out = part if out is None else out + part
        assert out is not None
        return out

    def _part(self, x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
        return torch._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales)

    def dense(self) -> Tensor:
        """The weights, (out, in) bfloat16: what the kernel makes of the unit vectors, for its order is its own."""
        return self._product(torch.eye(self.in_features, dtype=torch.bfloat16)).T.contiguous()


def int4_kind_of(model: Any) -> type[Int4Linear]:
    """The class of its int4 layers; torch's where it has none."""
    return next((type(module) for module in model.modules() if isinstance(module, Int4Linear)), Int4Linear)


class FewBitKernels(NamedTuple):
    """What a CPU has of its own for such weights; by default only torch's ways.

    find     few_bit_parts, or what gives the same faster
    linear   layers that may be faster than Int4Linear
    warm_up  begins to compile, in a thread, what the first step of such layers needs
    """

    find: Callable[[Tensor], Parts | None] | None = None
    linear: type[Int4Linear] | None = None
    warm_up: Callable[[], object] = bool


def few_bit_parts(weight: Tensor) -> Parts | None:
    """weight (out, in) float32 → of each part steps (out, in) uint8 from 0 to 15, and scales (out, in / 32, 2)
    bfloat16; None where the weights lie on no such steps."""
    groups = weight.unflatten(1, (-1, GROUP))
    near = OFF_GRID * float(weight.abs().max())
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    scale = (high - low) / 15
    steps = _steps(groups - low[..., None], scale)
    if _distance(steps * scale[..., None] + low[..., None], groups) <= near:
        return [part_of(steps.flatten(1), scale, low + 8 * scale)]
    scale = torch.maximum(high, -low) / 127
    steps = _steps(groups, scale)
    if _distance(steps * scale[..., None], groups) <= near:
        return two_parts((steps + 128).flatten(1).to(torch.uint8), scale)
    return None


def two_parts(steps: Tensor, scale: Tensor) -> Parts:
    """16 × high + low bits - 128: the kernel takes 8 from each part's steps."""
    return [part_of(steps >> 4, 16 * scale, torch.zeros_like(scale)), part_of(steps & 15, scale, 8 * scale)]


def _steps(values: Tensor, scale: Tensor) -> Tensor:
    return (values / scale.clamp(min=1e-30)[..., None]).round_()


def _distance(made: Tensor, wanted: Tensor) -> float:
    return float((made - wanted).abs().max())


def part_of(steps: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    return steps.to(torch.uint8), torch.stack([scale, zero], dim=-1).bfloat16()


def stored_in_few_bits(folder: Path) -> bool:
    """Whether the first matrix of a folder's safetensors lies on such steps, by its first rows."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors"))[:1]:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - the file is no dict
                    rows = opened.get_slice(name)
                    shape = rows.get_shape()
                    if len(shape) == 2 and shape[1] % GROUP == 0:
                        part = rows[: min(PEEK_ROWS, shape[0])]
                        return part.dtype == torch.float32 and few_bit_parts(part) is not None
        except (SafetensorError, OSError):
            return False  # the loader will say what is wrong with it
    return False


@torch.no_grad()
def use_few_bits(
    model: Any, kind: type[Int4Linear] = Int4Linear, find: Callable[[Tensor], Parts | None] | None = None
) -> float:
    """Every linear layer on such steps becomes one of this kind, every other weight bfloat16; → the share of the linear
    layers' weights that did. find: as Int4Linear.of's"""
    done = every = 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a thousand short operations: beside a busy neighbour two threads wait ten times as long
    try:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    every += child.weight.numel()
                    small = kind.of(child, find)
                    if small is not None:
                        setattr(parent, name, small)
                        done += child.weight.numel()
    finally:
        torch.set_num_threads(threads)
    for parameter in model.parameters():  # buffers stay: rotary frequencies need float32
        parameter.data = parameter.data.bfloat16()
    model.config.dtype = torch.bfloat16
    return done / max(1, every)

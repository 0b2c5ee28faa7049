"""Layers for weights that are few-bit numbers already, as in a dequantised GGUF: products read the small numbers again.

32 weights of a row are a group. A group on 16 equal steps (Q4_1) is kept as a scale, a zero and 4-bit steps. A group on
the steps -127 … 127 (Q8_0) is kept as two such parts, the high and the low four bits. Only scale and zero are rounded,
to bfloat16, so the default model's text differs from float32's as rarely as bfloat16's does.

Products go through torch's `_weight_int4pack_mm_for_cpu` (bfloat16 in and out, float32 sums), or through this machine's
subclass where that is faster. Each row's result has the same bits, whatever the other rows are.
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
ROW_MULTIPLE = 16  # the kernel packs this many output rows together
OFF_GRID = 1e-5  # how far float32 may put a weight from its step, as a share of the tensor's largest weight
PEEK_ROWS = 64  # rows of a file's tensor that are checked before anything is loaded
ROWS_AT_ONCE = 1024  # rows that are checked at a time: a full output layer's temporaries would be gigabytes

Parts = list[tuple[Tensor, Tensor]]


class Int4Linear(nn.Module):
    """packed (P, out, in / 2) uint8 in the kernel's own order · scales (P, in / 32, out, 2) bfloat16: scale and zero; a
    weight is the sum over the P parts of (step - 8) × scale + zero · bias (out) or None"""

    packed: Tensor
    scales: Tensor
    bias: Tensor | None
    note = ""  # marks this class in the names of kept times

    def __init__(self, packed: Tensor, scales: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self.out_features, self.in_features = self.shape
        self._parts: Parts | None = None  # views: making one costs as much as a kernel call

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[1], self.scales.shape[1] * GROUP

    @staticmethod
    def int8() -> type[Int8Linear]:
        """The layers of int8 weights that go with these."""
        return Int8Linear

    @staticmethod
    def arranged(steps: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """A part from few_bit_parts, in the kernel's order."""
        return torch._convert_weight_to_int4pack_for_cpu(steps.int(), 2), scales.transpose(0, 1)

    @classmethod
    def of(cls, linear: nn.Linear, find: Callable[[Tensor], Parts | None] | None = None) -> Self | None:
        """None where the weights are not few-bit numbers. find: few_bit_parts, or a faster one with the same result"""
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
        """weight (out, in) float → rounded to 16 steps from each group's least to its largest: for drafts, which need
        not be exact."""
        groups = weight.float().unflatten(1, (-1, GROUP))
        low = groups.amin(dim=2)
        scale = (groups.amax(dim=2) - low) / 15
        return cls._made([part_of(_steps(groups - low[..., None], scale).flatten(1), scale, low + 8 * scale)])

    @classmethod
    def random(cls, out_features: int, in_features: int) -> Self:
        """A layer of one part with random weights, to time products."""
        steps = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8)
        return cls._made([(steps, torch.rand(out_features, in_features // GROUP, 2).bfloat16())])

    @staticmethod
    def can_merge(layers: list[Any]) -> bool:
        """Whether these can become one: the kernel's order is a row of complete blocks."""
        inputs = {(layer.in_features, layer.packed.shape[0]) for layer in layers}
        return len(inputs) == 1 and all(layer.bias is None and layer.out_features % BLOCK == 0 for layer in layers)

    @classmethod
    def merged(cls, layers: list[Any]) -> Self:
        """One layer with the outputs of all; the layers then share its weights."""
        sizes = [layer.out_features for layer in layers]
        merged = cls(
            torch.cat([layer.packed for layer in layers], dim=1), torch.cat([layer.scales for layer in layers], dim=2)
        )
        for layer, rows in zip(layers, merged.packed.split(sizes, dim=1), strict=True):
            layer.packed, layer._parts = rows, None
        return merged

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
        """The weights, (out, in) bfloat16: products with unit vectors, as only the kernel knows its order."""
        return self._product(torch.eye(self.in_features, dtype=torch.bfloat16)).T.contiguous()


def int4_kind_of(model: Any) -> type[Int4Linear]:
    """The class of the model's int4 layers; Int4Linear where it has none."""
    return next((type(module) for module in model.modules() if isinstance(module, Int4Linear)), Int4Linear)


class FewBitKernels(NamedTuple):
    """A CPU's own functions for such weights; the defaults use torch only.

    find     few_bit_parts, or a faster one with the same result
    linear   a layer class that may be faster than Int4Linear
    warm_up  starts a thread that compiles the kernels for these layers' first step
    """

    find: Callable[[Tensor], Parts | None] | None = None
    linear: type[Int4Linear] | None = None
    warm_up: Callable[[], object] = bool


def few_bit_parts(weight: Tensor) -> Parts | None:
    """weight (out, in) float32 → for each part steps (out, in) uint8 from 0 to 15, and scales (out, in / 32, 2)
    bfloat16; None where the weights are not on such steps."""
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
    """16 × high + low bits - 128: the kernel subtracts 8 from each part's steps."""
    return [part_of(steps >> 4, 16 * scale, torch.zeros_like(scale)), part_of(steps & 15, scale, 8 * scale)]


def _steps(values: Tensor, scale: Tensor) -> Tensor:
    return (values / scale.clamp(min=1e-30)[..., None]).round_()


def _distance(made: Tensor, wanted: Tensor) -> float:
    return float((made - wanted).abs().max())


def part_of(steps: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    return steps.to(torch.uint8), torch.stack([scale, zero], dim=-1).bfloat16()


def stored_in_few_bits(folder: Path) -> bool:
    """Whether a folder's safetensors hold few-bit numbers, judged by the first rows of the first matrix."""
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
    """Replace each linear layer of few-bit weights by one of this kind, and make every other weight bfloat16. → the
    share of the linear layers' weights that were replaced. find: as in Int4Linear.of"""
    done = every = 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a thousand short operations: beside a busy process two threads wait ten times as long
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

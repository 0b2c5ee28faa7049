"""A model too large for one GPU: its decoder layers are on all visible GPUs, everything else on the first (the home).

accelerate's hooks move the hidden states from GPU to GPU; the KV rows of a layer are on the GPU of the layer. A pass
goes through the GPUs one after the other, so this makes room, not speed, and its steps are launched one by one (no CUDA
graph spans GPUs). If a model fits on one GPU, replicas use several GPUs faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...errors import LoadError
from ..kernels import Kernels
from .hidden_tap import decoder_layers
from .slab import SlotCache


def device_map(model: Any, devices: Sequence[Any], shares: Sequence[float]) -> dict[str, Any]:
    """accelerate's device_map: each device gets its share of the layers, in order; the first gets all the rest. The
    model may be on the meta device. Raises LoadError if it has no list of decoder layers."""
    layers = decoder_layers(model)
    bounds = [round(sum(shares[: i + 1]) / sum(shares) * len(layers)) for i in range(len(devices))]
    place = {id(layer): devices[_first_above(bounds, index)] for index, layer in enumerate(layers)}
    above = {id(module) for module in model.modules() if any(child is layers for child in module.modules())}
    found: dict[str, Any] = {}

    def visit(module: Any, prefix: str) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if id(child) in place:
                found[path] = place[id(child)]
            elif id(child) in above:
                visit(child, f"{path}.")
            else:
                found[path] = devices[0]

    visit(model, "")
    return found


def _first_above(bounds: Sequence[int], index: int) -> int:
    return next(number for number, bound in enumerate(bounds) if index < bound)


def gpu_shares(weights: int, layer_bytes: int) -> tuple[list[torch.device], list[float]]:
    """The visible GPUs and each one's share of the layers: by free memory, on the home less the rest of the weights.

    weights: bytes of the model · layer_bytes: of all its decoder layers. Raises LoadError if there is only one GPU, or
    if all GPUs together have too little memory for the weights."""
    count = torch.cuda.device_count()
    if count < 2:
        raise LoadError(f"device split needs two GPUs or more, and this machine has {count or 'none'}; use auto.")
    free = [torch.cuda.mem_get_info(index)[0] for index in range(count)]
    if weights > sum(free):
        have = f"{sum(free) / 2**30:.1f} GiB are free on {count} GPUs"
        raise LoadError(f"The weights take {weights / 2**30:.1f} GiB and {have}; quantise, or choose a smaller model.")
    free[0] = max(0, free[0] - (weights - layer_bytes))
    return [torch.device("cuda", index) for index in range(count)], [float(value) for value in free]


def sizes(model: Any) -> tuple[int, int]:
    """Bytes of the model and of its decoder layers."""
    return sum(p.nbytes for p in model.parameters()), sum(p.nbytes for p in decoder_layers(model).parameters())


def split_plan(hf_config: Any, dtype: torch.dtype) -> tuple[dict[str, Any], str]:
    """(device_map for from_pretrained, a note), from the config alone. Raises LoadError, also without accelerate."""
    from transformers import AutoModelForCausalLM

    require_accelerate()
    with torch.device("meta"):
        sketch = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    devices, shares = gpu_shares(*sizes(sketch))
    return device_map(sketch, devices, shares), split_note(devices)


def split_note(devices: Sequence[Any]) -> str:
    return f"the layers lie over {len(devices)} GPUs: room, not speed, as each pass goes through one after the other"


def require_accelerate() -> None:
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise LoadError("device split needs the package accelerate: pip install accelerate.") from None


def layer_devices(model: Any) -> list[torch.device]:
    """The device of each decoder layer; empty if all are on one device, or if no layers are found."""
    try:
        found = [next(layer.parameters()).device for layer in decoder_layers(model)]
    except (LoadError, StopIteration):
        return []
    return found if len(set(found)) > 1 else []


class SplitCache:
    """Several SlotCaches with the interface of one. groups: a name for each layer's cache; None: one per device"""

    def __init__(
        self,
        layers: list[tuple[int, int, int]],
        slots: int,
        columns: int,
        dtype: torch.dtype,
        devices: Sequence[torch.device],
        groups: Sequence[Any] | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        groups = devices if groups is None else groups
        self._parts: dict[Any, SlotCache] = {}
        self._place: list[tuple[SlotCache, int]] = []
        for index, name in enumerate(groups):
            mine = [number for number, other in enumerate(groups) if other == name]
            if name not in self._parts:
                shapes = [layers[number] for number in mine]
                self._parts[name] = SlotCache(shapes, slots, columns, dtype, devices[index], kernels)
            self._place.append((self._parts[name], mine.index(index)))

    def write(
        self, layer: int, slots: torch.Tensor, columns: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        part, index = self._place[layer]
        return part.write(index, slots, columns, keys, values)

    def commit(self, slots: torch.Tensor, length: torch.Tensor, nodes: torch.Tensor) -> None:
        for part in self._parts.values():
            device = part.keys.device
            part.commit(slots.to(device), length.to(device), nodes.to(device))

    def zero(self, slot: int) -> None:
        for part in self._parts.values():
            part.zero(slot)

    @property
    def nbytes(self) -> int:
        return sum(part.keys.nbytes + part.values.nbytes for part in self._parts.values())

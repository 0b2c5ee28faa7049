"""Between host and device without waiting: small inputs are sent from pinned memory, results are read on request."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

Output = TypeVar("Output")


def to_device(values: Sequence[Any] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Numbers as a tensor on the device. From pageable memory, CUDA would first wait for all running work."""
    tensor = values if isinstance(values, torch.Tensor) else torch.tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def bits_of(values: torch.Tensor) -> torch.Tensor:
    """float32 as int64 with the same bits, so that results of both kinds need one transfer."""
    return values.contiguous().view(torch.int32).to(torch.int64)


def from_bits(bits: int) -> float:
    """The float32 that `bits_of` packed."""
    return float(struct.unpack("<f", struct.pack("<i", bits))[0])


class Started(Generic[Output]):
    """A started pass on the device; `outputs` waits for it. Implements types.StartedPass."""

    def __init__(self, facts: torch.Tensor, read: Callable[[list[list[int]]], list[Output]]) -> None:
        """facts (B, …): the results, copied to the host right after the pass, before later work can overwrite them."""
        self._read = read
        self._facts = facts.to("cpu", non_blocking=True) if facts.is_cuda else facts
        self._done = torch.cuda.Event() if facts.is_cuda else None
        if self._done is not None:
            self._done.record()

    def outputs(self) -> list[Output]:
        if self._done is not None:
            self._done.synchronize()
        return self._read(self._facts.tolist())

"""The KV slab: one tensor each for keys and values of all layers, addressed by slot.

Invariant: between steps, columns 0 … length-1 of a slot hold the tokens of its sequence except the pending one. A pass
over N tree nodes writes columns length … length+N-1, and only `commit` keeps some of them.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ..kernels import Kernels, choose

LINE = 64  # bytes of a cache line; a slab begins at one


class SlotCache:
    """keys, values: (L, S, C, kv_heads, dim), zero-filled. C is the context plus room for a tree after it."""

    def __init__(
        self,
        layers: list[tuple[int, int, int]],
        slots: int,
        columns: int,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels | None = None,
    ) -> None:
        """layers: (kv_heads, key dim, value dim) of each layer; the caller checks that all agree · kernels: None: those
        of the machine"""
        kv_heads, key_dim, value_dim = layers[0]
        shape = (len(layers), slots, columns, kv_heads)
        self.keys = _zeros((*shape, key_dim), dtype, device)
        self.values = _zeros((*shape, value_dim), dtype, device)
        self._kernels = kernels or choose(device)

    def like(self, slots: int, columns: int) -> SlotCache:
        """An empty cache for the same layers."""
        layers = [(self.keys.shape[3], self.keys.shape[4], self.values.shape[4])] * len(self.keys)
        return SlotCache(layers, slots, columns, self.keys.dtype, self.keys.device, self._kernels)

    def write(
        self, layer: int, slots: torch.Tensor, columns: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put new rows into the slab and return the layer's part of it, (S, C, kv_heads, dim) each.

        slots (B) · columns (B, N) · keys, values (B, kv_heads, N, dim)
        """
        key_slab, value_slab = self.keys[layer], self.values[layer]
        self._kernels.write_rows(key_slab, value_slab, slots, columns, keys, values)
        return key_slab, value_slab

    def commit(self, slots: torch.Tensor, length: torch.Tensor, nodes: torch.Tensor) -> None:
        """Move the accepted nodes' rows to the end of their sequences, for all layers at once.

        slots (B) · length (B) · nodes (B, A): the path, the root first; entries after its end may be anything, since
        columns after a sequence's new length are never read.

        Example, length 7, nodes 0 1 3 of a tree of 6:   columns  7 8 9 10 11 12      7 8 9
                                                         hold     r a b  c  d  e  →   r a c
        """
        if nodes.shape[1] == 1:
            return  # the root is in place
        self._kernels.commit_rows(self.keys, slots, length, nodes)
        self._kernels.commit_rows(self.values, slots, length, nodes)

    def zero(self, slot: int) -> None:
        """Wipe a slot that holds NaN: even masked rows of V with NaN give NaN."""
        self.keys[:, slot].zero_()
        self.values[:, slot].zero_()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU, pages are taken at their first write. torch.zeros would write them all and take a second."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    whole = torch.from_numpy(np.zeros(size + LINE, np.uint8))
    start = -whole.data_ptr() % LINE
    return whole[start : start + size].view(dtype).view(shape)

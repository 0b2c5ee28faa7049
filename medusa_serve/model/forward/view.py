"""What one pass sees: its rows, the columns of their slots, and which of the new tokens see each other."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from ..drafting.tree import Draft
from .transfer import to_device


@dataclass
class View:
    """What one pass sees: B rows of N new tokens each. It reads the keys of the first T columns of each slot.

    Each pass has a new one; masks are made at their first use and shared by all layers.

    slots, length (B) on the device, and the same as Python ints (a captured pass knows only `slots` and `width`)
    positions (B, N) · columns (B, N): where the new tokens' keys are written
    bits (B, N) int64: bit j of a new token is set if it sees new token j; None: a causal run: a token sees all columns
    up to its position
    width: T, if all rows are read at once
    packed: the model sees all rows side by side as one, (1, B·N)
    """

    slots: torch.Tensor
    length: torch.Tensor
    host_slots: list[int]
    host_length: list[int]
    positions: torch.Tensor
    columns: torch.Tensor
    bits: torch.Tensor | None
    width: int
    packed: bool = False
    _visible: dict[int | None, torch.Tensor] = field(default_factory=dict)
    _bias: dict[tuple[int | None, int | None, int], torch.Tensor | None] = field(default_factory=dict)
    _copies: dict[torch.device, View] = field(default_factory=dict)

    def on(self, device: torch.device) -> View:
        """The same view for a layer on another device; made once per pass."""
        if device == self.slots.device:
            return self
        if device not in self._copies:
            names = ("slots", "length", "positions", "columns")
            moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in names}
            bits = None if self.bits is None else self.bits.to(device)
            fresh: Any = {"_visible": {}, "_bias": {}, "_copies": {}}
            self._copies[device] = replace(self, **moved, bits=bits, **fresh)
        return self._copies[device]

    @property
    def num_new(self) -> int:
        return self.positions.shape[1]

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """A layer's tensor of the rows: if they are packed, (1, heads, B·N, dim) → (B, heads, N, dim)."""
        if not self.packed or self.positions.shape[0] == 1:
            return x
        return x[0].unflatten(1, self.positions.shape).transpose(0, 1)

    def pack(self, out: torch.Tensor) -> torch.Tensor:
        """The output of the attention, (B, N, heads, dim), as the layer expects it: (1, B·N, heads, dim) if the rows
        are packed."""
        return out.flatten(0, 1)[None] if self.packed and self.positions.shape[0] > 1 else out

    @property
    def causal(self) -> bool:
        return self.bits is None

    @cached_property
    def flat_columns(self) -> torch.Tensor:
        """`columns`, without gaps in memory."""
        return self.columns.contiguous()

    @cached_property
    def sees(self) -> torch.Tensor:
        """(B, N, N) bool: new token i sees new token j."""
        assert self.bits is not None
        shifts = torch.arange(self.num_new, device=self.length.device)
        return ((self.bits[:, :, None] >> shifts) & 1) == 1

    def visible(self, window: int | None) -> torch.Tensor:
        """(B, N, T) bool. Windows compare positions, never columns."""
        if window not in self._visible:
            self._visible[window] = self._seen(window)
        return self._visible[window]

    def _seen(self, window: int | None) -> torch.Tensor:
        column = torch.arange(self.width, device=self.length.device)
        if self.causal:
            seen = column <= self.positions[:, :, None]
            key_position = column[None, :]
        else:
            node = column - self.length[:, None]  # (B, T): index among the new tokens, negative in the history
            inside = (node >= 0) & (node < self.num_new)
            index = node.clamp(0, self.num_new - 1)
            among = self.sees.gather(2, index[:, None, :].expand(-1, self.num_new, -1))
            seen = torch.where(inside[:, None, :], among, (node < 0)[:, None, :])
            key_position = torch.where(inside, self.positions.gather(1, index), column)
        if window is not None:
            seen = seen & (self.positions[:, :, None] - key_position[:, None, :] < window)
        return seen

    def bias(self, window: int | None, row: int | None, group: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Additive mask, packed for `group` query heads per key head: (1, 1, group × N, T of that row), or for all rows
        (B, 1, …). None if everything is visible (plain decoding of one row).
        """
        key = (window, row, group)
        if key not in self._bias:
            width = self.width if row is None else self.host_length[row] + self.num_new
            lone = self.num_new == 1 and row is not None and (window is None or width <= window)
            if lone:
                self._bias[key] = None
            else:
                seen = self.visible(window) if row is None else self.visible(window)[row : row + 1, :, :width]
                bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
                self._bias[key] = bias.repeat(1, group, 1)[:, None]
        return self._bias[key]


def tree_view(
    slots: torch.Tensor,
    length: torch.Tensor,
    host_slots: list[int],
    host_length: list[int],
    draft: Draft,
    width: int | None = None,
    packed: bool = False,
) -> View:
    """The view of rows that have a filled tree each."""
    new = draft.tokens.shape[1]
    columns = length[:, None] + torch.arange(new, device=length.device)
    positions = length[:, None] + draft.depths
    width = max(host_length) + new if width is None else width
    return View(slots, length, host_slots, host_length, positions, columns, ancestor_bits(draft.mask), width, packed)


def chain_view(
    host_slots: list[int],
    host_length: list[int],
    counts: list[int],
    device: torch.device,
    scratch: int = 0,
    width: int | None = None,
) -> View:
    """The view of a prefill: causal runs of `counts` tokens, aligned right in rows as long as the longest run.

    A shorter run has padding on its left: its keys go to the column `scratch`, which is never read.
    """
    new = max(counts)
    slots, length, count = to_device([host_slots, host_length, counts], device)
    index = torch.arange(new, device=device) - (new - count)[:, None]
    positions = length[:, None] + index.clamp(min=0)
    columns = torch.where(index >= 0, positions, scratch)
    ends = [start + count for start, count in zip(host_length, counts, strict=True)]
    return View(slots, length, host_slots, host_length, positions, columns, None, max(ends) if width is None else width)


def ancestor_bits(tree: torch.Tensor) -> torch.Tensor:
    """(B, N, N) bool → (B, N) int64: bit j of a node is set if it sees node j. N ≤ 64."""
    shifts = torch.arange(tree.shape[-1], device=tree.device)
    return (tree.to(torch.int64) << shifts).sum(dim=-1)

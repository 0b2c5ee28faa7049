"""Attention over slots by torch's operations: each row sees its sequence's history and, among the new tokens, itself
and its ancestors.

TreeForward registers it with transformers' AttentionInterface, so that models run unmodified. No mask function has the
same name, so transformers builds no mask. Keys and values arrive as the slab's layer (from SlotCache.write through the
model's cache object), the rest as a `View`. GQA groups are packed into the query length (q: kv_heads, group × N), so
keys and values are read once.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from .view import View


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    view: View,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """query (B, heads, N, dim) · keys, values: the slab's layer (S, C, kv_heads, dim) → (B, N, heads, value dim)

    exact: on a CPU, a token's result depends only on the tokens that it sees, bit for bit: it sums in float64"""
    if exact or softcap is not None or sinks is not None:
        wide = torch.float64 if exact else torch.float32
        return reference_attention(query, keys, values, view, scaling, window, softcap, sinks, wide)
    if query.device.type == "cpu":
        return _by_row(query, keys, values, view, scaling, window)
    return _by_batch(query, keys, values, view, scaling, window)


def _by_row(query, keys, values, view, scaling, window):
    """Each row over its own length: nothing is padded, and no row's sums depend on the other rows of the batch."""
    rows, heads, new, dim = query.shape
    kv_heads = keys.shape[2]
    group = heads // kv_heads
    out = query.new_empty(rows, heads, new, values.shape[-1])
    for row, (slot, length) in enumerate(zip(view.host_slots, view.host_length, strict=True)):
        k = keys[slot : slot + 1, : length + new].transpose(1, 2)
        v = values[slot : slot + 1, : length + new].transpose(1, 2)
        packed = query[row].reshape(1, kv_heads, group * new, dim)
        bias = view.bias(window, row, group, query.dtype)
        got = scaled_dot_product_attention(packed, k, v, attn_mask=bias, scale=scaling)
        out[row] = got.reshape(heads, new, -1)
    return out.transpose(1, 2)


def _by_batch(query, keys, values, view, scaling, window):
    """All rows at once over the longest row's length (GPU; with `enable_gqa` a T4 would take the slow path)."""
    rows, heads, new, dim = query.shape
    kv_heads = keys.shape[2]
    group = heads // kv_heads
    k, v = _gathered(keys, values, view)
    packed = query.reshape(rows, kv_heads, group * new, dim)
    bias = view.bias(window, None, group, query.dtype)
    got = scaled_dot_product_attention(packed, k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias, scale=scaling)
    return got.reshape(rows, heads, new, -1).transpose(1, 2)


def _gathered(keys: torch.Tensor, values: torch.Tensor, view: View) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows' part of the slab, (B, T, kv_heads, dim): a view if the slots are neighbours, else a copy."""
    first, rows, width = view.host_slots[0], len(view.host_slots), view.width
    if view.host_slots == list(range(first, first + rows)):
        return keys[first : first + rows, :width], values[first : first + rows, :width]
    return keys[view.slots, :width], values[view.slots, :width]


def reference_attention(query, keys, values, view, scaling, window=None, softcap=None, sinks=None, wide=torch.float32):
    """The slow, plain form: matrix products in at least `wide` over everything. Every fast path is compared with it.
    Models with a soft cap (Gemma 2) or attention sinks (gpt-oss) use it. In float64, sums in another order differ in
    digits far below those that bfloat16 keeps."""
    rows, heads, new, _ = query.shape
    k, v = _gathered(keys, values, view)
    group = heads // k.shape[2]
    wide = torch.promote_types(query.dtype, wide)
    k = k.permute(0, 2, 1, 3).repeat_interleave(group, dim=1).to(wide)
    v = v.permute(0, 2, 1, 3).repeat_interleave(group, dim=1).to(wide)
    scores = query.to(wide) @ k.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~view.visible(window)[:, None], -torch.inf)
    if sinks is not None:
        sink = sinks.to(wide).reshape(1, -1, 1, 1).expand(rows, heads, new, 1)
        probs = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        probs = scores.softmax(dim=-1)
    return (probs @ v).to(query.dtype).transpose(1, 2)

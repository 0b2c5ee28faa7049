"""Tree attention as two Triton kernels: split-K over the history, ancestor bits for the tree (sm_80 and newer).

The kernels read lengths on the device, so one captured step serves every length, and a row costs what its own sequence
needs. The GQA group and the nodes are packed into the rows of one tile, so that keys and values are read once. SDPA
reads the longest row's width for all rows, and does not split a few rows' long history over the chip, as flash-decoding
does (Dao et al. 2023).
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ..forward.view import View

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch has no Triton; `available` says so
    triton = None

MAX_DIM = 128  # of keys and values: larger tiles do not fit together
ROWS, COLUMNS = 64, 64  # tile: packed query rows at most, and key columns
COMBINED = 4  # packed query rows of a program that joins splits


@lru_cache
def available(device: torch.device) -> bool:
    """Whether Triton is here and has matrix kernels for this GPU (not for a T4: Triton 3.3 dropped them for sm_75)."""
    return triton is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def fits(query: torch.Tensor, values: torch.Tensor, view: View) -> bool:
    """Whether `tree_attention` covers this pass."""
    return (
        not view.causal
        and view.num_new <= 64
        and max(query.shape[-1], values.shape[-1]) <= MAX_DIM
        and available(query.device)
    )


def tree_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    view: View,
    scaling: float,
    window: int | None = None,
) -> torch.Tensor:
    """query (B, heads, N, dim) · keys, values: the slab's layer (S, C, kv_heads, dim) → (B, N, heads, value dim)"""
    rows, heads, new, dim = query.shape
    kv_heads, value_dim = keys.shape[2], values.shape[3]
    group = heads // kv_heads
    packed = group * new
    tile = min(ROWS, max(16, triton.next_power_of_2(packed)))
    blocks = triton.cdiv(packed, tile)
    splits = _splits(rows * kv_heads * blocks, query.device)
    out = torch.empty(rows, new, heads, value_dim, dtype=query.dtype, device=query.device)
    part = torch.empty(rows * kv_heads, splits, blocks * tile, value_dim, dtype=torch.float32, device=query.device)
    peak = torch.empty(2, rows * kv_heads, splits, blocks * tile, dtype=torch.float32, device=query.device)
    _partial[(rows * kv_heads, splits, blocks)](
        query, keys, values, out, part, peak[0], peak[1], view.slots, view.length, view.bits, view.positions,
        scaling, window or 0,
        query.stride(0), query.stride(1), query.stride(2),
        keys.stride(0), keys.stride(1), keys.stride(2), values.stride(0), values.stride(1), values.stride(2),
        KV_HEADS=kv_heads, GROUP=group, NEW=new, DIM=dim, VALUE_DIM=value_dim, SPLITS=splits, TILE=tile,
        COLUMNS=COLUMNS,
        BLOCK_DIM=triton.next_power_of_2(dim), BLOCK_VALUE=triton.next_power_of_2(value_dim), WINDOWED=window is not
        None,
        num_warps=4,
    )  # fmt: skip
    if splits > 1:
        _combine[(rows * kv_heads, triton.cdiv(packed, COMBINED))](
            out, part, peak[0], peak[1], blocks * tile,
            KV_HEADS=kv_heads, GROUP=group, NEW=new, VALUE_DIM=value_dim, SPLITS=splits, LINES=COMBINED,
            BLOCK_VALUE=triton.next_power_of_2(value_dim), num_warps=1,
        )  # fmt: skip
    return out


def write_rows(
    key_slab: torch.Tensor,
    value_slab: torch.Tensor,
    slots: torch.Tensor,
    columns: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Write a layer's new rows into its part of the slab, as SlotCache.write does: one kernel instead of eight.

    slabs (S, C, kv_heads, dim) · slots (B) · columns (B, N) · keys, values (B, kv_heads, N, dim), their last dimension
    contiguous"""
    rows, kv_heads, new, dim = keys.shape
    value_dim = values.shape[3]
    _write[(rows * new,)](
        key_slab, value_slab, keys, values, slots, columns.contiguous(),
        key_slab.stride(0), key_slab.stride(1), value_slab.stride(0), value_slab.stride(1),
        keys.stride(0), keys.stride(1), keys.stride(2), values.stride(0), values.stride(1), values.stride(2),
        NEW=new, KEY_SIZE=kv_heads * dim, VALUE_SIZE=kv_heads * value_dim, DIM=dim, VALUE_DIM=value_dim,
        BLOCK=triton.next_power_of_2(kv_heads * max(dim, value_dim)), num_warps=4,
    )  # fmt: skip


@lru_cache
def _splits(programs: int, device: torch.device) -> int:
    """How many splits, from static shapes only (never from lengths): for two programs per multiprocessor."""
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count // max(1, programs)
    return max(1, min(16, 1 << max(0, wanted).bit_length() - 1 if wanted else 1))


if triton is not None:

    @triton.jit
    def _partial(
        query, keys, values, out, part, peaks, sums, slots, lengths, bits, positions,
        scaling, window,
        q_row, q_head, q_node, k_slot, k_column, k_head, v_slot, v_column, v_head,
        KV_HEADS: tl.constexpr, GROUP: tl.constexpr, NEW: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
        SPLITS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_DIM: tl.constexpr,
        BLOCK_VALUE: tl.constexpr, WINDOWED: tl.constexpr,
    ):  # fmt: skip
        """Softmax over one split of a row's columns for one tile of its packed queries."""
        at, split, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        row, kv_head = at // KV_HEADS, at % KV_HEADS
        slot, length = tl.load(slots + row), tl.load(lengths + row)
        packed = block * TILE + tl.arange(0, TILE)
        node, head = packed % NEW, kv_head * GROUP + packed // NEW
        valid = packed < GROUP * NEW
        d, e = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE)
        q = tl.load(
            query + row * q_row + head[:, None] * q_head + node[:, None] * q_node + d[None, :],
            mask=valid[:, None] & (d < DIM)[None, :], other=0.0,
        )  # fmt: skip
        seen_nodes = tl.load(bits + row * NEW + node, mask=valid, other=1)
        position = tl.load(positions + row * NEW + node, mask=valid, other=0)
        total = length + NEW
        share = tl.cdiv(tl.cdiv(total, SPLITS), COLUMNS) * COLUMNS
        begin = split * share
        end = tl.minimum(begin + share, total)
        peak = tl.full([TILE], float("-inf"), tl.float32)
        mass = tl.zeros([TILE], tl.float32)
        acc = tl.zeros([TILE, BLOCK_VALUE], tl.float32)
        for start in range(begin, end, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = column < end
            k = tl.load(
                keys + slot * k_slot + column[:, None] * k_column + kv_head * k_head + d[None, :],
                mask=inside[:, None] & (d < DIM)[None, :], other=0.0,
            )  # fmt: skip
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
            other = tl.maximum(column - length, 0)
            among = ((seen_nodes[:, None] >> tl.minimum(other, NEW - 1)[None, :]) & 1) == 1
            seen = ((column < length)[None, :] | among) & inside[None, :]
            if WINDOWED:
                theirs = tl.load(positions + row * NEW + other, mask=inside & (column >= length), other=0)
                theirs = tl.where(column < length, column, theirs)
                seen = seen & (position[:, None] - theirs[None, :] < window)
            scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, axis=1))
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp(scores - safe[:, None])
            shrink = tl.exp(peak - safe)
            mass = mass * shrink + tl.sum(p, axis=1)
            v = tl.load(
                values + slot * v_slot + column[:, None] * v_column + kv_head * v_head + e[None, :],
                mask=inside[:, None] & (e < VALUE_DIM)[None, :], other=0.0,
            )  # fmt: skip
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            peak = higher
        if SPLITS == 1:
            to = out + ((row * NEW + node) * (KV_HEADS * GROUP) + head)[:, None] * VALUE_DIM + e[None, :]
            result = acc / mass[:, None]
            tl.store(to, result.to(out.dtype.element_ty), mask=valid[:, None] & (e < VALUE_DIM)[None, :])
        else:
            line = (at * SPLITS + split) * (TILE * tl.num_programs(2)) + packed
            tl.store(part + line[:, None] * VALUE_DIM + e[None, :], acc, mask=(e < VALUE_DIM)[None, :] & valid[:, None])
            tl.store(peaks + line, peak)
            tl.store(sums + line, mass)

    @triton.jit
    def _write(
        key_slab, value_slab, keys, values, slots, columns,
        ks_slot, ks_column, vs_slot, vs_column, k_row, k_head, k_node, v_row, v_head, v_node,
        NEW: tl.constexpr, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, DIM: tl.constexpr,
        VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Write the keys and values of one new token."""
        token = tl.program_id(0)
        row, node = token // NEW, token % NEW
        slot, column = tl.load(slots + row), tl.load(columns + token)
        at = tl.arange(0, BLOCK)
        k = tl.load(keys + row * k_row + (at // DIM) * k_head + node * k_node + at % DIM, mask=at < KEY_SIZE)
        tl.store(key_slab + slot * ks_slot + column * ks_column + at, k, mask=at < KEY_SIZE)
        v_at = values + row * v_row + (at // VALUE_DIM) * v_head + node * v_node + at % VALUE_DIM
        v = tl.load(v_at, mask=at < VALUE_SIZE)
        tl.store(value_slab + slot * vs_slot + column * vs_column + at, v, mask=at < VALUE_SIZE)

    @triton.jit
    def _combine(
        out, part, peaks, sums, lines,
        KV_HEADS: tl.constexpr, GROUP: tl.constexpr, NEW: tl.constexpr, VALUE_DIM: tl.constexpr, SPLITS: tl.constexpr,
        LINES: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    ):  # fmt: skip
        """Join the splits of a few packed queries by their peaks."""
        at, block = tl.program_id(0), tl.program_id(1)
        row, kv_head = at // KV_HEADS, at % KV_HEADS
        packed = block * LINES + tl.arange(0, LINES)
        node, head = packed % NEW, kv_head * GROUP + packed // NEW
        valid = packed < GROUP * NEW
        e = tl.arange(0, BLOCK_VALUE)
        inside = (e < VALUE_DIM)[None, :] & valid[:, None]
        line = (at * SPLITS + tl.arange(0, SPLITS))[:, None] * lines + packed[None, :]
        peak = tl.max(tl.load(peaks + line, mask=valid[None, :], other=0.0), axis=0)
        mass = tl.zeros([LINES], tl.float32)
        acc = tl.zeros([LINES, BLOCK_VALUE], tl.float32)
        for split in tl.static_range(SPLITS):
            line = (at * SPLITS + split) * lines + packed
            weight = tl.exp(tl.load(peaks + line, mask=valid, other=0.0) - peak)
            mass += weight * tl.load(sums + line, mask=valid, other=1.0)
            acc += weight[:, None] * tl.load(part + line[:, None] * VALUE_DIM + e[None, :], mask=inside, other=0.0)
        to = out + ((row * NEW + node) * (KV_HEADS * GROUP) + head)[:, None] * VALUE_DIM + e[None, :]
        result = acc / mass[:, None]
        tl.store(to, result.to(out.dtype.element_ty), mask=inside)

"""Keyed noise: the Gumbel noise of (seed, position, token) is a pure function of these three.

Sampling is `argmax(log p / T + G)`. G does not depend on trees, batches or steps, so the text does not either: the same
seed gives the same tokens with speculation on or off, alone or in a batch. The heads rank their candidates with the
same G, which keeps acceptance high at T > 0 (Gumbel coupling; cf. Daliri, Musco, Suresh, "Coupling without
communication").
"""

from __future__ import annotations

import torch

_MASK16, _MASK19 = (1 << 16) - 1, (1 << 19) - 1


def _int32(value: int) -> int:
    """The two's complement of a 32-bit constant."""
    return value - (1 << 32) if value >= 1 << 31 else value


_M1, _M2, _GOLDEN = _int32(0x85EBCA6B), _int32(0xC2B2AE35), _int32(0x9E3779B9)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 32-bit finalizer on int32 (products wrap on every device; right shifts are masked to be
    logical)."""
    x = x ^ ((x >> 16) & _MASK16)
    x = x * _M1
    x = x ^ ((x >> 13) & _MASK19)
    x = x * _M2
    return x ^ ((x >> 16) & _MASK16)


def hash32(seed: torch.Tensor, position: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """32 pseudo-random bits (int32) of each (seed int64, position int64, token int64); shapes broadcast."""
    low, high = seed.to(torch.int32), (seed >> 32).to(torch.int32)
    position = position.to(torch.int32)
    # Two words of key: with one, some pair among 100,000 (seed, position) would share all its noise.
    first = _mix(_mix(_mix(low + _GOLDEN) ^ high) + position * _GOLDEN)
    second = _mix(_mix(_mix(high + _M1) ^ low) ^ (position * _M2))
    return _mix(_mix(token.to(torch.int32) * _GOLDEN + first) ^ second)


def gumbel(seed: torch.Tensor, position: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float32, always finite: from -2.8 to 22.2.

    v = (h + 1) / 2**32 is finest near 0, and large noise comes from there: with the 24 bits of a plain uniform
    number, rare tokens (p < 1e-7) would never be drawn. 1 - v is uniform, so -log(-log(1 - v)) is Gumbel.
    """
    bits = hash32(seed, position, token)
    unsigned = torch.where(bits < 0, 1.0, 0.0) + bits.to(torch.float32) * 2.0**-32
    v = (unsigned + 2.0**-32).clamp(max=1.0 - 2.0**-24)
    return -torch.log(-torch.log1p(-v))

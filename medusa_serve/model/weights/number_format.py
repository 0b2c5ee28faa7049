"""The number format of a CPU: float32, bfloat16, or bfloat16 with int4 or int8 weights. A measurement on this machine
decides.

Decoding reads every weight once a step, so smaller numbers are faster where the CPU has instructions for them
(bfloat16: AVX512_BF16 or AMX). A CPU that emulates them still gains with few rows, where the bytes count; but products
of many rows, as for a prompt or in training, take eight times as long.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import Choice
from ..timing import SMALL
from .int4 import GROUP, ROW_MULTIPLE, Int4Linear
from .int8 import WIDTH, int8_product, quantized
from .machine_cache import machine_key, measured_once

ROWS = 4  # rows of a product: a small tree
WIDE = 256  # rows of a prompt's or a training's product
NUMBERS = 1 << 24  # weights that a measurement reads: more than a cache holds
ROUNDS = 7
INT4_SHAPE = (3072, 576)  # of the weights with which two int4 kernels are timed
GAIN = 0.8  # a smaller format is chosen if it takes less than this share of the time
LOSS = 1.25  # bfloat16 may take this share of float32's time with WIDE rows
SLOWER = "bfloat16 / float32, many rows"


def choose_format(
    config: Any, formats: tuple[str, ...], cache: Path, own: type[Int4Linear] | None = None
) -> Choice[str]:
    """One of `formats` (the most exact one first), and why. config: transformers' · own: as in int4_kind"""
    text = config.get_text_config()
    hidden = getattr(text, "hidden_size", None)
    layers = getattr(text, "num_hidden_layers", None)
    if not isinstance(hidden, int) or not isinstance(layers, int):
        return Choice(formats[0], "the config does not say how large the model is")
    inner = getattr(text, "intermediate_size", None)
    inner = inner if isinstance(inner, int) else 4 * hidden
    weights = layers * (4 * hidden * hidden + 3 * hidden * inner) + hidden * text.vocab_size
    if weights <= SMALL:
        return Choice(formats[0], "the text is then exact token for token, and the model is small")
    formats = tuple(name for name in formats if _fits(name, inner, hidden) and _fits(name, hidden, inner))
    key = f"format {hidden} x {inner}: {machine_key('cpu')}"

    def measure() -> dict[str, float]:
        weights = [torch.randn(inner, hidden) for _ in range(max(1, NUMBERS // (hidden * inner)))]
        return choice_times(weights, int4_kind(cache, own) if "int4" in formats else Int4Linear)

    times, unkept = measured_once(cache, key, {*formats, SLOWER}, measure)
    found = ", ".join(f"{name} {times[name]:.1f} ms" for name in formats)
    if "bfloat16" in formats and times[SLOWER] > LOSS:
        formats = tuple(name for name in formats if name != "bfloat16")
        found += f"; bfloat16 takes {times[SLOWER]:.1f}x as long as float32 with many rows"
    why = f"of its products here ({found})" + (f"; {unkept}" if unkept else "")
    return Choice(best_format(times, formats), why)


def best_format(times: dict[str, float], formats: tuple[str, ...]) -> str:
    """The most exact format, unless a later one saves a fifth of the time."""
    best = formats[0]
    for name in formats[1:]:
        if times[name] < GAIN * times[best]:
            best = name
    return best


def choice_times(weights: list[Tensor], int4: type[Int4Linear]) -> dict[str, float]:
    """format_times, and the ratio SLOWER for the first weight."""
    floats = {name: PASSES[name](weights[:1]) for name in ("float32", "bfloat16")}
    wide = _timed(floats, torch.randn(WIDE, weights[0].shape[1]))
    return {**format_times(weights, int4=int4), SLOWER: round(wide["bfloat16"] / wide["float32"], 3)}


def format_times(weights: list[Tensor], rows: int = ROWS, int4: type[Int4Linear] = Int4Linear) -> dict[str, float]:
    """Milliseconds of the products of `rows` rows with these weights (out, in) float in each format: the median of
    rounds in which the formats take turns."""
    makers = PASSES | {"int4": partial(_int4, int4)}
    passes = {name: make(weights) for name, make in makers.items() if _fits(name, *weights[0].shape)}
    return _timed(passes, torch.randn(rows, weights[0].shape[1]))


def _timed(passes: dict[str, Callable[[Tensor], None]], x: Tensor) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in passes}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, run in passes.items():
                started = time.perf_counter()
                run(x)
                times[name].append((time.perf_counter() - started) * 1000)
    return {name: round(statistics.median(each[1:]), 3) for name, each in times.items()}


def int4_kind(cache: Path, own: type[Int4Linear] | None) -> type[Int4Linear]:
    """The layer class with the faster int4 products here: torch's, or this machine's `own` where it has one."""
    if own is None:
        return Int4Linear
    key = f"int4 products: {machine_key('cpu')}"
    kinds: dict[str, type[Int4Linear]] = {"torch": Int4Linear, "own": own}

    def measure() -> dict[str, float]:
        weights = [torch.empty(*INT4_SHAPE)] * (NUMBERS * 4 // math.prod(INT4_SHAPE))
        return _timed({name: _int4(kind, weights) for name, kind in kinds.items()}, torch.randn(ROWS, INT4_SHAPE[1]))

    times, _ = measured_once(cache, key, set(kinds), measure)
    return own if times["own"] < times["torch"] else Int4Linear


def _fits(name: str, rows: int, columns: int) -> bool:
    """Whether a weight of this shape can have the format."""
    if name == "int4":
        return columns % GROUP == 0 == rows % ROW_MULTIPLE
    return name != "int8" or columns % WIDTH == 0


def _float(dtype: torch.dtype) -> Callable[[list[Tensor]], Callable[[Tensor], None]]:
    def make(weights: list[Tensor]) -> Callable[[Tensor], None]:
        weights = [weight.to(dtype) for weight in weights]

        def run(x: Tensor) -> None:
            for weight in weights:
                F.linear(x.to(dtype), weight)

        return run

    return make


def _int8(weights: list[Tensor]) -> Callable[[Tensor], None]:
    small = [quantized(weight) for weight in weights]

    def run(x: Tensor) -> None:
        for weight, scale in small:
            int8_product(x, weight, scale)

    return run


def _int4(kind: type[Int4Linear], weights: list[Tensor]) -> Callable[[Tensor], None]:
    small = [kind.random(*weight.shape) for weight in weights]

    def run(x: Tensor) -> None:
        for layer in small:
            layer(x)

    return run


PASSES = {"float32": _float(torch.float32), "bfloat16": _float(torch.bfloat16), "int8": _int8}

"""Sampling parameters for rows of a test, and transformers' own processors for the same parameters."""

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from medusa_serve.model.sampling.filters import Sampling

SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 1.3, "top_k": 1500},
    {"temperature": 0.3, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.01},
    {"temperature": 2.0, "top_p": 0.999},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 3000, "top_p": 0.97, "min_p": 0.0001},
]


def sampling(rows: int, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seeds=None) -> Sampling:
    """One setting for all rows."""

    def full(value, dtype):
        return torch.full((rows,), value, dtype=dtype)

    seeds = torch.arange(rows) if seeds is None else seeds
    filtered = top_k > 0 or top_p < 1 or min_p > 0
    return Sampling(
        full(temperature, torch.float32),
        full(top_k, torch.int64),
        full(top_p, torch.float32),
        full(min_p, torch.float32),
        seeds,
        temperature > 0,
        filtered,
    )


def processors(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> LogitsProcessorList:
    """As transformers builds them for generate."""
    made = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        made.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        made.append(TopPLogitsWarper(top_p))
    if min_p:
        made.append(MinPLogitsWarper(min_p))
    return made

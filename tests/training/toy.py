"""A base model that speaks a language in which each token decides the next, and answers in it: what heads must draft is
known without any model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from medusa_serve.training.shards import Answers

VOCAB, HIDDEN = 23, 32


class Toy(nn.Module):
    """h_t points at f(x_t), and only there are the logits high; f is a permutation with one long cycle."""

    def __init__(self, vocab: int = VOCAB, hidden: int = HIDDEN, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        order = torch.randperm(vocab, generator=random)
        self.follow = torch.empty(vocab, dtype=torch.int64)
        self.follow[order] = order.roll(-1)
        self.embedding = nn.Embedding(vocab, hidden)
        self.lm_head = nn.Linear(hidden, vocab, bias=False)
        rows = torch.linalg.qr(torch.randn(hidden, hidden, generator=random))[0][:vocab]
        with torch.no_grad():
            self.embedding.weight.copy_(rows)
            self.lm_head.weight.copy_(8 * rows)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=hidden))
        self.to(dtype).eval().requires_grad_(False)

    device = property(lambda self: self.lm_head.weight.device)
    dtype = property(lambda self: self.lm_head.weight.dtype)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        return SimpleNamespace(logits=self.lm_head(self.embedding(self.follow[input_ids])))

    def speak(self, first: int, count: int) -> list[int]:
        out = [first]
        while len(out) < count:
            out.append(int(self.follow[out[-1]]))
        return out


def toy_answers(toy: Toy, count: int = 60, seed: int = 0) -> Answers:
    """Prompts of random tokens, greedy answers of 2 to 20 tokens."""
    random = np.random.default_rng(seed)
    vocab = len(toy.follow)
    rows = []
    for index in range(count):
        prompt = random.integers(vocab, size=random.integers(1, 7)).tolist()
        answer = toy.speak(int(toy.follow[prompt[-1]]), int(random.integers(2, 21)))
        rows.append((index, index, 0.0, prompt, answer))
    return pack(rows, vocab)


def pack(rows: list[tuple[int, int, float, list[int], list[int]]], vocab: int) -> Answers:
    """(prompt, seed, temperature, prompt ids, answer ids) as Answers."""
    return Answers(
        index=np.array([row[0] for row in rows]),
        seed=np.array([row[1] for row in rows]),
        temperature=np.array([row[2] for row in rows], np.float32),
        prompt_len=np.array([len(row[3]) for row in rows]),
        answer_len=np.array([len(row[4]) for row in rows]),
        tokens=np.array([token for row in rows for token in [*row[3], *row[4]]], np.uint32),
        vocab_size=vocab,
        model="toy",
    )

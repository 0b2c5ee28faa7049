"""One prompt with speculation and without, with the same seed: the same text, and how much sooner?"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

from ..types import Completion, SamplingParams


@dataclass(frozen=True)
class Comparison:
    """same: leading tokens that are equal. seed: of both."""

    speculative: Completion
    plain: Completion
    same: int

    @property
    def identical(self) -> bool:
        return self.speculative.token_ids == self.plain.token_ids

    @property
    def speedup(self) -> float | None:
        """Of tokens per second while decoding; None where an answer has one token."""
        fast, slow = self.speculative.tokens_per_second, self.plain.tokens_per_second
        return fast / slow if fast and slow else None

    def __str__(self) -> str:
        what = f"identical ({self.same} tokens)"
        if not self.identical:
            what = f"identical up to token {self.same}, then the two take different tokens"
        if self.speedup is None:
            return what
        rates = f"{self.speculative.tokens_per_second:.1f} against {self.plain.tokens_per_second:.1f} tokens/s"
        steps = "" if self.speculative.acceptance is None else f", {self.speculative.acceptance:.2f} tokens per step"
        return f"{what}; {self.speedup:.2f}× of plain decoding ({rates}{steps})"


def compare(llm: Any, prompt: Any, params: SamplingParams) -> Comparison:
    """Plain decoding first. `params.seed` None: the one that the first run draws is the second's."""
    [plain] = llm.generate([prompt], replace(params, speculation=False))
    [speculative] = llm.generate([prompt], replace(params, speculation=True, seed=plain.seed))
    pairs = zip(speculative.token_ids, plain.token_ids, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return Comparison(speculative, plain, same)

"""One prompt with speculation and without, with the same seed: the same text, and how much sooner?"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..types import MAX_LOGPROBS, Completion, SamplingParams

if TYPE_CHECKING:
    from ..llm import LLM, Prompt

NEAR = 0.1  # rounding in half precision moves log-probabilities by some hundredths


@dataclass(frozen=True)
class Comparison:
    """same: number of equal leading tokens · gap: between the log-probabilities of the first two tokens that differ, at
    temperature 0; None where none differ, or where the gap is not known."""

    speculative: Completion
    plain: Completion
    same: int
    gap: float | None = None

    @property
    def identical(self) -> bool:
        return self.speculative.token_ids == self.plain.token_ids

    @property
    def speedup(self) -> float | None:
        """In tokens per second while decoding; None where an answer has one token."""
        fast, slow = self.speculative.tokens_per_second, self.plain.tokens_per_second
        return fast / slow if fast and slow else None

    def __str__(self) -> str:
        what = f"identical ({self.same} tokens)"
        if not self.identical:
            how = "two different tokens"
            if self.gap is not None:
                kind = "a near-tie" if self.gap < NEAR else "no tie"
                how = f"{kind} (log-probabilities {self.gap:.3f} apart)"
            what = f"identical up to token {self.same}, then {how}"
        if self.speedup is None:
            return what
        rates = f"{self.speculative.tokens_per_second:.1f} against {self.plain.tokens_per_second:.1f} tokens/s"
        steps = "" if self.speculative.acceptance is None else f", {self.speculative.acceptance:.2f} tokens per step"
        return f"{what}; {self.speedup:.2f}× of plain decoding ({rates}{steps})"


def compare(llm: LLM, prompt: Prompt, params: SamplingParams) -> Comparison:
    """Plain decoding first. Where `params.seed` is None, the second run takes the seed that the first one drew."""
    [plain] = llm.generate([prompt], replace(params, speculation=False))
    [speculative] = llm.generate([prompt], replace(params, speculation=True, seed=plain.seed))
    pairs = zip(speculative.token_ids, plain.token_ids, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    found = Comparison(speculative, plain, same)
    return found if found.identical or params.temperature else replace(found, gap=_gap(llm, prompt, found))


def _gap(llm: LLM, prompt: Prompt, found: Comparison) -> float | None:
    """Between the log-probabilities of the first two tokens that differ."""
    at, texts = found.same, (found.plain.token_ids, found.speculative.token_ids)
    if min(map(len, texts)) == at:  # one text is the other's beginning
        return None
    return gap(llm, [*llm.encode(prompt), *texts[0][:at]], texts[0][at], texts[1][at])


def gap(llm: LLM, ids: list[int], one: int, other: int) -> float | None:
    """Between the log-probabilities of two tokens after `ids`, by a plain pass; None where one of them is not among the
    likeliest MAX_LOGPROBS."""
    params = SamplingParams(max_tokens=1, ignore_eos=True, logprobs=MAX_LOGPROBS, speculation=False)
    [answer] = llm.generate_ids([ids], params)
    known = dict(answer.logprobs[0].top)
    return abs(known[one] - known[other]) if one in known and other in known else None

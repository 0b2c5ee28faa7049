"""A sequence: one prompt with its completion, from submission to the final answer."""

from __future__ import annotations

import enum
import secrets
import uuid
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..errors import ContextTooLong, GenerationFailed, InvalidRequest
from ..types import Completion, Delta, FinishReason, SamplingParams, Sink, StepOutput, TokenLogprob
from .detokenizer import Detokenizer, Silent
from .metrics import Outcome

DEFAULT_MAX_TOKENS = 256


class State(enum.Enum):
    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    FINISHED = "finished"


class Took(NamedTuple):
    """What a sequence keeps of a pass: ids, the number of them that were drafted, text, and why the sequence ended."""

    ids: tuple[int, ...]
    accepted: int
    text: str
    reason: FinishReason | None
    logprobs: tuple[TokenLogprob, ...]

    def delta(self, completion: Completion | None = None) -> Delta:
        return Delta(self.text, (len(self.ids),), (self.accepted,), self.ids, completion, None, self.logprobs)


@dataclass(slots=True, eq=False)
class Sequence:
    """The engine's unit of work. Only the engine thread changes it; any thread may set `cancelled`.

    params         with the seed filled in
    limit          tokens of prompt and completion at most
    key            a KV prefix is reused only within one key
    cancelled      the outcome that the canceller gave
    num_reused     leading prompt ids that were in the slot's KV cache already
    num_prefilled  prompt ids in the KV cache, the reused ones included
    token_ids      emitted and delivered; the last one is pending (not in the KV cache)
    logprobs       one for each of token_ids, if asked for
    steps, drafted, accepted   decode steps, draft tokens verified, draft tokens accepted and delivered
    draft_ready    draft tokens that are ready for the next step
    drafted_for    N of the last tree drafted
    submitted, admitted, first_token, finished, delivered   times in seconds of the engine's clock
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    limit: int
    sink: Sink
    detokenizer: Detokenizer | Silent
    key: str = ""
    state: State = State.WAITING
    cancelled: Outcome | None = None
    slot: int | None = None
    num_reused: int = 0
    num_prefilled: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_ready: int = 0
    drafted_for: int = 1
    submitted: float = 0.0
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None
    delivered: float | None = None

    @property
    def num_to_prefill(self) -> int:
        return len(self.prompt_ids) - self.num_prefilled

    @property
    def speculates(self) -> bool:
        return self.params.speculation

    @property
    def kv_ids(self) -> tuple[int, ...]:
        """The ids of the KV rows that its slot holds between steps."""
        if self.token_ids:
            return self.prompt_ids + tuple(self.token_ids[:-1])
        return self.prompt_ids[: self.num_prefilled]

    def take(self, out: StepOutput, eos_ids: frozenset[int], *, decoding: bool) -> Took:
        """Append what a pass emitted. decoding: it was a decode step, not a prefill pass.

        Ids after EOS, after the id that completes a stop string, and beyond the limit are dropped and not counted.
        Raises GenerationFailed when the runner has ended the sequence and this has not: it would never end.
        """
        known = len(self.prompt_ids) + len(self.token_ids)
        ids = out.token_ids[: self.limit - known]
        at_eos = None
        if not (self.params.ignore_eos or eos_ids.isdisjoint(ids)):
            at_eos = next(n for n, i in enumerate(ids, 1) if i in eos_ids)
        text, used, stopped = self.detokenizer.feed(ids[:at_eos])
        ids = ids[:used]
        accepted = min(len(ids), out.num_accepted) if decoding else 0
        logprobs = out.logprobs[:used] if out.logprobs else ()
        self.token_ids.extend(ids)
        self.logprobs.extend(logprobs)
        self.steps += decoding
        self.drafted += out.num_drafted
        self.accepted += accepted
        self.draft_ready = out.draft_ready
        reason: FinishReason | None = None
        if stopped or used == at_eos:
            reason = "stop"
        elif known + len(ids) >= self.limit:
            reason = "length"
        elif out.finished or not ids:
            raise GenerationFailed("The model runner ended this sequence without EOS and before its limit.")
        if reason and not stopped:
            text += self.detokenizer.flush()
        if text:
            self.text.append(text)
        return Took(ids, accepted, text, reason, logprobs)

    def completion(self, model: str, reason: FinishReason) -> Completion:
        """The final answer of a finished sequence."""
        if self.admitted is None or self.first_token is None or self.finished is None or self.params.seed is None:
            raise RuntimeError("A completion is made of a finished sequence.")
        return Completion(
            id=self.id,
            model=model,
            text="".join(self.text),
            finish_reason=reason,
            seed=self.params.seed,
            token_ids=tuple(self.token_ids),
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=len(self.token_ids),
            steps=self.steps,
            drafted=self.drafted,
            accepted=self.accepted,
            queue_ms=(self.admitted - self.submitted) * 1000,
            prefill_ms=(self.first_token - self.admitted) * 1000,
            decode_ms=(self.finished - self.first_token) * 1000,
            logprobs=tuple(self.logprobs),
        )


def new_sequence(
    prompt_ids: tuple[int, ...],
    params: SamplingParams,
    limit: int,
    sink: Sink,
    detokenizer: Detokenizer | Silent,
    key: str,
    now: float,
) -> Sequence:
    """A sequence with an id of its own, and with a random seed where the request gave none."""
    if params.seed is None:
        params = replace(params, seed=secrets.randbelow(2**53))  # a JSON number holds it exactly
    id = f"gen-{uuid.uuid4().hex}"
    return Sequence(id, prompt_ids, params, limit, sink, detokenizer, key, submitted=now)


def token_limit(prompt_ids: Seq[int], params: SamplingParams, *, max_context: int, vocab_size: int) -> int:
    """Tokens of prompt and completion at most. Raises InvalidRequest for a prompt that cannot run, and ContextTooLong
    for one that leaves no room for a token or for its max_tokens."""
    num_prompt = len(prompt_ids)
    if not num_prompt:
        raise InvalidRequest("The prompt is empty.", param="prompt")
    if not all(isinstance(i, int) and 0 <= i < vocab_size for i in prompt_ids):
        raise InvalidRequest(f"The prompt has token ids outside 0 … {vocab_size - 1}.", param="prompt")
    room = max_context - num_prompt
    if room < 1:
        raise ContextTooLong(
            f"The prompt has {num_prompt} tokens; the context of {max_context} leaves no room for an answer.",
            param="prompt",
        )
    if any(token >= vocab_size for token, _ in params.logit_bias):
        raise InvalidRequest(f"logit_bias has token ids outside 0 … {vocab_size - 1}.", param="logit_bias")
    if params.max_tokens is None:
        return num_prompt + min(DEFAULT_MAX_TOKENS, room)
    if params.max_tokens > room:
        raise ContextTooLong(
            f"The prompt has {num_prompt} tokens and max_tokens is {params.max_tokens}; together they exceed the "
            f"context of {max_context}. At most {room} tokens fit.",
            param="max_tokens",
        )
    return num_prompt + params.max_tokens

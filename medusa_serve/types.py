"""Plain data that passes between the rooms, and the two protocols that join them. No torch, no HTTP.

Letters: B rows of a batch, N nodes of a tree (the root counts), D depth, K heads, V vocabulary, S slots, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from .errors import InvalidRequest, MedusaServeError

FinishReason = Literal["stop", "length"]
MAX_SEED = 2**63 - 1
MAX_STOPS, MAX_STOP_CHARS = 4, 64
MAX_BIASES, MAX_BIAS = 300, 100.0
MAX_LOGPROBS = 5
LEAST_LOGPROB = -9999.0  # instead of minus infinity, which JSON does not have


@dataclass(frozen=True, slots=True)
class Number:
    """What a number in SamplingParams may be, and its help. SamplingParams checks it; the command line, the bodies of
    the HTTP APIs and their OpenAPI page are made from it.

    default  None: the number may be absent · open_low: `low` itself is refused
    metavar  of the command line's option; None: it has none
    """

    kind: type[int] | type[float]
    default: int | float | None
    low: int | float
    high: int | float
    help: str
    open_low: bool = False
    metavar: str | None = None

    def check(self, name: str, value: Any) -> None:
        if value is None and self.default is None:
            return
        low, high = self.low, self.high
        number = isinstance(value, (int, self.kind)) and not isinstance(value, bool)
        if number and low <= value <= high and not (self.open_low and value == low):  # NaN is never within
            return
        bounds = f"a number in {'(' if self.open_low else '['}{low:g}, {high:g}]"
        if self.kind is int:
            bounds = f"an integer from {low} to {high}"
        raise InvalidRequest(f"{name} must be {bounds}.", param=name)


def _field(number: Number) -> Any:
    return field(
        default=number.default, metadata={"number": number, "check": lambda name, value: number.check(name, value)}
    )


def _check_stops(name: str, stops: Any) -> None:
    if not isinstance(stops, tuple) or len(stops) > MAX_STOPS:
        raise InvalidRequest(f"{name} must be a string or a list of at most {MAX_STOPS} strings.", param=name)
    for text in stops:
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARS:
            raise InvalidRequest(f"Each {name} string must have 1 to {MAX_STOP_CHARS} characters.", param=name)


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false.", param=name)


def _check_biases(name: str, biases: Any) -> None:
    if not isinstance(biases, tuple) or len(biases) > MAX_BIASES:
        raise InvalidRequest(f"{name} must map at most {MAX_BIASES} token ids to numbers.", param=name)
    for token, value in biases:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if isinstance(token, bool) or not isinstance(token, int) or token < 0 or not number or abs(value) > MAX_BIAS:
            message = f"{name} must map token ids to numbers from -{MAX_BIAS:g} to {MAX_BIAS:g}."
            raise InvalidRequest(message, param=name)
    if len({token for token, _ in biases}) < len(biases):
        raise InvalidRequest(f"{name} names a token id twice.", param=name)


_TOKENS = "tokens of the answer at most; without it 256, or what fits into the context"
_TOP_P = "only the likeliest tokens that have this probability together; 1: all"
_MIN_P = "only tokens at least this many times as likely as the likeliest; 0: all"
_REPETITION = "of tokens of prompt and completion, as transformers computes it; 1: none"
_COMPLETION = "of tokens of the completion, as OpenAI defines it; 0: none"
_LOGPROBS = "how many of the likeliest tokens to report with each emitted one; 0: that one alone"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What one sequence asks for; filters in transformers' order after the temperature. Raises InvalidRequest naming
    the field.

    seed         None: drawn at submission and reported in the Completion
    stop         up to 4 strings of up to 64 characters
    speculation  False: this sequence decodes one token per step, in the same batch
    ignore_eos   for benchmarks that need a fixed number of tokens; not offered over HTTP
    logit_bias   token id → what is added to its logit, up to 300; before the penalties
    logprobs     the model's own log-probabilities, before bias, penalties and temperature
    """

    max_tokens: int | None = _field(Number(int, None, 1, 2**31 - 1, _TOKENS, metavar="N"))
    temperature: float = _field(Number(float, 0.0, 0, 100, "0 is greedy", metavar="T"))
    top_p: float = _field(Number(float, 1.0, 0, 1, _TOP_P, open_low=True, metavar="P"))
    top_k: int = _field(Number(int, 0, 0, 2**31 - 1, "only this many of the likeliest tokens; 0: all", metavar="K"))
    min_p: float = _field(Number(float, 0.0, 0, 1, _MIN_P, metavar="P"))
    seed: int | None = _field(Number(int, None, 0, MAX_SEED, "of the sampling; without it one is drawn", metavar="N"))
    stop: tuple[str, ...] = field(default=(), metadata={"check": _check_stops})  # or one string
    speculation: bool = field(default=True, metadata={"check": _check_flag})
    ignore_eos: bool = field(default=False, metadata={"check": _check_flag})
    repetition_penalty: float = _field(Number(float, 1.0, 0, 100, _REPETITION, open_low=True))
    presence_penalty: float = _field(Number(float, 0.0, -2, 2, _COMPLETION))
    frequency_penalty: float = _field(Number(float, 0.0, -2, 2, _COMPLETION))
    logit_bias: tuple[tuple[int, float], ...] = field(default=(), metadata={"check": _check_biases})  # or a mapping
    logprobs: int | None = _field(Number(int, None, 0, MAX_LOGPROBS, _LOGPROBS))

    def __post_init__(self) -> None:
        if isinstance(self.logit_bias, Mapping):
            object.__setattr__(self, "logit_bias", tuple(self.logit_bias.items()))
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        elif isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))
        for each in fields(self):
            each.metadata["check"](each.name, getattr(self, each.name))

    @property
    def penalised(self) -> bool:
        """Whether the logits are changed before the choice."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0) or bool(self.logit_bias)


def sampling_numbers() -> dict[str, Number]:
    """The numbers in SamplingParams by name, in its order: their bounds, defaults and help."""
    return {each.name: each.metadata["number"] for each in fields(SamplingParams) if "number" in each.metadata}


class TokenLogprob(NamedTuple):
    """The model's own log-probability of an emitted token, and of the likeliest ones there: (id, log-probability), best
    first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class StepOutput(NamedTuple):
    """What one row of one pass gave: ids only. `token_ids` is empty only when `failed`.

    num_drafted  draft nodes that were verified (the root not counted; empty nodes not counted)
    finished     the device met EOS or the length limit
    failed       the logits were not finite: the sequence must end with an error
    draft_ready  draft tokens at hand for this row's next step (0: a tree would be empty)
    held_by      for each accepted draft token, the smallest of the runner's N with a tree that holds it
    logprobs     one for each token, where the sequence asked for them
    """

    slot: int
    token_ids: tuple[int, ...]
    num_drafted: int = 0
    finished: bool = False
    failed: bool = False
    draft_ready: int = 0
    held_by: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def num_accepted(self) -> int:
        """Draft tokens only: a step emits num_accepted + 1."""
        return max(0, len(self.token_ids) - 1)


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """The next `count` prompt tokens of a slot go into its KV cache."""

    slot: int
    count: int


@dataclass(frozen=True, slots=True)
class Completion:
    """The final answer; `to_dict` is the object of POST /generate."""

    id: str
    model: str
    text: str
    finish_reason: FinishReason
    seed: int
    token_ids: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: int
    steps: int
    drafted: int
    accepted: int
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    logprobs: tuple[TokenLogprob, ...] = ()  # one for each of token_ids, where they were asked for

    @property
    def acceptance(self) -> float | None:
        """Tokens per decode step; prefill emits the first token, so it is not counted. None without steps."""
        return (self.completion_tokens - 1) / self.steps if self.steps else None

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed: tokens after the first over the decode time. None without decode steps."""
        return (self.completion_tokens - 1) / self.decode_ms * 1000 if self.steps and self.decode_ms > 0 else None

    def to_dict(self, *, token_ids: bool = False) -> dict[str, Any]:
        out: dict[str, Any] = {
            "id": self.id,
            "model": self.model,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "seed": self.seed,
        }
        if token_ids:
            out["token_ids"] = list(self.token_ids)
        if self.logprobs:
            out["logprobs"] = [
                {"id": token, "logprob": one.logprob, "top": [{"id": i, "logprob": value} for i, value in one.top]}
                for token, one in zip(self.token_ids, self.logprobs, strict=True)
            ]
        out["usage"] = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        out["medusa"] = {
            "steps": self.steps,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance": _rounded(self.acceptance, 4),
        }
        out["timings"] = {
            "queue_ms": round(self.queue_ms, 2),
            "prefill_ms": round(self.prefill_ms, 2),
            "decode_ms": round(self.decode_ms, 2),
            "tokens_per_second": _rounded(self.tokens_per_second, 2),
        }
        return out


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


class Delta(NamedTuple):
    """What one step added to one sequence, as text.

    tokens, accepted  one entry a step: tokens emitted, and how many of them were accepted draft tokens.
                      The first entry is prefill's (1 token, 0 accepted). Merged deltas hold several entries.
    completion/error  set on the last Delta of a sequence, exactly one of them; `text` is then the remaining text.
    """

    text: str
    tokens: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    completion: Completion | None = None
    error: MedusaServeError | None = None
    logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def is_last(self) -> bool:
        return self.completion is not None or self.error is not None

    def merged(self, later: Delta) -> Delta:
        """This delta followed by `later`, as one."""
        return Delta(
            self.text + later.text,
            self.tokens + later.tokens,
            self.accepted + later.accepted,
            self.token_ids + later.token_ids,
            later.completion,
            later.error,
            self.logprobs + later.logprobs,
        )


# Called on the engine thread, once per step, with all new deltas of the sequences that were submitted with it.
Sink = Callable[[list[tuple[str, Delta]]], None]


# stalled: a step is far too old · restarting: after an error · failed: for good
EngineState = Literal["ok", "stalled", "restarting", "failed", "draining", "closed"]


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """What the engine is doing. Compare `state` by ==, as mypy checks the words of a comparison, but not of `in`."""

    state: EngineState
    running: int
    waiting: int
    heartbeat_age_s: float
    message: str | None = None

    @property
    def serves(self) -> bool:
        """Whether it takes sequences, or will again without help."""
        return self.state == "ok" or self.state == "restarting"


Output = TypeVar("Output")


class StartedPass(Protocol[Output]):
    """A pass that was started."""

    def outputs(self) -> list[Output]:
        """One a row, in order; waits for the device."""


class Runner(Protocol):
    """The model runner as the engine sees it: slots and ids. All calls come from the engine thread.

    A call that raises leaves every sequence as it was: it may be repeated, with fewer rows. Passes run in the order in
    which they were started. A row that has met EOS or its limit emits nothing more, so that the next step may be
    started before the last one's outputs are read; outputs of a freed slot's former sequence still come.
    """

    num_slots: int
    max_context: int
    vocab_size: int
    eos_ids: frozenset[int]
    node_choices: tuple[int, ...]  # the N this runner can verify, ascending, beginning with 1 (plain decoding)
    has_heads: bool  # they draft after every step of more than one node
    prefill_rows: int  # prompts of one prefill pass at most
    row_budget: int  # rows × nodes of one pass at most, while no step times are there
    expected: tuple[float, ...]  # tokens per step of each N, as calibrated
    overlaps: bool  # calls return before the device is done: worth starting a step before reading the last one
    grace_s: float  # without work before it may rest: what it does then keeps newcomers waiting
    can_reuse: bool  # a prefix left in a slot's KV cache can be kept

    @property
    def activity(self) -> str | None:
        """ "compiling …" while a call may take long; None otherwise."""

    @property
    def step_ms(self) -> Mapping[tuple[int, int], float]:
        """Milliseconds of decode steps by (rows, N); empty where none were measured."""

    @property
    def later_ms(self) -> Mapping[tuple[int, int], float]:
        """The same of steps after what `rest` still has to do, where an earlier start measured them."""

    def admit(self, slot: int, prompt_ids: Seq[int], params: SamplingParams, limit: int, num_reused: int) -> None:
        """Put a sequence into a free slot. `limit`: total tokens (prompt and completion) at most; `num_reused`: leading
        prompt ids whose KV rows are already there (< len(prompt_ids)). `params.seed` is set."""

    def prefill(self, chunks: Seq[PrefillChunk]) -> StartedPass[StepOutput | None]:
        """Advance prompts; where a prompt is complete, the output holds the first emitted token, else None."""

    def first_draft(self, prompts: int) -> int:
        """N of the tree that a prefill pass of this many prompts drafts for their first decode step."""

    def step_rows(self, rows: int) -> int:
        """Rows of the step that runs for `rows`: as many, or more where steps exist for some numbers of rows only."""

    def decode(self, slots: Seq[int], nodes: int) -> StartedPass[StepOutput]:
        """One step of these rows with a tree of `nodes` nodes (one of node_choices), in the order of `slots`."""

    def free(self, slot: int) -> None:
        """Give the slot back. Its committed KV rows stay for reuse unless it ever failed (then they are zeroed)."""

    def rest(self) -> bool:
        """No sequence is left: give up what only computing needs, or do a little of what can wait for such a time; →
        whether there is more of that."""

    def reset(self) -> None:
        """Forget every sequence, whatever state an error left: all slots are free and as new."""

    def close(self) -> None:
        """Free all device memory."""


class TextCodec(Protocol):
    """The tokenizer as the engine and the server see it."""

    has_chat_template: bool
    special_ids: frozenset[int]  # tokens that are no text: EOS and its like
    token_texts: Mapping[int, bytes] | None  # by id; `decode` joins them. None where it does more than that

    def encode(self, text: str) -> list[int]:
        """Raw text to ids, with the model's own special tokens (BOS)."""

    def encode_chat(self, messages: Seq[dict[str, str]]) -> list[int]:
        """Chat template with the generation prompt. Raises InvalidRequest when there is none or it refuses."""

    def encode_many(self, prompts: Seq[str]) -> list[list[int] | None]:
        """Each as one user's message (raw text without a chat template); None where the template refuses."""

    def decode(self, ids: Seq[int]) -> str:
        """Ids to text without special tokens and without clean-up of spaces."""

    def token_text(self, id: int) -> str:
        """The text of one token within a sentence, special ones by name; a part of a character is U+FFFD."""

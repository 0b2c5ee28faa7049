"""A scripted runner, a small tokenizer and a clock that is moved by hand. No torch."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import partial

from medusa_serve.errors import InvalidRequest
from medusa_serve.types import Delta, PrefillChunk, SamplingParams, StepOutput, TokenLogprob

BOS, EOS, FIRST_WORD = 256, 257, 258
TEXTS = (
    *(" the", " a", " cat", " dog", " sees", " runs", " and", " then", " house", " tree", " blue", " old", " to"),
    *(", ", ". ", "\n", "ing", "ed", "é", "你好", " Ünder", "🙂"),
)
WORDS = tuple(text.encode() for text in TEXTS)


class ManualClock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class FakeCodec:
    """256 bytes, BOS, EOS, some words. Text is encoded byte by byte, so any non-ASCII character spans several ids.

    strip_space: like sentencepiece, the first visible id loses a leading space · pieces: told, as byte-level BPE's
    """

    vocab_size = FIRST_WORD + len(WORDS)
    special_ids = frozenset({BOS, EOS})

    def __init__(self, *, has_chat_template: bool = True, strip_space: bool = False, pieces: bool = False) -> None:
        self.has_chat_template = has_chat_template
        self._strip_space = strip_space
        self.token_texts = {id: self._piece(id) for id in range(self.vocab_size)} if pieces else None

    def encode(self, text: str) -> list[int]:
        return [BOS, *text.encode()]

    def encode_chat(self, messages: Seq[dict[str, str]]) -> list[int]:
        if not self.has_chat_template:
            raise InvalidRequest("The model has no chat template.", param="messages")
        return self.encode("".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:")

    def encode_many(self, prompts: Seq[str]) -> list[list[int] | None]:
        if not self.has_chat_template:
            return [self.encode(prompt) for prompt in prompts]
        return [self.encode_chat([{"role": "user", "content": prompt}]) for prompt in prompts]

    def token_text(self, id: int) -> str:
        if id in self.special_ids:
            return "<bos>" if id == BOS else "<eos>"
        return (bytes([id]) if id < 256 else WORDS[id - FIRST_WORD]).decode(errors="replace")

    def decode(self, ids: Seq[int]) -> str:
        text = b"".join(map(self._piece, ids)).decode(errors="replace")
        return text[1:] if self._strip_space and text.startswith(" ") else text

    def _piece(self, id: int) -> bytes:
        if id in self.special_ids:
            return b""
        return bytes([id]) if id < 256 else WORDS[id - FIRST_WORD]


def hashed_word(ids: tuple[int, ...], params: SamplingParams) -> int:
    """The next token as a function of every id before it (and of the seed when sampling): always a word, never EOS."""
    return FIRST_WORD + hash((ids, params.seed if params.temperature else -1)) % len(WORDS)


@dataclass
class _Slot:
    prompt: tuple[int, ...]
    params: SamplingParams
    limit: int
    pending: int | None = None
    done: bool = False


@dataclass(frozen=True)
class Done:
    """A pass that was over when its call returned, but for what waiting for it costs."""

    made: list
    wait: Callable[[], None] | None = None

    def outputs(self) -> list:
        if self.wait is not None:
            self.wait()
        return self.made


@dataclass
class FakeRunner:
    """The Runner protocol over lists of ids.

    The next token is a function of the ids in the slot's KV list and of the pending token: a wrong prefix, a leaked
    slot or a lost commit changes the text. `solo` is what a sequence must give, whatever the company.

    next_token   (all ids so far, params) → id
    reply        fixed completion ids instead, then EOS
    accept       draft tokens accepted by successive decode calls of a slot, repeated for ever (bounded by nodes)
    before       called as before("prefill" | "decode", slots) before anything changes: may raise, block, move a clock
    poison, nan  a prompt with this id makes calls raise, or its decode rows fail
    clock, prefill_s, decode_s   what calls cost on the clock: (per call, per prompt token), per call
    device_ms    what decode steps cost besides, by nodes: at once, or who overlaps waits for it at the outputs
    sleep_s      real seconds of every call
    """

    num_slots: int = 4
    prefill_rows: int = 1
    max_context: int = 4096
    vocab_size: int = FakeCodec.vocab_size
    eos_ids: frozenset[int] = frozenset({EOS})
    node_choices: tuple[int, ...] = (1, 4, 8, 16)
    has_heads: bool = False
    step_ms: dict[tuple[int, int], float] = field(default_factory=dict)
    expected: tuple[float, ...] = ()
    overlaps: bool = False
    grace_s: float = 0.0
    can_reuse: bool = True
    activity: str | None = None
    row_budget: int = 16
    next_token: Callable[[tuple[int, ...], SamplingParams], int] = hashed_word
    reply: Seq[int] | None = None
    accept: Seq[int] = (0,)
    before: Callable[[str, list[int]], None] | None = None
    poison: int | None = None
    nan: int | None = None
    clock: ManualClock | None = None
    prefill_s: tuple[float, float] = (0.0, 0.0)
    decode_s: float = 0.0
    device_ms: dict[int, float] = field(default_factory=dict)
    sleep_s: float = 0.0
    rests_wanted: int = 0  # with less than so many rests there is more to do
    # what happened
    calls: list[tuple] = field(default_factory=list)
    admitted: list[tuple[int, int, int]] = field(default_factory=list)  # slot, prompt tokens, reused
    rests: int = 0
    resets: int = 0
    closed: int = 0

    def __post_init__(self) -> None:
        self.kv: list[list[int]] = [[] for _ in range(self.num_slots)]
        self.slots: dict[int, _Slot] = {}
        self._accepts: dict[int, itertools.cycle] = {}

    # -- protocol

    def admit(self, slot: int, prompt_ids: Seq[int], params: SamplingParams, limit: int, num_reused: int) -> None:
        assert slot not in self.slots, f"slot {slot} has an owner"
        assert 0 <= num_reused < len(prompt_ids), "the last prompt token must run"
        assert num_reused <= len(self.kv[slot]), "no such KV rows"
        assert params.seed is not None
        assert len(prompt_ids) < limit <= self.max_context
        self.slots[slot] = _Slot(tuple(prompt_ids), params, limit)
        del self.kv[slot][num_reused:]
        self._accepts[slot] = itertools.cycle(self.accept)
        self.admitted.append((slot, len(prompt_ids), num_reused))

    def prefill(self, chunks: Seq[PrefillChunk]) -> Done:
        self.calls.append(("prefill", tuple((c.slot, c.count) for c in chunks)))
        self._begin("prefill", [c.slot for c in chunks])
        self._cost(self.prefill_s[0] + self.prefill_s[1] * sum(c.count for c in chunks))
        return Done([self._prefill(chunk) for chunk in chunks])

    def _prefill(self, chunk: PrefillChunk) -> StepOutput | None:
        slot, kv = self.slots[chunk.slot], self.kv[chunk.slot]
        assert slot.pending is None
        assert 0 < chunk.count <= len(slot.prompt) - len(kv)
        kv.extend(slot.prompt[len(kv) : len(kv) + chunk.count])
        if len(kv) < len(slot.prompt):
            return None
        if self.nan in slot.prompt:
            return StepOutput(chunk.slot, (), failed=True)
        self._emit(slot, kv)
        told = self._logprobs(slot, 1)
        return StepOutput(chunk.slot, (slot.pending,), finished=slot.done, draft_ready=self._ready(slot), logprobs=told)

    def first_draft(self, prompts: int) -> int:
        return self.node_choices[-1]

    def step_rows(self, rows: int) -> int:
        return rows

    def decode(self, slots: Seq[int], nodes: int) -> Done:
        self.calls.append(("decode", tuple(slots), nodes))
        assert nodes in self.node_choices
        self._begin("decode", list(slots))
        self._cost(self.decode_s)
        wait = partial(self._cost, self.device_ms.get(nodes, 0.0) / 1000)
        if not self.overlaps:
            wait()
        return Done([self._decode(slot, nodes) for slot in slots], wait if self.overlaps else None)

    def _decode(self, number: int, nodes: int) -> StepOutput:
        slot, kv = self.slots[number], self.kv[number]
        failed = self.nan in slot.prompt and slot.pending is None
        if self.overlaps and (slot.done or failed):  # the engine starts a step before it has read the last one
            return StepOutput(number, (), failed=failed)
        assert slot.pending is not None, "decode before prefill"
        assert not slot.done, "decode after the end"
        drafted = nodes - 1 if slot.params.speculation else 0
        emitted: list[int] = []
        for _ in range(1 + min(next(self._accepts[number]), drafted)):
            if slot.done:
                break
            kv.append(slot.pending)
            self._emit(slot, kv)
            emitted.append(slot.pending)
        held = tuple(next(n for n in self.node_choices if n > place) for place in range(1, len(emitted)))
        told = self._logprobs(slot, len(emitted))
        return StepOutput(number, tuple(emitted), drafted, slot.done, False, self._ready(slot), held, told)

    def free(self, slot: int) -> None:
        del self.slots[slot]

    def rest(self) -> bool:
        assert not self.slots
        self.rests += 1
        return self.rests < self.rests_wanted

    def reset(self) -> None:
        self.slots.clear()
        self.kv = [[] for _ in range(self.num_slots)]
        self.resets += 1

    def close(self) -> None:
        self.closed += 1

    # -- helpers

    def _begin(self, kind: str, slots: list[int]) -> None:
        if self.sleep_s:
            time.sleep(self.sleep_s)
        if self.before is not None:
            self.before(kind, slots)
        if any(self.poison in self.slots[slot].prompt for slot in slots):
            raise RuntimeError("poison")

    def _cost(self, seconds: float) -> None:
        if self.clock is not None:
            self.clock.advance(seconds)

    def _ready(self, slot: _Slot) -> int:
        return max(self.accept) if slot.params.speculation else 0

    @staticmethod
    def _logprobs(slot: _Slot, count: int) -> tuple[TokenLogprob, ...]:
        wanted = slot.params.logprobs
        return () if wanted is None else (TokenLogprob(-1.0, ((FIRST_WORD, -2.0),) * wanted),) * count

    def _next(self, ids: tuple[int, ...], num_prompt: int, params: SamplingParams) -> int:
        if self.reply is None:
            return self.next_token(ids, params)
        done = len(ids) - num_prompt
        return self.reply[done] if done < len(self.reply) else EOS

    def _emit(self, slot: _Slot, kv: list[int]) -> None:
        slot.pending = self._next(tuple(kv), len(slot.prompt), slot.params)
        at_eos = slot.pending in self.eos_ids and not slot.params.ignore_eos
        slot.done = at_eos or len(kv) + 1 >= slot.limit

    def solo(self, prompt_ids: Seq[int], params: SamplingParams, max_tokens: int) -> list[int]:
        """The completion ids of a sequence that runs alone, without speculation; stop strings are not looked at."""
        ids = list(prompt_ids)
        for _ in range(max_tokens):
            ids.append(self._next(tuple(ids), len(prompt_ids), params))
            if ids[-1] in self.eos_ids and not params.ignore_eos:
                break
        return ids[len(prompt_ids) :]


class Collector:
    """A sink that keeps what it gets, by id; safe to wait on from another thread."""

    def __init__(self) -> None:
        self.calls = 0
        self.deltas: dict[str, list[Delta]] = {}
        self._news = threading.Condition()

    def __call__(self, pairs: list[tuple[str, Delta]]) -> None:
        with self._news:
            self.calls += 1
            for id, delta in pairs:
                self.deltas.setdefault(id, []).append(delta)
            self._news.notify_all()

    def text(self, id: str) -> str:
        return "".join(delta.text for delta in self.deltas[id])

    def token_ids(self, id: str) -> list[int]:
        return [i for delta in self.deltas[id] for i in delta.token_ids]

    def last(self, id: str) -> Delta | None:
        """The one last delta, checked to be the only one and at the end; None while there is none."""
        deltas = self.deltas.get(id, [])
        assert not any(delta.is_last for delta in deltas[:-1]), "something came after the last delta"
        return deltas[-1] if deltas and deltas[-1].is_last else None

    def wait(self, ids: Iterable[str], seconds: float = 10.0) -> None:
        """Until each of them has its last delta. Raises TimeoutError."""
        ids = list(ids)
        with self._news:
            if not self._news.wait_for(lambda: all(self.last(id) for id in ids), seconds):
                raise TimeoutError(f"No last delta after {seconds} s.")

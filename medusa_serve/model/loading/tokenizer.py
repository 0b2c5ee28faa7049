"""Between text and token ids."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers.decoders import ByteLevel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ...errors import InvalidRequest, reason_of

TEMPLATE_LIMIT = 1 << 20  # characters that a chat template may make of one short message


class Codec:
    """A TextCodec over a Hugging Face tokenizer. May be called from several threads."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.notes: list[str] = []
        if tokenizer.is_fast:
            # With both off, encoding changes nothing in the Rust tokenizer, so threads need no lock.
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        self._lock: Any = contextlib.nullcontext() if tokenizer.is_fast else threading.Lock()
        self._rust = tokenizer.backend_tokenizer if _decodes_in_rust(tokenizer) else None
        self.has_chat_template = bool(tokenizer.chat_template) and self._template_works()
        self.special_ids = frozenset(tokenizer.all_special_ids)
        self.token_texts: Mapping[int, bytes] | None = None if self._rust is None else byte_pieces(self._rust)
        self._before = self._ids("a", special=False, param="prompt")[-1:]  # a first token may lose its leading space
        self._texts: dict[int, str] = {}  # of single tokens: asked for again and again, on the event loop

    def encode(self, text: str) -> list[int]:
        return self._ids(text, special=True, param="prompt")

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if not self.has_chat_template:
            raise InvalidRequest("This model has no chat template; send `prompt`, not `messages`.", param="messages")
        try:
            text = self._render(messages)
        except Exception as error:  # a template is a program: whatever it raises, these messages are refused
            message = f"The model's chat template refuses these messages ({reason_of(error)})."
            raise InvalidRequest(message, param="messages") from error
        return self._ids(text, special=False, param="messages")  # the template wrote the special tokens itself

    def encode_many(self, prompts: Sequence[str]) -> list[list[int] | None]:
        """Many prompts in one call of the tokenizer, which spreads them over the cores without holding the GIL."""
        texts = [self._user_turn(prompt) for prompt in prompts]
        good = [text for text in texts if text is not None]
        if not good:
            return [None] * len(texts)
        with self._lock:
            special = not self.has_chat_template
            found = self._tokenizer(good, add_special_tokens=special, truncation=False, verbose=False).input_ids
        ids = iter(found)
        return [None if text is None else list(next(ids)) for text in texts]

    def _user_turn(self, prompt: str) -> str | None:
        try:
            prompt.encode()
            return self._render([{"role": "user", "content": prompt}]) if self.has_chat_template else prompt
        except Exception:  # a lone surrogate, or whatever a template raises
            return None

    def decode(self, ids: Sequence[int]) -> str:
        if self._rust is not None:  # several times as fast without the checks around it, and called at every step
            return self._rust.decode(ids, skip_special_tokens=True)
        with self._lock:
            return self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def token_text(self, id: int) -> str:
        if id not in self._texts:
            with self._lock:
                both, before = (
                    self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
                    for ids in ([*self._before, id], self._before)
                )
            self._texts[id] = both.removeprefix(before)
        return self._texts[id]

    def _ids(self, text: str, *, special: bool, param: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest("The text holds a lone surrogate, which is not valid Unicode.", param=param) from error
        with self._lock:
            return list(self._tokenizer(text, add_special_tokens=special, truncation=False, verbose=False).input_ids)

    def _render(self, messages: Sequence[dict[str, str]]) -> str:
        # transformers renders in jinja2's sandbox; no template ever comes from a request
        return self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)

    def _template_works(self) -> bool:
        """A dry run, so that a broken template costs a note at load and not an error for every request."""
        try:
            size = len(self._render([{"role": "user", "content": "Hello"}]))
        except Exception as error:  # see encode_chat
            self.notes.append(
                f"no chat because the model's chat template fails on a plain message ({reason_of(error)})"
            )
            return False
        if size > TEMPLATE_LIMIT:
            self.notes.append(f"no chat because the model's chat template makes {size} characters of one short message")
        return size <= TEMPLATE_LIMIT


class Pieces(dict[int, bytes]):
    """The bytes of each id. Ids beyond the vocabulary have no text."""

    def __missing__(self, id: int) -> bytes:
        return b""


def byte_pieces(rust: Any) -> Pieces | None:
    """The bytes of each id of a Rust tokenizer, without special tokens; None where its decoder does more than join
    bytes."""
    if not isinstance(rust.decoder, ByteLevel):
        return None
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}.__getitem__
    texts = Pieces()
    for token, id in rust.get_vocab(with_added_tokens=True).items():
        try:
            texts[id] = bytes(map(byte_of, token))
        except KeyError:  # an added token may have other characters
            texts[id] = token.encode()
    for id, token in rust.get_added_tokens_decoder().items():
        if token.special:
            texts[id] = b""
    ids = sorted(texts)
    text = b"".join(texts[id] for id in ids).decode("utf-8", "replace")
    return texts if rust.decode(ids, skip_special_tokens=True) == text else None


def _decodes_in_rust(tokenizer: Any) -> bool:
    """Whether its `decode` without clean-up is no more than the Rust tokenizer's."""
    from transformers import PreTrainedTokenizerFast

    names = ("decode", "_decode")
    return tokenizer.is_fast and all(
        getattr(type(tokenizer), name) is getattr(PreTrainedTokenizerFast, name) for name in names
    )

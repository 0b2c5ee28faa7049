"""Token ids to text, a few ids at a time: no broken UTF-8, no lost spaces, stop strings that span steps."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from collections.abc import Sequence as Seq

from ..types import TextCodec

REPLACEMENT = "\ufffd"  # decoders return it for bytes that are not (yet) UTF-8
_UTF8 = codecs.getincrementaldecoder("utf-8")
WINDOW = 8  # ids that are read before the window moves: a move costs one more decode


class Detokenizer:
    """The text of one sequence as it grows.

    Promise: all that `feed` and then `flush` return, joined, is `codec.decode(ids without EOS)`, cut before the first
    stop string. Text is held back only while it can still change: an unfinished character, or the beginning of a stop
    string. (A decoder that rewrites finished characters can break the promise for text that is not valid UTF-8.)
    """

    def __init__(self, codec: TextCodec, stop: Seq[str] = (), eos_ids: frozenset[int] = frozenset()) -> None:
        self._decoded = _Windows(codec) if codec.token_texts is None else _Bytes(codec.token_texts)
        self._stop = tuple(stop)
        self._eos_ids = eos_ids
        self._held = ""  # finished text that may be the beginning of a stop string
        self.stopped = False

    def feed(self, ids: Seq[int]) -> tuple[str, int, bool]:
        """Take the next ids. Returns the text that can no longer change, the number of ids used, and whether a stop
        string ended the text.

        Without a match all ids are used; with one, those up to the id that completes it. EOS ids are used without text.
        After a match further ids are not used.
        """
        if self.stopped:
            return "", 0, True
        if not self._stop:
            kept = ids if self._eos_ids.isdisjoint(ids) else [i for i in ids if i not in self._eos_ids]
            return self._decoded.next(kept), len(ids), False
        text = ""
        for used, token in enumerate(ids, 1):  # one by one: the match must not depend on which ids came in one step
            if token not in self._eos_ids:
                text += self._release(self._decoded.next((token,)))
            if self.stopped:
                return text, used, True
        return text, len(ids), False

    def flush(self) -> str:
        """The text that is still held back, with U+FFFD for an unfinished character. No `feed` may follow."""
        if self.stopped:
            return ""
        text = self._release(self._decoded.rest())
        text += self._held  # empty when the last characters completed a stop string
        self._held, self.stopped = "", True
        return text

    def _release(self, new: str) -> str:
        """Cut the text at the first stop string; otherwise hold back an end that may begin one."""
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class _Bytes:
    """For tokenizers where an id always gives the same bytes: takes a third of the time of _Windows."""

    def __init__(self, token_bytes: Mapping[int, bytes]) -> None:
        self._bytes_of, self._decoder = token_bytes.__getitem__, _UTF8("replace")

    def next(self, ids: Seq[int]) -> str:
        """The text that can no longer change with these ids."""
        data = b"".join(map(self._bytes_of, ids))
        if self._decoder.buffer:
            return self._decoder.decode(data)
        try:
            return data.decode()  # whole characters, the usual case: a third of the time
        except UnicodeDecodeError:
            return self._decoder.decode(data)

    def rest(self) -> str:
        """The rest of the text as it is. Nothing may follow."""
        return self._decoder.decode(b"", final=True)


class _Windows:
    """The same for any tokenizer. A step decodes a window of about 2 WINDOW ids, however long the text is.

    ids     0 ……………… prefix ………… read ………… len(ids)
            shown already │ shown, context │ new
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._ids: list[int] = []
        # The window begins here: the leading space that its first id loses is lost in both texts that are compared.
        self._prefix = 0
        self._read = 0
        self._shown = 0  # characters of decode(ids[prefix:]) that were returned already

    def next(self, ids: Seq[int]) -> str:
        """A long window moves when it ends with a whole character."""
        self._ids.extend(ids)
        text = self._codec.decode(self._ids[self._prefix :])
        certain = text.rstrip(REPLACEMENT)
        new = certain[self._shown :]
        if new and len(certain) == len(text) and len(self._ids) - self._read >= WINDOW:
            # Only after visible text: after an id without text the next id would lose its space.
            self._prefix, self._read = self._read, len(self._ids)
            self._shown = len(self._codec.decode(self._ids[self._prefix : self._read]))
        else:
            self._shown = max(self._shown, len(certain))
        return new

    def rest(self) -> str:
        return self._codec.decode(self._ids[self._prefix :])[self._shown :]


class Silent:
    """A Detokenizer for an engine on ids only: no text."""

    def feed(self, ids: Seq[int]) -> tuple[str, int, bool]:
        return "", len(ids), False

    def flush(self) -> str:
        return ""


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

"""Token ids to text, a few ids at a time: no broken UTF-8, no lost spaces, stop strings across steps."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from collections.abc import Sequence as Seq

from ..types import TextCodec

REPLACEMENT = "\ufffd"  # what decoders give for bytes that are not (yet) UTF-8
_UTF8 = codecs.getincrementaldecoder("utf-8")
WINDOW = 8  # ids that are read before the window moves on: a move costs a decode of its own


class Detokenizer:
    """The text of one sequence as it grows.

    Promise: everything `feed` returned, then `flush`, concatenates to `codec.decode(ids without EOS)`, cut before the
    first stop string. Text is held back only while it could still change: the end of an unfinished character, or the
    beginning of a stop string. (A decoder that rewrites characters it already completed can break the promise for
    text that is not valid UTF-8.)
    """

    def __init__(self, codec: TextCodec, stop: Seq[str] = (), eos_ids: frozenset[int] = frozenset()) -> None:
        self._decoded = _Windows(codec) if codec.pieces is None else _Bytes(codec.pieces)
        self._stop = tuple(stop)
        self._eos_ids = eos_ids
        self._held = ""  # certain, but may be the beginning of a stop string
        self.stopped = False

    def feed(self, ids: Seq[int]) -> tuple[str, int, bool]:
        """Take the next ids. Returns the text that is now certain, how many ids were used, and whether a stop string
        ended it.

        Without a match all ids are used; with one, those up to the id that completes it. EOS ids are used without text.
        After a match further ids are not used.
        """
        if self.stopped:
            return "", 0, True
        if not self._stop:
            kept = ids if self._eos_ids.isdisjoint(ids) else [i for i in ids if i not in self._eos_ids]
            return self._decoded.next(kept), len(ids), False
        text = ""
        for used, token in enumerate(ids, 1):  # one by one: the match must not depend on how ids came in steps
            if token not in self._eos_ids:
                text += self._release(self._decoded.next((token,)))
            if self.stopped:
                return text, used, True
        return text, len(ids), False

    def flush(self) -> str:
        """The text still held back, an unfinished character as U+FFFD. Nothing may be fed afterwards."""
        if self.stopped:
            return ""
        text = self._release(self._decoded.rest())
        text += self._held  # empty when the last characters completed a stop string
        self._held, self.stopped = "", True
        return text

    def _release(self, new: str) -> str:
        """Pass text through the stop strings: cut at the earliest match, else hold back what may begin one."""
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class _Bytes:
    """Where each id is some bytes, whatever is beside it: a third of what windows take."""

    def __init__(self, pieces: Mapping[int, bytes]) -> None:
        self._piece, self._decoder = pieces.__getitem__, _UTF8("replace")

    def next(self, ids: Seq[int]) -> str:
        """The text that these make certain."""
        data = b"".join(map(self._piece, ids))
        if self._decoder.buffer:
            return self._decoder.decode(data)
        try:
            return data.decode()  # whole characters as a rule: a third of the time
        except UnicodeDecodeError:
            return self._decoder.decode(data)

    def rest(self) -> str:
        """What is not certain yet, as it is; then nothing may follow."""
        return self._decoder.decode(b"", final=True)


class _Windows:
    """The same of any decoder. Cost of a step: a decode of a window of some 2 WINDOW ids, however long the text is.

    ids     0 ……………… prefix ………… read ………… len(ids)
            shown already │ shown, context │ new
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._ids: list[int] = []
        self._prefix = 0  # the window begins here, so that its first id's lost leading space is lost on both sides
        self._read = 0
        self._shown = 0  # characters of decode(ids[prefix:]) that were taken out of the window

    def next(self, ids: Seq[int]) -> str:
        """A window that is long moves on when it ends in a whole character."""
        self._ids.extend(ids)
        text = self._codec.decode(self._ids[self._prefix :])
        certain = text.rstrip(REPLACEMENT)
        new = certain[self._shown :]
        if new and len(certain) == len(text) and len(self._ids) - self._read >= WINDOW:
            # Only past visible text: an id that shows nothing gives the next one no context to keep its space.
            self._prefix, self._read = self._read, len(self._ids)
            self._shown = len(self._codec.decode(self._ids[self._prefix : self._read]))
        else:
            self._shown = max(self._shown, len(certain))
        return new

    def rest(self) -> str:
        return self._codec.decode(self._ids[self._prefix :])[self._shown :]


class Silent:
    """A Detokenizer where nobody reads the text."""

    def feed(self, ids: Seq[int]) -> tuple[str, int, bool]:
        return "", len(ids), False

    def flush(self) -> str:
        return ""


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

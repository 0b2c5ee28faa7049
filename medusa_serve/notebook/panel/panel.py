"""The prompt panel: core widgets that ipywidgets 7.7 and 8.1 both have, and one HTML widget for the text.

A thread makes the answer, so that Stop works. Colab does not show what a thread changes in a widget
(googlecolab/colabtools#3373): there the button's own call makes the answer, and the kernel's Interrupt stops it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator
from html import escape
from typing import Any, Protocol

from ...errors import InvalidRequest, MedusaServeError
from ...types import Completion, Delta, SamplingParams
from .. import env, summary
from ..comparison import Comparison
from .controls import Controls
from .conversation import Conversation, Messages
from .run_colours import legend, transcript

log = logging.getLogger(__name__)

EVERY_S = 0.1  # between two updates of the text, at least: each sends all of it to the browser
STOP_S = 10.0


class ServedModel(Protocol):
    """What the panel needs of the notebook's server."""

    has_chat_template: bool

    @property
    def warning(self) -> str | None: ...
    def describe(self) -> dict[str, Any]: ...
    def count_tokens(self, messages: Messages) -> int: ...
    def compare(self, prompt: str | Messages, *, raw: bool, **sampling: Any) -> Comparison: ...
    def follow(
        self, prompt: str | Messages, params: SamplingParams, until: threading.Event
    ) -> Generator[Delta, None, None]: ...


class Panel:
    """`widget` is what a cell shows. blocking: answer inside the button's call; None: where the platform needs it"""

    def __init__(self, server: ServedModel, *, blocking: bool | None = None) -> None:
        self._server = server
        self._blocking = env.place() == "colab" if blocking is None else blocking
        self._conversation = Conversation()
        self._stop = threading.Event()
        self._worker: threading.Thread | None = None
        self._controls = controls = Controls(server.describe()["max_context"], legend())
        self.widget = controls.widget
        for button, action in (
            (controls.send, self.send),
            (controls.stop, self.stop),
            (controls.regenerate, self.regenerate),
            (controls.clear, self.clear),
            (controls.compare, self.compare),
        ):
            button.on_click(lambda _, action=action: action())
        if self._blocking:
            controls.say("To stop an answer here, interrupt the kernel (Runtime, Interrupt execution).")
        self._show()

    # ---- buttons -----------------------------------------------------------------------------------------------------

    def send(self) -> None:
        text = self._controls.prompt.value.strip()
        if not text:
            self._controls.say("Write a prompt first.")
        elif not self._controls.busy:
            self._controls.prompt.value = ""
            self._conversation.ask(text)
            self._work(self._answer)

    def regenerate(self) -> None:
        """Answer the last question again; the text is the same at temperature 0, or with a seed."""
        if not self._controls.busy and self._conversation.take_back_answer():
            self._work(self._answer)

    def compare(self) -> None:
        """The last question again with speculation and without."""
        if not self._conversation.turns:
            self._controls.say("Send a prompt first.")
        elif not self._controls.busy:
            self._work(self._compare)

    def stop(self) -> None:
        self._stop.set()

    def clear(self) -> None:
        if not self._controls.busy:
            self._conversation.clear()
            self._controls.live.value = ""
            self._controls.say("")
            self._show()

    def close(self) -> None:
        """End the answer that runs, and close the widgets, which ipywidgets would keep."""
        self._stop.set()
        worker = self._worker
        if worker is not None and worker is not threading.current_thread():
            worker.join(STOP_S)
        self._controls.close()

    # ---- work --------------------------------------------------------------------------------------------------------

    def _work(self, job: Callable[[], None]) -> None:
        self._stop.clear()
        self._controls.set_busy(True, can_stop=not self._blocking)
        self._controls.say("")
        if self._blocking:
            self._guarded(job)
        else:
            self._worker = threading.Thread(target=self._guarded, args=(job,), name="medusa-panel", daemon=True)
            self._worker.start()

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            self._tried(job)
        finally:
            self._controls.set_busy(False)
            self._tried(self._show)

    def _tried(self, job: Callable[[], None]) -> None:
        """Errors are shown in the panel, as nobody catches those of a button's call."""
        try:
            job()
        except KeyboardInterrupt:
            self._controls.say("Interrupted.")
        except MedusaServeError as error:
            self._controls.say(error.message)
        except Exception as error:
            log.exception("The panel failed.")
            self._controls.say(f"This failed ({type(error).__name__}); server.logs() says more.")

    def _answer(self) -> None:
        params = SamplingParams(speculation=self._controls.speculation.value, **self._sampling())
        self._make_room(params)
        prompt = self._prompt()
        turn, live = self._conversation.begin_answer(), AnswerFigures()
        shown, stream = 0.0, self._server.follow(prompt, params, self._stop)
        try:
            for delta in stream:
                turn.add(delta)
                live.add(delta)
                if time.monotonic() - shown >= EVERY_S:
                    shown = time.monotonic()
                    self._show(live)
        finally:
            stream.close()  # so that an interrupt ends the sequence too
            turn.stopped = live.completion is None
            self._show(live)
        if self._server.warning:
            self._controls.say(self._server.warning)

    def _compare(self) -> None:
        last = self._conversation.turns[-1]
        if last.role == "assistant":  # its question is what both runs answer
            self._conversation.turns.pop()
        try:
            self._controls.say("comparing: plain decoding first …")
            found = self._server.compare(self._prompt(), raw=True, **self._sampling())
        finally:
            if last.role == "assistant":
                self._conversation.turns.append(last)
        self._controls.say(f"with and without speculation, seed {found.plain.seed}: {found}")

    def _sampling(self) -> dict[str, Any]:
        controls, text = self._controls, self._controls.seed.value.strip()
        if text and not text.isdigit():
            raise InvalidRequest("The seed is a whole number, or empty for another one each time.", param="seed")
        return {
            "max_tokens": controls.max_tokens.value,
            "temperature": controls.temperature.value,
            "top_p": controls.top_p.value,
            "seed": int(text) if text else None,
        }

    def _make_room(self, params: SamplingParams) -> None:
        context = self._server.describe()["max_context"]
        system = self._controls.system.value.strip()
        self._conversation.fit(self._server.count_tokens, context - (params.max_tokens or 0), system)

    def _prompt(self) -> str | Messages:
        """Messages, or the plain text so far for a model without a chat template."""
        if self._server.has_chat_template:
            return self._conversation.messages(self._controls.system.value.strip())
        return "".join(turn.text for turn in self._conversation.turns)

    def _show(self, live: AnswerFigures | None = None) -> None:
        self._controls.show(transcript(self._conversation.turns, self._conversation.dropped))
        if live is not None:
            self._controls.live.value = escape(live.line())


class AnswerFigures:
    """The figures of an answer while it comes."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._first: float | None = None
        self._last = 0.0
        self._tokens = self._steps = 0
        self.completion: Completion | None = None

    def add(self, delta: Delta) -> None:
        self._last = time.monotonic()
        if self._first is None and delta.tokens:
            self._first, self._steps = self._last, -1  # the first token is prefill's
        self._tokens += sum(delta.tokens)
        self._steps += len(delta.tokens)
        self.completion = delta.completion or self.completion

    def line(self) -> str:
        from ...model.loading.gpu_facts import memory

        if self._first is None:
            return "…"
        parts = [f"{self._tokens} tokens"]
        if self._steps > 0:
            parts.append(f"{(self._tokens - 1) / self._steps:.2f} per step")
        if self._last > self._first:
            parts.append(f"{(self._tokens - 1) / (self._last - self._first):.1f} tokens/s")
        parts.append(f"first token after {self._first - self._began:.2f} s")
        held = memory()
        parts.append(f"{held['kind']} {held['used'] / 2**30:.1f} of {summary.gibibytes(held['total'])}")
        if self.completion is not None:
            parts.append(f"seed {self.completion.seed}")
        return " · ".join(parts)

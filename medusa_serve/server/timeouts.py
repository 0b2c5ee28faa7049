"""How long a request may take, whatever the engine does: each ends in time, and a silent stream gets comments."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..engine.batch_manager import BatchManager
from ..errors import EngineDead, EngineStalled, GenerationTimeout, MedusaServeError, QueueTimeout
from .config import ServerConfig

LOOK_S = 0.25  # the open requests are looked at this often
COMMENT = b": waiting\n\n"  # by the SSE standard a line that begins with a colon is ignored


class Watched(Protocol):
    """An open request. began: in the loop's time · answered: its first token has come"""

    @property
    def id(self) -> str: ...
    @property
    def began(self) -> float: ...
    @property
    def answered(self) -> bool: ...

    def dismiss(self, error: MedusaServeError) -> None: ...


class Watch:
    """Ends the open requests of one app that take too long, and all of them when the engine hangs or is gone."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._task: asyncio.Task[None] | None = None

    def begin(self, sequences: Callable[[], Sequence[Watched]], manager: BatchManager) -> None:
        """Look at `sequences()` until there are none; called whenever there is a new one. Within a running loop."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run(sequences, manager), name="medusa-watch")

    async def _run(self, sequences: Callable[[], Sequence[Watched]], manager: BatchManager) -> None:
        loop = asyncio.get_running_loop()
        while still := sequences():
            self.look(still, manager, loop.time())
            await asyncio.sleep(LOOK_S)

    def look(self, sequences: Iterable[Watched], manager: BatchManager, now: float) -> None:
        status = manager.status()
        for sequence in sequences:
            if status.state == "stalled":
                sequence.dismiss(EngineStalled("The engine hangs; its requests are ended."))
            elif status.state == "failed":  # it has ended its sequences, unless its thread died
                sequence.dismiss(EngineDead(status.message or "The engine is gone."))
            elif (late := self._late(sequence, manager, now - sequence.began)) is not None:
                sequence.dismiss(late)

    def _late(self, sequence: Watched, manager: BatchManager, age: float) -> MedusaServeError | None:
        config = self._config
        if age > config.total_s:
            return GenerationTimeout(f"The answer was not finished within {config.total_s:g} s.")
        if sequence.answered:
            return None
        if age > config.first_token_s:
            return GenerationTimeout(f"The first token did not come within {config.first_token_s:g} s.")
        if age > config.queue_s and manager.is_waiting(sequence.id):
            return QueueTimeout(f"No slot came free within {config.queue_s:g} s.")
        return None


class Heartbeat:
    """ASGI middleware: a server-sent stream that is silent for `seconds` gets a comment, as tunnels and proxies cut
    silent connections."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self.app, self.seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        loop, beat = asyncio.get_running_loop(), None
        last = loop.time()

        async def beating() -> None:
            nonlocal last
            while True:
                await asyncio.sleep(max(0.0, last + self.seconds - loop.time()))
                if loop.time() - last >= self.seconds:
                    last = loop.time()
                    await send({"type": "http.response.body", "body": COMMENT, "more_body": True})

        async def watched(message: Message) -> None:
            nonlocal last, beat
            ends = message["type"] == "http.response.body" and not message.get("more_body", False)
            if ends and beat is not None:
                beat.cancel()
            await send(message)
            last = loop.time()
            if message["type"] == "http.response.start" and _is_stream(message):
                beat = asyncio.ensure_future(beating())

        try:
            await self.app(scope, receive, watched)
        finally:
            if beat is not None:
                beat.cancel()
                await asyncio.gather(beat, return_exceptions=True)


def _is_stream(start: Message) -> bool:
    return any(k.lower() == b"content-type" and v.startswith(b"text/event-stream") for k, v in start["headers"])

"""The handle of a server in a notebook. It never shows the model to IPython, which would keep it in memory."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import secrets
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..config import EngineConfig
from ..errors import InvalidRequest, LoadError, MedusaServeError, ShuttingDown, TunnelError
from ..server.config import ServerConfig
from ..server.listen import CLOSE_S
from ..types import Completion, Delta, SamplingParams
from . import colab, env, summary
from .background import Background, listen
from .comparison import Comparison, compare
from .logs import RingLog
from .together import Batching, one_and_many
from .tunnel.quota import Quota

if TYPE_CHECKING:
    from ..llm import LLM, Prompt
    from .panel.panel import Panel
    from .tunnel.tunnel import Tunnel

STOP_S = CLOSE_S + 12.0  # after the drain: for the sockets, and for a step that hangs


@dataclass(frozen=True)
class LaunchOptions:
    """What `launch` was asked for. The same options again need no new server."""

    engine: EngineConfig
    server: ServerConfig
    any_port: bool


class Server:
    """A served model: `url`, `public_url`, `api_key` are where and how to reach it. Made by `launch`."""

    def __init__(self, asked: LaunchOptions, *, needs_key: bool = False) -> None:
        """Loads and listens before it returns. Raises InvalidConfig, LoadError, and leaves nothing then."""
        from ..llm import LLM

        self.asked, self.name = asked, asked.engine.model
        config = asked.server
        if config.api_key is None and (needs_key or not config.is_loopback):
            config = replace(config, api_key=secrets.token_urlsafe(32))
        sock = listen(config, any_port=asked.any_port)
        self._lock = threading.RLock()
        self._tunnel: Tunnel | None = None
        self._quota: Quota | None = None
        self._panel: Panel | None = None
        self._stopped = False
        self._log = RingLog()
        self._log.attach()
        print(f"loading {self.name} …", flush=True)
        began = time.monotonic()
        self._background = Background(lambda: LLM(asked.engine), config, sock, self)
        for name in colab.HOSTS if env.place() == "colab" else ():
            self._background.web.allow_host(name)
        self._background.start()
        atexit.register(self.stop)
        try:
            llm = self._background.wait_until_ready()
        except BaseException as error:
            self._end()
            if isinstance(error, KeyboardInterrupt):
                raise LoadError("Loading was interrupted; run the cell again.") from None
            if isinstance(error, LoadError):
                raise LoadError(error.message + env.advice()) from None
            raise
        self.has_chat_template = llm.codec.has_chat_template
        self.name = llm.model_name
        print(summary.chosen(llm, time.monotonic() - began), flush=True)

    # ---- where it is -------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """On this machine."""
        return self._background.url

    @property
    def _port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def public_url(self) -> str | None:
        """The tunnel's address, while there is one."""
        return self._tunnel.url if self._tunnel is not None else None

    @property
    def warning(self) -> str | None:
        """A sentence once the tunnel has used most of what ngrok's free plan allows in a month."""
        return self._quota.warning if self._quota is not None else None

    @property
    def api_key(self) -> str | None:
        """Sent as `Authorization: Bearer …`; None where no key is needed."""
        return self._background.web.api_key

    @property
    def is_alive(self) -> bool:
        """Whether it serves, or will again without help."""
        return self.trouble is None

    @property
    def trouble(self) -> str | None:
        """Why it has to be replaced, such as a failed engine or a step that hangs; None while it is alive."""
        try:
            status = self._llm().manager.status()
        except MedusaServeError as error:
            return error.message
        if not self._background.is_alive():
            return "The web server has ended."
        return None if status.serves else status.message or f"The engine is {status.state}."

    def snippets(self) -> str:
        """Lines to copy that get an answer: curl, and the openai client."""
        return summary.snippets(self.public_url or self.url, self.api_key, self.name, self.has_chat_template)

    def __repr__(self) -> str:
        if self._stopped:
            return f"<medusa_serve {self.name}, stopped>"
        where = f"{self.url}, public at {self.public_url}" if self.public_url else self.url
        methods = ".panel() .open_tunnel() .generate(…) .stream(…) .generate_many(…) .logs() .stats() .stop()"
        return f"<medusa_serve {self.name} at {where}>\n{self.snippets()}\n\n{methods}"

    # ---- text --------------------------------------------------------------------------------------------------------

    def generate(self, prompt: Prompt, *, system: str | None = None, raw: bool = False, **sampling: Any) -> Completion:
        """The answer to a prompt or a list of messages. With a chat template a prompt is one user's message, unless
        `raw` asks for its continuation. sampling: SamplingParams' fields. Raises InvalidRequest."""
        return self._llm().generate([self._source(prompt, system, raw)], _params(sampling))[0]

    def stream(
        self, prompt: Prompt, *, system: str | None = None, raw: bool = False, **sampling: Any
    ) -> Generator[Delta, None, None]:
        """The same in parts: each Delta has `text`, the last one the completion. Leaving the loop cancels."""
        return self._llm().stream(self._source(prompt, system, raw), _params(sampling))

    def follow(self, prompt: Prompt, params: SamplingParams, until: threading.Event) -> Generator[Delta, None, None]:
        """For the panel: the Deltas, until `until` is set."""
        return self._llm().stream(prompt, params, until=until)

    def generate_many(
        self, prompts: Sequence[Prompt], *, system: str | None = None, raw: bool = False, **sampling: Any
    ) -> list[Completion]:
        """All at once, in shared passes; in the order of the prompts."""
        sources = [self._source(prompt, system, raw) for prompt in prompts]
        return self._llm().generate(sources, _params(sampling))

    def compare(self, prompt: Prompt, *, system: str | None = None, raw: bool = False, **sampling: Any) -> Comparison:
        """The same prompt with speculation and without, with the same seed: is the text the same, how much sooner?"""
        return compare(self._llm(), self._source(prompt, system, raw), _params(sampling))

    async def generate_async(self, prompt: Prompt, **options: Any) -> Completion:
        """Like generate, for `await` and asyncio.gather: the loop goes on meanwhile. Cancelling ends the sequence."""
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[Delta] = asyncio.Queue()
        llm = self._llm()
        source = self._source(prompt, options.pop("system", None), options.pop("raw", False))

        def sink(news: list[tuple[str, Delta]]) -> None:
            for _, delta in news:
                loop.call_soon_threadsafe(deltas.put_nowait, delta)

        sequence = llm.submit(source, _params(options), sink)
        try:
            while not (delta := await deltas.get()).is_last:
                pass
        except BaseException:
            llm.manager.cancel(sequence)
            raise
        if delta.error is not None:
            raise delta.error
        assert delta.completion is not None  # a last delta has one or the other
        return delta.completion

    async def one_and_many(self, prompts: Sequence[str], *, max_tokens: int) -> Batching:
        """The first prompt alone, then all at once: tokens per second of both."""
        generate = partial(self.generate_async, max_tokens=max_tokens)
        return await one_and_many(generate, prompts, self.describe()["slots"])

    def count_tokens(self, messages: Sequence[dict[str, str]]) -> int:
        """Of a prompt made of these messages, with the tokens of the chat template."""
        codec = self._llm().codec
        if not codec.has_chat_template:
            return len(codec.encode("\n".join(message["content"] for message in messages)))
        return len(codec.encode_chat(list(messages)))

    def _source(self, prompt: Prompt, system: str | None, raw: bool) -> Prompt:
        if not isinstance(prompt, str):
            return list(prompt)
        if raw or not self.has_chat_template:
            if system:
                raise InvalidRequest("A system message needs a chat template.", param="system")
            return prompt
        return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": prompt}]

    # ---- what it does ------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """As plain data: model, heads, device, dtype, slots, max_context, nodes."""
        return self._llm().describe()

    def stats(self) -> dict[str, Any]:
        """Counters since the start, tokens per step, and memory."""
        from ..model.loading.gpu_facts import memory

        counted = self._llm().manager.metrics.snapshot()
        steps = counted["steps"]
        per_step = round((steps + counted["accepted"]) / steps, 3) if steps else None
        return {**counted, "tokens_per_step": per_step, "memory": memory()}

    def logs(self, lines: int = 50) -> str:
        """The last lines that the server wrote."""
        return self._log.text(lines)

    # ---- panel, tunnel, end ------------------------------------------------------------------------------------------

    def panel(self) -> Any:
        """The panel's widget, the same one each time."""
        from .panel.panel import Panel

        with self._lock:
            if self._panel is None:
                self._panel = Panel(self)
            return self._panel.widget

    def show(self) -> None:
        """Show the panel here."""
        from IPython.display import display

        display(self.panel())

    def show_page(self, height: int = 640) -> None:
        """The server's own chat page below the cell. It does not use the kernel, so it also works while a cell runs. In
        Colab it comes through the port proxy, which also gives an address for a tab; elsewhere the browser must run on
        this machine."""
        platform = env.place()
        if platform == "colab":
            colab.show_page(self._port, key=self.api_key, height=height)
            try:
                print(f"in a tab, for you alone: {colab.proxy_url(self._port).rstrip('/')}{colab.page(self.api_key)}")
            except TunnelError as error:
                print(error.message)
        elif platform == "kaggle":
            print("Kaggle has no way to a port: use the panel, or server.open_tunnel().")
        elif env.in_kernel():
            from IPython.display import IFrame, display

            display(IFrame(self.url + colab.page(self.api_key), "100%", height))
        else:
            print(f"open {self.url} in a browser")

    def open_tunnel(self, *, token: str | None = None, domain: str | None = None) -> str:
        """A public https address of this server, through ngrok; a second call returns the same one. Forces a key.
        Raises TunnelError, and then needs a key only if it did before."""
        from ..model.loading.default_model import cache_folder
        from .tunnel.tunnel import Tunnel

        with self._lock:
            if self._tunnel is None:
                web = self._background.web
                had_key = web.api_key is not None
                web.require_key()
                try:
                    self._quota = self._quota or Quota(cache_folder(), web.traffic)
                    hooks: Any = {"on_url": web.allow_host, "on_check": self._quota.note}
                    self._tunnel = Tunnel(self._port, token=token, domain=domain, **hooks)
                except BaseException:
                    if not had_key:
                        web.release_key()
                    raise
                self._quota.note()
                print("\n".join(filter(None, (f"public at {self._tunnel.url}", self._tunnel.notice, self.warning))))
            return str(self._tunnel.url)

    def close_tunnel(self) -> None:
        with self._lock:
            tunnel, self._tunnel = self._tunnel, None
        if tunnel is not None:
            tunnel.close()

    def stop(self) -> None:
        """End the tunnel, open requests, the socket and the engine, then free the memory. May be called twice."""
        from ..model.loading.gpu_facts import free_bytes

        with self._lock:
            if self._stopped:
                return
            before = free_bytes()
            in_time = self._end()
            after = free_bytes()
        freed = f"; {summary.gibibytes(after - before)} of GPU memory are free again" if before and after else ""
        late = "" if in_time else " (a step hangs; its thread ends when that does)"
        print(f"stopped {self.name}{freed}{late}")

    def _end(self) -> bool:
        """→ Whether the web server's thread ended in time."""
        from ..model.loading.gpu_facts import release

        atexit.unregister(self.stop)
        self.close_tunnel()
        with contextlib.suppress(MedusaServeError):  # no model was loaded
            self._llm().manager.drain(self.asked.server.drain_s)
        self._stopped = True
        ended = self._background.stop(self.asked.server.drain_s + STOP_S)
        if self._panel is not None:
            self._panel.close()
        self._background.owner = None
        self._log.detach()
        release()
        return ended

    def _llm(self) -> LLM:
        if self._stopped:
            raise ShuttingDown("This server was stopped; run launch() again.")
        return self._background.source.get()


def _params(sampling: dict[str, Any]) -> SamplingParams:
    unknown = sorted(set(sampling) - set(SamplingParams.__dataclass_fields__))
    if unknown:
        raise InvalidRequest(f"Unknown option {unknown[0]!r}.", param=unknown[0])
    return SamplingParams(**sampling)

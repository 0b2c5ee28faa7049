"""A model that loads in a thread while the server already answers /health."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

from ..errors import LoadError, MedusaServeError, ModelLoading, ShuttingDown
from ..types import TextCodec

if TYPE_CHECKING:
    from ..engine.batch_manager import BatchManager

log = logging.getLogger(__name__)


class ServedLLM(Protocol):
    """What the server needs of an LLM."""

    @property
    def model_name(self) -> str: ...
    @property
    def codec(self) -> TextCodec: ...
    @property
    def manager(self) -> BatchManager: ...

    def describe(self) -> dict[str, Any]:
        """What /health shows: model, heads, dtype, device, slots, max_context …"""

    def close(self) -> None: ...


Model = TypeVar("Model", bound=ServedLLM, covariant=True)


class BackgroundLoad(Generic[Model]):
    """Runs `factory` in a daemon thread at once; `get` says what came of it."""

    def __init__(self, factory: Callable[[], Model]) -> None:
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._llm: Model | None = None
        self._failure: tuple[type[MedusaServeError], str] | None = None  # not the exception: it would hold the weights
        self._closed = False
        threading.Thread(target=self._load, args=(factory,), name="medusa-load", daemon=True).start()

    @property
    def state(self) -> Literal["loading", "ready", "failed", "closed"]:
        with self._lock:
            if self._closed:
                return "closed"
            if self._failure is not None:
                return "failed"
            return "loading" if self._llm is None else "ready"

    def get(self) -> Model:
        """The loaded model. Raises ModelLoading, what the factory raised (LoadError and kin), or ShuttingDown."""
        with self._lock:
            if self._closed:
                raise ShuttingDown("The server is shutting down.")
            if self._failure is not None:
                kind, message = self._failure
                raise kind(message)
            if self._llm is None:
                raise ModelLoading("The model is still loading; try again in a few seconds.")
            return self._llm

    def wait(self, timeout: float | None = None) -> bool:
        """Until loading has ended, well or not; False after `timeout` seconds."""
        return self._done.wait(timeout)

    def close(self) -> None:
        """Close the model, or have it closed the moment it is loaded. May be called twice."""
        with self._lock:
            llm, self._llm, self._closed = self._llm, None, True
        if llm is not None:
            llm.close()

    def _load(self, factory: Callable[[], Model]) -> None:
        llm, failure = None, None
        try:
            llm = factory()
        except MedusaServeError as error:
            failure = (type(error), error.message)  # `get` raises it
        except BaseException as error:  # SystemExit too: in a thread it would be lost
            log.exception("Loading the model failed.")
            failure = (LoadError, f"The model could not be loaded: {type(error).__name__}: {error}.")
        with self._lock:
            self._failure = failure
            if not self._closed:
                self._llm, llm = llm, None
        self._done.set()
        if llm is not None:  # closed meanwhile
            llm.close()


def loaded(source: ServedLLM | BackgroundLoad) -> ServedLLM:
    """The model of either kind of source; raises as BackgroundLoad.get does."""
    return source.get() if isinstance(source, BackgroundLoad) else source

"""Every error the package raises on purpose, with what HTTP says of it.

MedusaServeError
├── InvalidRequest        400  the request is wrong; `param` names the field
│   ├── ContextTooLong    400  the prompt (and max_tokens) do not fit the context
│   └── Unsupported       400  a field we know and do not offer
├── InvalidConfig         400  a nonsense option of ours (the CLI's one-line error)
├── QueueFull             429  too many sequences wait
├── Unavailable           503  not now
│   ├── ModelLoading      503
│   ├── ShuttingDown      503
│   ├── QueueTimeout      503  no slot came free in time
│   ├── EngineStalled     503  a step hangs
│   ├── EngineRestarting  503  the engine met an error and starts again
│   ├── OutOfMemory       503  too little device memory for this sequence, also when it runs alone
│   └── EngineDead        503  the engine is gone; waiting does not help
├── GenerationTimeout     504  the answer took too long
├── GenerationFailed      500  this one sequence made the model fail
├── LoadError             500  a model, heads or tree file cannot be loaded; the text says what to do
└── TunnelError           500  no public address; the text says what to do
"""

from __future__ import annotations


class MedusaServeError(Exception):
    """Base class. `message` is one or two sentences fit for a person; it never echoes the prompt."""

    status = 500
    type = "server_error"
    code: str | None = None
    retry_after: int | None = None  # seconds, for the Retry-After header

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def _render_traceback_(self) -> list[str]:
        """IPython's hook: in a cell the sentence is all that shows."""
        return [f"{type(self).__name__}: {self.message}"]

    def to_dict(self) -> dict[str, dict[str, str | None]]:
        """The one error shape of every endpoint."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(MedusaServeError, ValueError):
    status, type, code = 400, "invalid_request_error", "invalid_value"


class ContextTooLong(InvalidRequest):
    code = "context_length_exceeded"


class Unsupported(InvalidRequest):
    code = "unsupported_parameter"


class InvalidConfig(MedusaServeError, ValueError):
    status, type, code = 400, "invalid_request_error", "invalid_config"


class QueueFull(MedusaServeError):
    status, type, code, retry_after = 429, "rate_limit_error", "queue_full", 1


class Unavailable(MedusaServeError):
    status, type, code = 503, "service_unavailable_error", "unavailable"
    retry_after: int | None = 5


class ModelLoading(Unavailable):
    code = "model_loading"


class ShuttingDown(Unavailable):
    code = "shutting_down"


class QueueTimeout(Unavailable):
    code = "queue_timeout"


class EngineStalled(Unavailable):
    code = "engine_stalled"
    retry_after = 30


class EngineRestarting(Unavailable):
    code = "engine_restarting"


class OutOfMemory(Unavailable):
    code = "out_of_memory"


class EngineDead(Unavailable):
    code = "engine_dead"
    retry_after = None


class GenerationTimeout(MedusaServeError):
    status, type, code = 504, "timeout_error", "generation_timeout"


class GenerationFailed(MedusaServeError):
    status, type, code = 500, "server_error", "generation_failed"


class LoadError(MedusaServeError):
    status, type, code = 500, "server_error", "load_failed"


class TunnelError(MedusaServeError):
    """ngrok: its number of the error (ERR_NGROK_334: 334), where there is one."""

    status, type, code = 500, "server_error", "tunnel_failed"

    def __init__(self, message: str, *, ngrok: int | None = None) -> None:
        super().__init__(message)
        self.ngrok = ngrok


def reason_of(error: BaseException) -> str:
    """The text of an error of another package, in one line that fits into a sentence."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")


class CaptureFailed(RuntimeError):
    """Something else in this process kept the pass from being captured; the device is well."""

"""medusa_serve: an LLM server for notebooks that emits several tokens per pass of the model.

The public names are loaded on first use, so that importing the package costs nothing (no torch).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "launch": ".notebook.launch",
    "allow_nested_loop": ".notebook.nested_loop",
    "LLM": ".llm",
    "SamplingParams": ".types",
    "Completion": ".types",
    "Delta": ".types",
    "EngineConfig": ".config",
    "ServerConfig": ".server.config",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

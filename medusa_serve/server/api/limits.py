"""The limits in force, as plain data for /info."""

from __future__ import annotations

from typing import Any

from ...types import MAX_STOP_CHARS, MAX_STOPS
from ..background_load import ServedLLM
from ..config import ServerConfig
from .schemas import MAX_MESSAGES

CHARS_PER_TOKEN = 8  # more characters than this per token of context cannot fit: refused before the tokenizer sees them
UNSAID = frozenset({"host", "port", "api_key", "guest_keys", "allowed_hosts", "access_log"})


def limits_of(config: ServerConfig, llm: ServedLLM) -> dict[str, Any]:
    """Every limit by name: ServerConfig's, and those of prompts and of the engine. No secrets."""
    context = llm.describe()["max_context"]
    return {
        **{name: getattr(config, name) for name in config.__dataclass_fields__ if name not in UNSAID},
        "max_context": context,
        "max_prompt_chars": CHARS_PER_TOKEN * context,
        "max_messages": MAX_MESSAGES,
        "max_stops": MAX_STOPS,
        "max_stop_chars": MAX_STOP_CHARS,
        **llm.manager.limits(),
    }

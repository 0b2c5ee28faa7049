"""GET /info: what is served, with which limits, in the words of text-generation-inference where it has some."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

from ... import __version__
from ...types import MAX_STOP_CHARS, MAX_STOPS
from ..background_load import ServedLLM
from ..config import ServerConfig
from ..submit import CHARS_PER_TOKEN, Shared, ready
from .schemas import MAX_MESSAGES, documented

NOT_SHOWN = frozenset({"host", "port", "api_key", "guest_keys", "allowed_hosts", "access_log"})  # of ServerConfig


class Info(BaseModel):
    model_config = ConfigDict(extra="allow")

    model_id: str
    model_dtype: str
    model_device_type: str
    version: str
    max_total_tokens: int
    max_concurrent_requests: int
    model: str
    heads: str
    limits: dict[str, Any]


def add_info(app: FastAPI, shared: Shared) -> None:
    @app.get("/info", response_model=Info, responses=documented(401, 405, 503))
    async def info() -> Any:
        """The model, its heads, and every limit by name."""
        llm = ready(shared)
        about, limits = llm.describe(), limits_of(shared.config, llm)
        return {
            "model_id": llm.model_name,
            "model_dtype": str(about.get("dtype", "unknown")),
            "model_device_type": str(about.get("device", "unknown")).partition(":")[0],
            "version": __version__,
            "max_total_tokens": about["max_context"],
            "max_concurrent_requests": limits["slots"] + limits["max_queue"],
            **about,
            "limits": limits,
        }


def limits_of(config: ServerConfig, llm: ServedLLM) -> dict[str, Any]:
    """Every limit by name: of ServerConfig, of prompts, of the engine. No secrets."""
    context = llm.describe()["max_context"]
    return {
        **{name: getattr(config, name) for name in config.__dataclass_fields__ if name not in NOT_SHOWN},
        "max_context": context,
        "max_prompt_chars": CHARS_PER_TOKEN * context,
        "max_messages": MAX_MESSAGES,
        "max_stops": MAX_STOPS,
        "max_stop_chars": MAX_STOP_CHARS,
        **llm.manager.limits(),
    }

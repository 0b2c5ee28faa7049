"""GET /info: what is served, with which limits, in the words of text-generation-inference where it has some."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

from ... import __version__
from ..submit import Desk, ready
from .limits import limits_of
from .schemas import documented


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


def add_info(app: FastAPI, desk: Desk) -> None:
    @app.get("/info", response_model=Info, responses=documented(401, 405, 503))
    async def info() -> Any:
        """The model, its heads, and every limit by name."""
        llm = ready(desk)
        facts, limits = llm.describe(), limits_of(desk.config, llm)
        return {
            "model_id": llm.model_name,
            "model_dtype": str(facts.get("dtype", "unknown")),
            "model_device_type": str(facts.get("device", "unknown")).partition(":")[0],
            "version": __version__,
            "max_total_tokens": facts["max_context"],
            "max_concurrent_requests": limits["slots"] + limits["max_queue"],
            **facts,
            "limits": limits,
        }

"""Fields of the OpenAI API, and of vLLM's and TGI's on top of it, that would change the answer and are not offered: a
400 that names them, unless their value asks for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import Unsupported

NEUTRAL: dict[str, tuple[Any, ...]] = {  # field → values that ask for nothing; null always does
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "stop_token_ids": ([],),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "prompt_logprobs": (),
    "prompt_embeds": (),
    "truncate_prompt_tokens": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "grammar": (),
    "json_schema": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "logits_processors": ([],),
    "typical_p": (1,),
}
MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {"tool_calls": ([],), "function_call": (), "audio": ()}


def refuse(body: Any, neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise Unsupported for the first field of `neutral` that asks for something."""
    if isinstance(body, Mapping):
        for name, allowed in neutral.items():
            value = body.get(name)
            if value is not None and not any(_same(value, one) for one in allowed):
                raise Unsupported(f"{name} is not supported here.", param=name)


def shown(schema: dict[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Say on the OpenAPI page what such a field may hold."""
    for name, allowed in neutral.items():
        schema["properties"].setdefault(name, {"enum": [None, *allowed], "description": "Not supported."})


def _same(value: Any, allowed: Any) -> bool:
    """JSON's equality: 1 is 1.0, but not true."""
    return isinstance(value, bool) is isinstance(allowed, bool) and bool(value == allowed)

"""What a cell prints: what was chosen and why, and lines to copy."""

from __future__ import annotations

import textwrap
from typing import Any

from ..server.start_lines import EXAMPLE, curl_line
from . import env


def chosen(llm: Any, seconds: float) -> str:
    """What was chosen for this machine, with the reasons."""
    facts = llm.describe()
    nodes = " ".join(map(str, facts["nodes"])) if len(facts["nodes"]) > 1 else "1: plain decoding"
    lines = [
        f"{facts['model']} is ready after {seconds:.0f} s ({env.place()})",
        f"  device    {device(facts['device'])}, {facts['dtype']}",
        f"  slots     {facts['slots']} × {facts['max_context']} tokens",
        f"  drafts    {' and '.join(facts['drafts']) or 'none'}",
        f"  nodes     {nodes}" + (", as many as pay at each step" if len(facts["nodes"]) > 2 else ""),
        f"  expected  {expected(llm.forecast, llm.heads_name != 'none', llm.device)}",
    ]
    if facts["heads"] == "none":
        lines.append("  no heads are loaded: notebooks/02_train_heads.ipynb trains some for this model")
    because = textwrap.fill(
        "; ".join(llm.notes), 96, initial_indent="  because   ", subsequent_indent=12 * " ",
        break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip
    return "\n".join([*lines, because])


def device(name: str) -> str:
    """A device as a person knows it: a GPU with its name and memory, a CPU as such."""
    from ..model.loading.gpu_facts import gpu_facts

    facts = gpu_facts() if name.startswith("cuda") else None
    if facts is None:
        return name
    others = f", {facts.gpus - 1} more here, unused" if facts.gpus > 1 else ""
    return f"{facts.name} ({facts.total / 2**30:.1f} GiB, capability {'.'.join(map(str, facts.capability))}{others})"


def expected(forecast: tuple[int, float, float] | None, has_heads: bool, device: str) -> str:
    """forecast: LLM.forecast"""
    if forecast is None and has_heads and device != "cpu":
        return "steps are timed while the engine idles; then speculation is used as far as it pays"
    if forecast is None and has_heads:
        return "no forecast: steps are timed only of a model that is large enough, and where nodes are to be chosen"
    if forecast is None:
        return "no forecast: without heads it depends on how much of the answer stands in the prompt"
    nodes, tokens, speedup = forecast
    if nodes == 1:
        return "plain decoding is fastest here for one request; speculation starts where it pays"
    return f"{speedup:.1f}× of plain decoding for one request ({tokens:.1f} tokens per step with {nodes} nodes)"


def snippets(url: str, key: str | None, model: str, has_chat_template: bool) -> str:
    """A shell line and three lines of Python that get an answer from `url`."""
    openai = [
        "from openai import OpenAI",
        f'client = OpenAI(base_url="{url}/v1", api_key="{key or "none"}")',
        f'print(client.chat.completions.create(model="{model}", messages=[{{"role": "user", "content": "{EXAMPLE}"}}])'
        ".choices[0].message.content)",
    ]
    if not has_chat_template:
        openai[2] = f'print(client.completions.create(model="{model}", prompt="Once upon a time").choices[0].text)'
    return "\n".join([curl_line(url, key, has_chat_template), "", *openai])


def gibibytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"

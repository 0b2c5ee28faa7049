"""Text with runs of tokens coloured by their length, as HTML without any markup of the text.

One hue from light to dark, which reads without colour vision on light and dark pages. A title says the number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from .conversation import StepText, Turn

COLOURS = {2: "#deebf7", 3: "#b3d3ea", 4: "#7fb9de", 5: "#4f9dcf"}  # dark text has a contrast of at least 6 on each
MOST = max(COLOURS)


def coloured(steps: Iterable[StepText]) -> str:
    """Escaped text; a step of several tokens is a span with a background."""
    return "".join(map(_span, steps))


def _span(step: StepText) -> str:
    text = escape(step.text)
    if step.tokens < 2:
        return text
    style = f"background:{COLOURS[min(step.tokens, MOST)]};color:#111;border-radius:3px"
    return f'<span style="{style}" title="{step.tokens} tokens in one step">{text}</span>'


def legend() -> str:
    """What the colours mean."""
    names = {run: f"{run}" for run in COLOURS} | {MOST: f"{MOST} or more"}
    style = "color:#111;border-radius:3px;padding:0 .5em;margin-left:.3em"
    spans = "".join(f'<span style="background:{colour};{style}">{names[run]}</span>' for run, colour in COLOURS.items())
    return f'<div style="font-size:85%">tokens from one pass of the model: 1 (no colour){spans}</div>'


def transcript(turns: Sequence[Turn], dropped: int) -> str:
    """The conversation, the newest turn last and in sight: a reversed column is shown from its end."""
    note = ""
    if dropped:
        note = (
            '<div style="font-style:italic;opacity:.8">The context is full: the '
            f"{dropped} oldest messages are no longer sent to the model.</div>"
        )
    style = "max-height:28em;overflow-y:auto;display:flex;flex-direction:column-reverse"
    return f'<div style="{style}"><div>{note}{"".join(map(_turn, turns))}</div></div>'


def _turn(turn: Turn) -> str:
    name = "You" if turn.role == "user" else "Model"
    end = ' <span style="opacity:.7">(stopped)</span>' if turn.stopped else ""
    body = f'<span style="white-space:pre-wrap;overflow-wrap:anywhere">{coloured(turn.steps)}</span>'
    return f'<div style="margin:.4em 0;line-height:1.5"><b>{name}:</b> {body}{end}</div>'

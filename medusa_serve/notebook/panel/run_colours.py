"""Text with the runs of accepted tokens tinted by length, as HTML that holds no markup but ours.

One hue from light to dark: it reads without colour vision, on light and dark pages; a title says the number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from .conversation import Piece, Turn

TINTS = {2: "#deebf7", 3: "#b3d3ea", 4: "#7fb9de", 5: "#4f9dcf"}  # dark text has a contrast of 6 or more on each
MOST = max(TINTS)


def tinted(pieces: Iterable[Piece]) -> str:
    """Escaped text; a piece of several tokens is a span with a background."""
    return "".join(_span(piece) for piece in pieces)


def _span(piece: Piece) -> str:
    text = escape(piece.text)
    if piece.run < 2:
        return text
    style = f"background:{TINTS[min(piece.run, MOST)]};color:#111;border-radius:3px"
    return f'<span style="{style}" title="{piece.run} tokens in one step">{text}</span>'


def legend() -> str:
    """What the tints mean."""
    names = {run: f"{run}" for run in TINTS} | {MOST: f"{MOST} or more"}
    style = "color:#111;border-radius:3px;padding:0 .5em;margin-left:.3em"
    spans = "".join(f'<span style="background:{tint};{style}">{names[run]}</span>' for run, tint in TINTS.items())
    return f'<div style="font-size:85%">tokens from one pass of the model: 1 (no tint){spans}</div>'


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
    body = f'<span style="white-space:pre-wrap;overflow-wrap:anywhere">{tinted(turn.pieces)}</span>'
    return f'<div style="margin:.4em 0;line-height:1.5"><b>{name}:</b> {body}{end}</div>'

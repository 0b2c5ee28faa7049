"""The panel's widgets, without what they do. A widget is only changed where its value differs."""

from __future__ import annotations

from html import escape
from typing import Any

from ...errors import MedusaServeError

WIDE = "auto"  # as wide as the cell, borders included
LABELS = {"description_width": "7em"}


class Controls:
    """`widget` holds all the others. max_context: in tokens; bounds the length of answers"""

    def __init__(self, max_context: int, legend: str) -> None:
        w = _ipywidgets()
        wide = {"width": WIDE}
        self.transcript = w.HTML()
        self.live = w.HTML()
        self.note = w.HTML()
        self.system = w.Text(
            description="System", placeholder="a system message, or nothing", layout=wide, style=LABELS
        )
        self.prompt = w.Textarea(placeholder="Ask something", rows=3, layout=wide)
        self.send = w.Button(description="Send", button_style="primary", icon="paper-plane")
        self.stop = w.Button(description="Stop", icon="stop", disabled=True)
        self.regenerate = w.Button(description="Regenerate", icon="refresh")
        self.clear = w.Button(description="Clear", icon="trash")
        compare = {"description": "Compare with plain decoding", "icon": "balance-scale", "layout": {"width": "auto"}}
        self.compare = w.Button(tooltip="The last prompt with speculation and without, same seed", **compare)
        self.temperature = w.FloatSlider(
            description="Temperature", value=0.0, min=0.0, max=2.0, step=0.05, style=LABELS
        )
        self.top_p = w.FloatSlider(description="Top-p", value=1.0, min=0.05, max=1.0, step=0.05, style=LABELS)
        most = max(8, max_context // 2)
        self.max_tokens = w.IntSlider(description="Max tokens", value=min(256, most), min=1, max=most, style=LABELS)
        self.seed = w.Text(description="Seed", placeholder="drawn", style=LABELS)
        self.speculation = w.Checkbox(description="Speculation", value=True, style=LABELS)
        self._legend = w.HTML(legend)
        settings = w.VBox([self.system, self.temperature, self.top_p, self.max_tokens, self.seed, self.speculation])
        self._settings = w.Accordion([settings], selected_index=None)
        self._settings.set_title(0, "Settings")
        buttons = w.HBox(
            [self.send, self.stop, self.regenerate, self.clear, self.compare], layout={"flex_flow": "wrap"}
        )
        self.widget = w.VBox(
            [self.transcript, self._legend, self.live, self.note, self.prompt, buttons, self._settings], layout=wide
        )

    @property
    def busy(self) -> bool:
        return bool(self.send.disabled)

    def set_busy(self, busy: bool, *, can_stop: bool = False) -> None:
        for button in (self.send, self.regenerate, self.clear, self.compare):
            button.disabled = busy
        self.stop.disabled = not can_stop

    def show(self, html: str) -> None:
        """Show the transcript. html: with its text escaped"""
        if self.transcript.value != html:
            self.transcript.value = html

    def say(self, text: str) -> None:
        """Show a line of text to the user."""
        self.note.value = escape(text)

    def close(self) -> None:
        """Close all widgets, their layouts and styles too."""
        left = [self.widget]
        while left:
            widget = left.pop()
            left += getattr(widget, "children", ())
            for model in (getattr(widget, "layout", None), getattr(widget, "style", None), widget):
                if model is not None:
                    model.close()


def _ipywidgets() -> Any:
    try:
        import ipywidgets
    except ImportError:
        raise MedusaServeError("The panel needs ipywidgets: run %pip install ipywidgets, then this cell.") from None
    return ipywidgets

"""A conversation's turns, and their HTML."""

from __future__ import annotations

import re

import pytest

from medusa_serve.notebook.panel.conversation import Conversation, StepText, Turn
from medusa_serve.notebook.panel.run_colours import COLOURS, coloured, legend, transcript
from medusa_serve.types import Delta


def talk(*texts: str) -> Conversation:
    conversation = Conversation()
    for at, text in enumerate(texts):
        if at % 2:
            conversation.begin_answer().add(Delta(text, (1,), (0,)))
        else:
            conversation.ask(text)
    return conversation


def words(messages: list[dict[str, str]]) -> int:
    return sum(len(message["content"].split()) for message in messages)


def test_messages_leave_out_what_has_not_begun() -> None:
    conversation = talk("a", "b", "c")
    conversation.begin_answer()
    assert [m["content"] for m in conversation.messages("be brief")] == ["be brief", "a", "b", "c"]
    assert [m["role"] for m in conversation.messages()] == ["user", "assistant", "user"]
    assert conversation.take_back_answer()
    assert conversation.messages()[-1]["content"] == "c"
    conversation.clear()
    assert not conversation.take_back_answer()


@pytest.mark.parametrize(("room", "left", "dropped"), [(9, "abcde", 0), (8, "cde", 2), (4, "e", 4), (0, "e", 4)])
def test_the_oldest_turns_make_room(room: int, left: str, dropped: int) -> None:
    conversation = talk("a a", "b b", "c c", "d", "e e")
    assert conversation.fit(words, room) == dropped
    assert "".join(turn.text[0] for turn in conversation.turns) == left
    assert conversation.turns[0].role == "user"
    assert conversation.dropped == dropped


def test_the_system_message_counts_and_stays() -> None:
    conversation = talk("a a", "b b", "c c")
    assert conversation.fit(words, 6, "be brief") == 2
    assert [m["content"] for m in conversation.messages("be brief")] == ["be brief", "c c"]


def test_runs_are_coloured_and_text_is_escaped() -> None:
    turn = Turn("assistant")
    for delta in (Delta("<b>", (1,), (0,)), Delta("", (2,), (1,)), Delta("&x", (3,), (2,)), Delta("y", (9,), (8,))):
        turn.add(delta)
    assert turn.text == "<b>&xy"
    html = coloured(turn.steps)
    assert html.startswith("&lt;b&gt;<span ")
    assert f"background:{COLOURS[3]};" in html
    assert 'title="3 tokens in one step">&amp;x</span>' in html
    assert f"background:{COLOURS[5]};" in html
    assert 'title="9 tokens in one step">y</span>' in html


def test_the_legend_names_every_colour() -> None:
    assert re.findall(r"background:(#\w{6})", legend()) == list(COLOURS.values())
    assert "5 or more" in legend()


def luminance(colour: str) -> float:
    """WCAG's relative luminance."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_differ_in_lightness_and_text_on_them_is_readable() -> None:
    lights = [luminance(colour) for colour in COLOURS.values()]
    assert lights == sorted(lights, reverse=True)
    for lighter, darker in zip(lights, lights[1:], strict=False):
        assert (lighter + 0.05) / (darker + 0.05) > 1.2
    assert all((light + 0.05) / (luminance("#111111") + 0.05) > 6 for light in lights)


def test_the_transcript_says_what_was_dropped() -> None:
    turns = [Turn("user", [StepText("<script>", 1)]), Turn("assistant", [StepText("no", 1)], stopped=True)]
    html = transcript(turns, 4)
    assert "4 oldest messages are no longer sent" in html
    assert "&lt;script&gt;" in html
    assert "<script>" not in html
    assert "(stopped)" in html
    assert "no longer sent" not in transcript(turns, 0)

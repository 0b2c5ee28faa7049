"""The panel by its Python side: buttons are clicked, values read. The same tests run with ipywidgets 7.7 and 8.1."""

from __future__ import annotations

import _thread
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from medusa_serve.errors import EngineDead
from medusa_serve.notebook.comparison import Comparison
from medusa_serve.notebook.panel.panel import Panel

ipywidgets = pytest.importorskip("ipywidgets", reason="the panel is made of ipywidgets")


@pytest.fixture
def panel(server: Any) -> Iterator[Panel]:
    made = Panel(server, blocking=False)
    yield made
    made.close()
    assert server.stats()["in_flight"] == 0


def settle(panel: Panel, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while panel._controls.busy:
        assert time.monotonic() < until
        time.sleep(0.01)


def ask(panel: Panel, text: str, **values: Any) -> None:
    for name, value in values.items():
        getattr(panel._controls, name).value = value
    panel._controls.prompt.value = text
    panel._controls.send.click()
    settle(panel)


def test_send_streams_into_one_escaped_widget(panel: Panel, server: Any) -> None:
    shown: list[str] = []
    panel._controls.transcript.observe(lambda change: shown.append(change["new"]), "value")
    ask(panel, "<b>Name a colour", max_tokens=60)
    controls, html = panel._controls, panel._controls.transcript.value
    assert controls.prompt.value == ""
    assert "&lt;b&gt;Name a colour" in html
    assert "<b>Name" not in html
    assert panel._conversation.turns[-1].text == server.generate("<b>Name a colour", max_tokens=60).text
    assert len(shown) >= 2
    assert shown[-1] == html
    assert len(shown) < 30  # not once a token
    for word in ("60 tokens", "per step", "tokens/s", "first token after", "RAM", "seed"):
        assert word in controls.live.value
    assert [controls.send.disabled, controls.stop.disabled] == [False, True]


def test_accepted_runs_are_coloured(panel: Panel) -> None:
    ask(panel, "ab ab ab ab ab ab ab ab", max_tokens=64, temperature=0.0)
    runs = {step.tokens for step in panel._conversation.turns[-1].steps}
    html = panel._controls.transcript.value
    for run in runs - {1}:
        assert f'title="{run} tokens in one step"' in html
    assert sum(step.tokens for step in panel._conversation.turns[-1].steps) <= 64


def test_a_second_question_knows_the_first(panel: Panel) -> None:
    ask(panel, "a", max_tokens=4)
    ask(panel, "b", max_tokens=4, system="Be brief.")
    assert [turn.role for turn in panel._conversation.turns] == ["user", "assistant"] * 2
    messages = panel._conversation.messages("Be brief.")
    assert [message["role"] for message in messages][:3] == ["system", "user", "assistant"]


def test_stop_in_the_middle_then_regenerate(panel: Panel, server: Any) -> None:
    controls = panel._controls
    controls.prompt.value, controls.max_tokens.value = "a", 64
    started = threading.Event()
    controls.transcript.observe(lambda change: started.set() if "Model:" in change["new"] else None, "value")
    controls.send.click()
    assert controls.busy
    assert not controls.stop.disabled
    controls.send.click()  # nothing: it is busy
    assert started.wait(10)
    controls.stop.click()
    settle(panel)
    turn = panel._conversation.turns[-1]
    assert turn.stopped
    assert len(panel._conversation.turns) == 2
    assert "(stopped)" in controls.transcript.value
    assert server.stats()["running"] <= 1  # two steps at most
    controls.max_tokens.value = 5
    controls.regenerate.click()
    settle(panel)
    assert len(panel._conversation.turns) == 2
    assert not panel._conversation.turns[-1].stopped


def test_a_seed_gives_the_same_answer_again(panel: Panel) -> None:
    ask(panel, "a", max_tokens=8, temperature=1.5, seed="7")
    first = panel._conversation.turns[-1].text
    panel._controls.regenerate.click()
    settle(panel)
    assert panel._conversation.turns[-1].text == first
    panel._controls.seed.value = "x"
    panel._controls.regenerate.click()
    settle(panel)
    assert "The seed is a whole number" in panel._controls.note.value


def test_clear(panel: Panel) -> None:
    panel._controls.send.click()
    assert "Write a prompt first" in panel._controls.note.value
    panel._controls.compare.click()
    assert "Send a prompt first" in panel._controls.note.value
    ask(panel, "a", max_tokens=2)
    panel._controls.clear.click()
    assert panel._conversation.turns == []
    assert "You:" not in panel._controls.transcript.value


def test_a_full_context_drops_the_oldest_with_a_note(panel: Panel) -> None:
    for text in ("first", "second", "third", "fourth"):
        ask(panel, text, max_tokens=40)
        assert panel._controls.note.value == ""
    assert panel._conversation.dropped > 0
    assert "oldest messages are no longer sent" in panel._controls.transcript.value
    assert panel._conversation.turns[-2].text == "fourth"
    ask(panel, "x" * 400, max_tokens=8)
    assert "tokens" in panel._controls.note.value  # the engine's own sentence


def test_compare_with_plain_decoding(panel: Panel) -> None:
    ask(panel, "a", max_tokens=24, temperature=0.8, seed="5")
    answer = panel._conversation.turns[-1].text
    panel._controls.compare.click()
    settle(panel)
    said = panel._controls.note.value
    assert "with and without speculation, seed 5: identical (24 tokens); " in said
    assert "× of plain decoding" in said
    assert panel._conversation.turns[-1].text == answer


def test_speculation_off_is_heeded(panel: Panel, server: Any) -> None:
    before = server.stats()["drafted"]
    ask(panel, "ab ab ab ab ab ab", max_tokens=20, speculation=False)
    assert server.stats()["drafted"] == before
    assert {step.tokens for step in panel._conversation.turns[-1].steps} <= {1}


def test_what_fails_is_said_and_the_panel_goes_on(panel: Panel, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise EngineDead("The engine stopped.")

    def crash(*args: Any) -> Any:
        raise KeyError("x")

    with monkeypatch.context() as patch:
        patch.setattr(server, "follow", fail)
        ask(panel, "a")
        assert panel._controls.note.value == "The engine stopped."
        patch.setattr(server, "follow", crash)
        ask(panel, "a")
        assert "This failed (KeyError)" in panel._controls.note.value
    ask(panel, "a", max_tokens=2)
    assert panel._controls.note.value == ""


def test_what_the_tunnel_has_used_up_is_said_after_an_answer(
    panel: Panel, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(server), "warning", "Most of this month's requests are used.")
    ask(panel, "a", max_tokens=2)
    assert panel._controls.note.value == "Most of this month&#x27;s requests are used."


@pytest.mark.parametrize("blocking", [False, True])
def test_a_widget_callback_that_raises_leaves_the_server_alone(server: Any, blocking: bool) -> None:
    """A user's observer runs within the panel's thread, or within the click: neither is the server's."""
    httpx = pytest.importorskip("httpx", reason="the server's tests need httpx: pip install -e '.[test]'")
    body = {"prompt": "a", "max_tokens": 8}
    text, raised = server.generate("a", raw=True, max_tokens=8).text, []
    panel = Panel(server, blocking=blocking)

    def broken(change: Any) -> None:
        answer = httpx.post(f"{server.url}/generate", json=body).json()  # while it is raised
        raised.append(answer["text"])
        raise ValueError("a user's callback")

    panel._controls.transcript.observe(broken, "value")
    try:
        ask(panel, "a", max_tokens=20)
        assert raised
        assert set(raised) == {text}
        assert "This failed (ValueError)" in panel._controls.note.value
        assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
        assert server.stats()["in_flight"] == 0
        panel._controls.transcript.unobserve(broken, "value")
        panel._controls.clear.click()
        ask(panel, "a", max_tokens=4)
        assert panel._conversation.turns[-1].text == server.generate("a", max_tokens=4).text
        assert panel._controls.note.value == ""
    finally:
        panel.close()


def test_blocking_answers_inside_the_click_and_an_interrupt_keeps_the_text(server: Any) -> None:
    panel = Panel(server, blocking=True)
    try:
        controls = panel._controls
        assert "interrupt the kernel" in controls.note.value
        controls.prompt.value, controls.max_tokens.value = "a", 3
        controls.send.click()
        assert not controls.busy
        assert panel._conversation.turns[-1].text == server.generate("a", max_tokens=3).text
        controls.prompt.value, controls.max_tokens.value = "b", 64
        fired: list[bool] = []

        def interrupt(change: Any) -> None:
            if "b" in change["new"] and not fired:
                fired.append(True)
                _thread.interrupt_main()

        controls.transcript.observe(interrupt, "value")
        controls.send.click()
        assert fired
        assert controls.note.value == "Interrupted."
        assert panel._conversation.turns[-1].stopped
        assert not controls.busy
    finally:
        panel.close()


def test_closing_gives_every_widget_back(server: Any) -> None:
    module = sys.modules["ipywidgets.widgets.widget"]
    registry = module._instances if hasattr(module, "_instances") else ipywidgets.Widget.widgets  # 8 and 7
    before = len(registry)
    panel = Panel(server)
    assert len(registry) > before + 20
    panel._controls.prompt.value, panel._controls.max_tokens.value = "a", 64
    panel._controls.send.click()
    panel.close()
    assert len(registry) == before
    assert "medusa-panel" not in [thread.name for thread in threading.enumerate()]


def test_a_server_has_one_panel(server: Any) -> None:
    assert server.panel() is server.panel()


def test_where_two_texts_part() -> None:
    class Answer:
        def __init__(self, *ids: int) -> None:
            self.token_ids, self.acceptance, self.tokens_per_second = ids, 2.0, 10.0

    one, two = Answer(1, 2, 3), Answer(1, 2, 4)
    for gap, words in ((None, "two different tokens;"), (0.02, "a near-tie (log-prob"), (0.7, "no tie (log-prob")):
        found = Comparison(one, two, 2, gap)  # type: ignore[arg-type]
        assert str(found).startswith(f"identical up to token 2, then {words}")
        assert not found.identical


def test_how_far_apart_two_tokens_are(server: Any) -> None:
    from dataclasses import replace

    from medusa_serve.notebook.comparison import _gap

    chat = [{"role": "user", "content": "a"}]
    plain = server.generate(chat, max_tokens=4, logprobs=5)
    (first, likeliest), (second, other) = plain.logprobs[2].top[:2]
    assert first == plain.token_ids[2]
    changed = replace(plain, token_ids=(*plain.token_ids[:2], second, 0))
    gap = _gap(server._llm(), chat, Comparison(changed, plain, 2))
    assert gap == pytest.approx(likeliest - other, abs=1e-3)
    nowhere = replace(plain, token_ids=plain.token_ids[:2])  # one text ended there
    assert _gap(server._llm(), chat, Comparison(nowhere, plain, 2)) is None

"""The chat page in a browser, at the width of a desk and of a phone."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_serve.errors import GenerationFailed, InvalidRequest, QueueFull
from medusa_serve.server.config import ServerConfig
from tests.server.standins import HandLLM, WordCodec, serving, wait_for

from .conftest import STRANGER, WIDTHS
from .talker import RUNS, TEXT, WORDS, Talker, TalkLLM, body_of, framing, proxied, sent

pytestmark = pytest.mark.browser
Visit = Callable[..., Any]
KEY = "a/key+with=signs&more"
ANSWER, FOOT = ".assistant:last-of-type .text", ".assistant:last-of-type .foot"


def ask(page: Any, text: str = "Explain photosynthesis.") -> None:
    page.fill("#prompt", text)
    page.click("#send")


def answer(page: Any) -> str:
    """The text of the last answer, once it is whole."""
    page.wait_for_selector(f"{FOOT} .regenerate:enabled")
    return page.inner_text(ANSWER) if page.locator(ANSWER).is_visible() else ""


def text(page: Any) -> str:
    return page.locator(".assistant .text").last.text_content()


def grown(page: Any, above: int) -> None:
    """Wait until the last answer has more characters than that. (A function: the page's policy forbids eval.)"""
    page.wait_for_function(
        "n => [...document.querySelectorAll('.assistant .text')].some((t, i, all) =>"
        " i === all.length - 1 && t.textContent.length > n)",
        arg=above,
    )


def notes(page: Any) -> str:
    return " ".join(page.locator(".note").all_text_contents())


@pytest.mark.parametrize("width", WIDTHS)
def test_a_conversation(visit: Visit, width: str) -> None:
    manager = Talker()
    with serving(TalkLLM(manager)) as url:
        page = visit(url, width, permissions=["clipboard-read", "clipboard-write"])
        page.wait_for_selector("#dot.ok")
        assert page.inner_text("#model") == "talker"
        ask(page)
        page.wait_for_selector("#stop:visible")
        seen = []
        for _ in range(3):  # it grows while one looks
            grown(page, len(seen[-1]) if seen else 0)
            seen.append(text(page))
        assert [len(part) for part in seen] == sorted({len(part) for part in seen})
        assert re.search(r"\d+ tokens · [\d.]+ per step", page.text_content("#live") or "")
        answer(page)
        assert text(page) == TEXT, "markup in it is text"
        assert all(TEXT.startswith(part) for part in seen)
        coloured_as_accepted(page.locator(f"{ANSWER} i").evaluate_all("all => all.map((i) => [i.className, i.title])"))
        stats = page.inner_text(f"{FOOT} span")
        assert re.fullmatch(rf"{len(WORDS)} tokens · [\d.]+ per step · [\d.]+ tokens/s", stats)
        page.click(f"{FOOT} button:has-text('Copy')")
        page.wait_for_selector(f"{FOOT} button:has-text('Copied')")
        assert page.evaluate("navigator.clipboard.readText()") == TEXT
        # the next turn sends the conversation, regenerating sends the same again without its answer
        ask(page, "And at night?")
        answer(page)
        assert sent(manager) == f"Explain photosynthesis.\n{TEXT}\nAnd at night?"
        assert page.locator(".regenerate:visible").count() == 1
        page.click(".regenerate:visible")
        page.wait_for_selector("#stop:visible")
        answer(page)
        assert len(manager.calls) == 3
        assert sent(manager) == sent(manager, 1)
        assert page.locator(".turn").count() == 4
        page.click("#new")
        assert page.locator(".turn").count() == 0
        assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth"), "wider than the screen"
        assert not page.problems
        assert {part.split("/")[2] for part in page.visited if not part.startswith("data:")} == {
            url.removeprefix("http://")
        }
        posts = [request for request in page.sent if request.method == "POST"]
        assert all(request.headers["ngrok-skip-browser-warning"] for request in posts)


def coloured_as_accepted(spans: list[list[str]]) -> None:
    """Each is a step, or several where the socket lagged, with the colour of their mean; all of them are the answer."""
    runs, left = itertools.cycle(RUNS), len(WORDS)
    for name, title in spans:
        found = re.fullmatch(r"(\d+) tokens? in (?:one|(\d+)) steps?", title)
        assert found, title
        num_steps = int(found[2] or 1)
        tokens = min(left, sum(next(runs) for _ in range(num_steps)))
        assert int(found[1]) == tokens
        assert name == f"r{min(5, math.floor(tokens / num_steps + 0.5))}"
        left -= tokens
    assert left == 0
    assert len({name for name, _ in spans}) > 2


@pytest.mark.parametrize("width", WIDTHS)
def test_stop_in_the_middle_ends_it_at_the_server_too(visit: Visit, width: str) -> None:
    manager = Talker(pause_s=0.1)
    with serving(TalkLLM(manager)) as url:
        page = visit(url, width)
        ask(page)
        grown(page, 20)
        page.click("#stop")
        answer(page)
        wait_for(lambda: manager.cancelled == ["seq-0"])
        kept = text(page)
        assert kept
        assert TEXT.startswith(kept)
        assert kept != TEXT
        assert "Stopped." in notes(page)
        manager.pause_s = 0.005
        page.click(".regenerate:visible")
        page.wait_for_selector("#stop:visible")
        answer(page)
        assert text(page) == TEXT
        assert not page.problems


def test_the_keyboard_sends_breaks_lines_and_stops(visit: Visit) -> None:
    manager = Talker(pause_s=0.05)
    with serving(TalkLLM(manager)) as url:
        page = visit(url)
        page.keyboard.type("one")  # the field has the focus
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("two")
        page.keyboard.press("Enter")
        page.wait_for_selector("#stop:visible")
        page.keyboard.press("Escape")
        answer(page)
        assert sent(manager) == "one\ntwo"
        assert manager.cancelled == ["seq-0"]


def test_settings_are_sent_and_checked(visit: Visit) -> None:
    manager = Talker(pause_s=0)
    with serving(TalkLLM(manager)) as url:
        page = visit(url)
        ask(page)
        answer(page)
        first = manager.calls[-1][1]
        assert (first.temperature, first.top_p, first.max_tokens, first.speculation) == (0.7, 0.95, 512, True)
        assert "seed" not in body_of(page.sent[-1])
        page.click("#open")
        page.fill("#system", "You are brief.")
        page.fill("#temperature", "0")
        page.fill("#top_p", "0.5")
        page.fill("#max_tokens", "7")
        page.fill("#seed", "42")
        page.uncheck("#speculation")
        page.uncheck("#tint")
        assert page.locator("#temperature + output, label:has(#temperature) output").inner_text() == "0.00"
        page.click("#close")
        page.click("#new")
        ask(page)
        answer(page)
        params = manager.calls[-1][1]
        assert (params.temperature, params.top_p, params.max_tokens, params.seed) == (0.0, 0.5, 7, 42)
        assert params.speculation is False
        assert sent(manager) == "You are brief.\nExplain photosynthesis."
        assert text(page) == " ".join(WORDS[:7])
        assert "max tokens" in notes(page)
        assert page.get_attribute(f"{FOOT} span", "title") == "seed 42"
        assert not page.is_visible("#legend")
        page.click("#open")
        page.fill("#max_tokens", "0")
        page.click("#close")
        ask(page, "more")
        assert page.is_visible("#settings"), "the wrong field is shown"
        assert len(manager.calls) == 2


def test_without_the_key_it_asks_for_it(visit: Visit) -> None:
    manager = Talker(pause_s=0)
    with serving(TalkLLM(manager), ServerConfig(port=0, api_key=KEY)) as url:
        page = visit(url)
        ask(page)
        answer(page)
        assert "key" in notes(page)
        assert page.evaluate("document.activeElement.id") == "key"
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.click(".regenerate:visible")
        answer(page)
        assert text(page) == TEXT


def test_the_key_of_the_fragment_never_leaves_the_browser(visit: Visit) -> None:
    from urllib.parse import quote

    with serving(TalkLLM(Talker(pause_s=0)), ServerConfig(port=0, api_key=KEY)) as url:
        page = visit(f"{url}/#key={quote(KEY, safe='')}")
        ask(page)
        answer(page)
        assert text(page) == TEXT
        [post] = [request for request in page.sent if request.method == "POST"]
        assert post.headers["authorization"] == f"Bearer {KEY}"
        for request in page.sent:
            assert "key" not in request.url.split("#")[0]
            assert not request.headers.get("referer")
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def test_an_answer_that_was_held_back_is_shown_whole(visit: Visit) -> None:
    with serving(TalkLLM(Talker(pause_s=0.03))) as url, proxied(url, buffers=True) as slow:
        page = visit(slow)
        ask(page)
        answer(page)
        assert text(page) == TEXT
        assert page.locator(f"{ANSWER} i.r5").count() > 1, "still coloured"
        assert "in one piece" in notes(page)


def test_below_a_path_and_in_a_frame(visit: Visit) -> None:
    """As JupyterLab and Colab show a port."""
    with (
        serving(TalkLLM(Talker(pause_s=0.005))) as url,
        proxied(url, prefix="/proxy/8000") as below,
        framing(f"{below}/") as port,
    ):
        frame = visit(f"http://localhost:{port}").frame_locator("iframe")
        frame.locator("#dot.ok").wait_for()
        frame.locator("#prompt").fill("hello")
        frame.locator("#send").click()
        frame.locator(".regenerate:enabled").wait_for()
        assert frame.locator(".assistant .text").text_content() == TEXT


def test_a_stranger_cannot_frame_it(visit: Visit) -> None:
    with serving(TalkLLM()) as url, framing(f"{url}/") as port:
        page = visit(f"http://{STRANGER}:{port}")
        page.wait_for_timeout(500)
        assert any("frame-ancestors" in problem for problem in page.problems)
        assert page.frame_locator("iframe").locator("#prompt").count() == 0


def test_through_the_tunnel(visit: Visit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medusa_serve.notebook.tunnel.tunnel import Tunnel
    from tests.notebook.faked import FAKE

    monkeypatch.setenv("MEDUSA_FAKE_NGROK", str(tmp_path))
    monkeypatch.setenv("PYNGROK_NGROK_PATH", str(FAKE))
    with serving(TalkLLM(), ServerConfig(port=0, api_key="k")) as url:
        tunnel = Tunnel(int(url.rpartition(":")[2]), token="any")
        try:
            page = visit(f"{tunnel.url}/#key=k", "phone")
            ask(page)
            grown(page, 20)
            assert text(page) != TEXT, "it streams"
            answer(page)
            assert text(page) == TEXT
        finally:
            tunnel.close()


def test_the_oldest_turns_make_room_and_it_says_so(visit: Visit) -> None:
    class Short(Talker):
        def submit(self, prompt_ids: list[int], params: Any, sink: Any, *, key: str = "") -> str:
            from medusa_serve.errors import ContextTooLong

            if len(prompt_ids) > 2 * len(TEXT):
                raise ContextTooLong("The prompt does not fit.", param="messages")
            return super().submit(prompt_ids, params, sink, key=key)

    manager = Short(pause_s=0)
    with serving(TalkLLM(manager)) as url:
        page = visit(url)
        for question in ("first", "second", "third"):
            ask(page, question)
            answer(page)
        assert "no longer sent to the model" in notes(page)
        assert page.locator("#log > *").nth(3).text_content() == notes(page), (
            "between what is left out and what is sent"
        )
        assert sent(manager) == f"second\n{TEXT}\nthird"
        assert page.locator(".turn").count() == 6, "they stay to be read"


def test_a_model_without_a_template_continues_the_text(visit: Visit) -> None:
    class Plain(WordCodec):
        def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
            raise InvalidRequest("The model has no chat template.", param="messages")

    manager = Talker(pause_s=0)
    with serving(TalkLLM(manager, codec=Plain())) as url:
        page = visit(url)
        ask(page, "Once upon a time")
        answer(page)
        assert text(page) == TEXT
        assert "no chat template" in notes(page)
        assert sent(manager) == "Once upon a time"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (QueueFull("64 sequences wait already; try again in a moment."), "64 sequences wait already"),
        (GenerationFailed("This sequence made the model fail."), "made the model fail"),
    ],
)
def test_what_the_server_refuses_is_said(visit: Visit, error: Any, sentence: str) -> None:
    manager = Talker()
    manager.error = error
    with serving(TalkLLM(manager)) as url:
        page = visit(url)
        ask(page)
        answer(page)
        assert sentence in notes(page)
        manager.error = None
        page.click(".regenerate:visible")
        page.wait_for_selector("#stop:visible")
        answer(page)
        assert text(page) == TEXT


def test_a_failure_in_the_middle_keeps_what_came(visit: Visit) -> None:
    manager = Talker()
    manager.failure = GenerationFailed("This sequence made the model fail.")
    with serving(TalkLLM(manager)) as url:
        page = visit(url)
        ask(page)
        answer(page)
        assert TEXT.startswith(text(page))
        assert len(text(page)) > 20
        assert page.locator(".note.bad[role=alert]").text_content() == "This sequence made the model fail."


def test_a_server_that_is_gone(visit: Visit) -> None:
    with serving(TalkLLM(Talker(pause_s=0))) as url:
        page = visit(url)
        page.wait_for_selector("#dot.ok")
    ask(page)
    answer(page)
    assert "cannot be reached" in notes(page)
    page.wait_for_selector("#dot.bad")


def test_a_stream_that_breaks_off_is_not_taken_for_an_answer(visit: Visit) -> None:
    with serving(HandLLM()) as url:
        page = visit(url)
        head = 'data: {"text":"half","tokens":[1],"accepted":[0]}\n\n'
        page.route("**/generate", lambda route: route.fulfill(status=200, content_type="text/event-stream", body=head))
        ask(page)
        answer(page)
        assert text(page) == "half"
        assert "ended before the answer did" in notes(page)


def luminance(colour: str) -> float:
    """WCAG's, of a CSS rgb()."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_colours_differ_in_lightness_and_can_be_read(visit: Visit, scheme: str) -> None:
    """Lightness, unlike hue, is seen by everybody."""
    with serving(HandLLM()) as url:
        page = visit(url, color_scheme=scheme)
        style = "all => all.map((i) => [getComputedStyle(i).backgroundColor, getComputedStyle(i).color])"
        colours = page.locator("#legend i").evaluate_all(style)[1:]
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        steps = [luminance(background), *(luminance(colour) for colour, _ in colours)]
        assert steps == sorted(steps, reverse=scheme == "light")
        ratios = [(max(a, b) + 0.05) / (min(a, b) + 0.05) for a, b in zip(steps, steps[1:], strict=False)]
        assert min(ratios) > 1.1, ratios
        for colour, ink in colours:
            pair = sorted((luminance(colour), luminance(ink)))
            assert (pair[1] + 0.05) / (pair[0] + 0.05) > 4.5, (colour, ink)

"""A server that goes public: one tunnel, a key, a cell that runs again; and where its page is shown."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import medusa_serve
from medusa_serve.errors import TunnelError
from medusa_serve.notebook import colab, env

from .tunnel.test_tunnel import TOKEN, Fake, fake, httpx, wait_for

__all__ = ["fake"]

CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}


def launch(folder: str, **options: Any) -> Any:
    return medusa_serve.launch(folder, **{"heads": "none", "panel": False, "port": 0, "max_context": 128} | options)


def post(url: str, key: str | None) -> int:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{url}/generate", json=CHAT, headers=headers, timeout=20).status_code


@pytest.fixture
def clean(nothing_left: None, fake: Fake) -> Iterator[Fake]:
    yield fake
    server = medusa_serve.notebook.background.running()
    if server is not None:
        server.stop()


def test_public_again_is_one_tunnel(folder: str, clean: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    server = launch(folder, public=True, token=TOKEN)
    url, key = server.public_url, server.api_key
    assert key
    assert post(url, key) == 200
    assert post(url, None) == post(server.url, None) == 401
    shown = capsys.readouterr().out
    assert url in shown
    assert "Whoever has the address and the key" in shown
    assert f"Bearer {key}" in shown  # the lines to copy work
    assert TOKEN not in shown
    assert launch(folder, public=True, token=TOKEN) is server
    assert (server.public_url, len(clean.alive())) == (url, 1)
    other = launch(folder, public=True, token=TOKEN, slots=2)
    assert other is not server
    wait_for(lambda: len(clean.alive()) == 1, 10)
    assert post(other.public_url, other.api_key) == 200
    assert launch(folder, slots=2) is other  # no longer public: the tunnel closes, the server and its key stay
    assert other.public_url is None
    wait_for(lambda: not clean.alive(), 10)
    assert post(other.url, None) == 401


def test_a_server_without_a_key_gets_one_when_it_goes_public(folder: str, clean: Fake) -> None:
    server = launch(folder)
    assert post(server.url, None) == 200
    url = server.open_tunnel(token=TOKEN)
    assert server.open_tunnel() == url
    assert post(url, server.api_key) == 200
    assert post(server.url, None) == 401
    assert server.warning is None
    server.stop()
    wait_for(lambda: not clean.alive(), 10)
    [quota] = Path(os.environ["MEDUSA_SERVE_CACHE"]).glob("ngrok-*.json")
    counted = json.loads(quota.read_text())
    assert counted["requests"] >= 1
    assert counted["bytes"] > 100


@pytest.mark.parametrize(("options", "says"), [({}, "no ngrok token"), ({"token": TOKEN}, "ERR_NGROK_107")])
def test_a_tunnel_that_fails_leaves_the_server_as_open_as_it_was(
    folder: str, clean: Fake, options: dict[str, Any], says: str
) -> None:
    server = launch(folder)
    clean.tell("fail", "start 107" if options else None)
    with pytest.raises(TunnelError, match=says):
        server.open_tunnel(**options)
    assert (server.api_key, server.public_url) == (None, None)
    assert post(server.url, None) == 200
    assert not clean.alive()


def test_a_tunnel_that_fails_keeps_the_key_that_was_there(folder: str, clean: Fake) -> None:
    server = launch(folder, api_key="k" * 16)
    with pytest.raises(TunnelError, match="no ngrok token"):
        server.open_tunnel()
    assert (post(server.url, None), post(server.url, "k" * 16)) == (401, 200)


def test_without_a_token_it_serves_and_says_so(folder: str, clean: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    server = launch(folder, public=True)
    assert "no tunnel: There is no ngrok token" in capsys.readouterr().out
    assert server.public_url is None
    assert post(server.url, server.api_key) == 200
    with pytest.raises(TunnelError, match="no ngrok token"):
        server.open_tunnel()
    assert launch(folder, public=True, token=TOKEN) is server  # the cell runs again, with the token
    assert server.public_url


def test_where_the_page_is_shown(
    server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(colab, "show_page", lambda *args, **options: shown.append((args, options)))
    monkeypatch.setattr(colab, "proxy_url", lambda port: f"https://{port}-x.colab.dev/")
    in_a_tab = f"in a tab, for you alone: https://{server._port}-x.colab.dev/\n"
    for place, words in (
        ("python", f"open {server.url}"),
        ("kaggle", "Kaggle has no way to a port"),
        ("colab", in_a_tab),
    ):
        monkeypatch.setattr(env, "place", lambda place=place: place)
        server.show_page()
        assert words in capsys.readouterr().out
    assert shown == [((server._port,), {"key": None, "height": 640})]

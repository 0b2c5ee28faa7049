"""The tunnel against a fake ngrok program, through the real pyngrok: addresses, secrets, failures, drops, leftovers.

Live, with a token of yours: MEDUSA_LIVE_NGROK=1 NGROK_AUTHTOKEN=… python -m pytest -m network tests/notebook
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from medusa_serve.errors import TunnelError
from medusa_serve.notebook import env
from medusa_serve.notebook.tunnel import agent, tunnel
from medusa_serve.notebook.tunnel.tunnel import Tunnel
from medusa_serve.server.config import ServerConfig
from tests.notebook.faked import FAKE, Fake
from tests.server.standins import HandLLM, HandManager, httpx, serving, wait_for

KEY, TOKEN = "server-key", "2abcTokenOfNobody_1234"
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
ROOT = Path(__file__).parents[3]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """The fake in ngrok's place, a temp folder of the test's own, quick checks; nothing may be left at the end."""
    state, temp = tmp_path / "state", tmp_path / "temp"
    state.mkdir()
    temp.mkdir()
    monkeypatch.setenv("MEDUSA_FAKE_NGROK", str(state))
    monkeypatch.setenv("PYNGROK_NGROK_PATH", str(FAKE))
    monkeypatch.setenv("TMPDIR", str(temp))
    monkeypatch.setenv("MEDUSA_SERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in ("NGROK_AUTHTOKEN", "NGROK_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tunnel, "CHECK_S", 0.1)
    monkeypatch.setattr(tunnel, "BACK_OFF_S", (0.1, 0.2))
    made = Fake(state)
    yield made
    wait_for(lambda: not made.alive(), 10)
    assert not list(temp.glob(agent.MARK + "*")), "a folder with a token was left"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving(HandLLM(), ServerConfig(port=0, api_key=KEY)) as url:
        yield int(url.rpartition(":")[2])


def opened(port: int, **options: Any) -> Tunnel:
    return Tunnel(port, **({"token": TOKEN, "patience_s": 0.0} | options))


def post(url: str, **options: Any) -> httpx.Response:
    return httpx.post(f"{url}/generate", json=CHAT, headers={"X-API-Key": KEY}, timeout=20, **options)


# ---- open, use, close --------------------------------------------------------------------------------------------


def test_a_request_goes_through_and_nobody_gets_in_without_the_key(fake: Fake, port: int) -> None:
    urls: list[str] = []
    made = opened(port, on_url=urls.append)
    try:
        assert urls == [made.url]
        assert post(made.url).json()["text"] == "Hello!"
        assert httpx.post(f"{made.url}/generate", json=CHAT).status_code == 401
        assert "key" in made.notice
        assert made.url in repr(made)
    finally:
        made.close()
    made.close()
    assert repr(made) == "<Tunnel, closed>"
    assert not fake.alive()
    with pytest.raises(httpx.HTTPError):
        post(made.url)


def test_what_the_agent_is_asked_for(fake: Fake, port: int) -> None:
    opened(port, domain="https://my-name.ngrok-free.app/").close()
    [asked] = [line["body"] for line in fake.asked if line["method"] == "POST"]
    assert asked["addr"] == f"http://127.0.0.1:{port}"
    assert asked["inspect"] is False
    assert asked["schemes"] == ["https"]
    assert asked["domain"] == "my-name.ngrok-free.app"


@pytest.mark.parametrize("from_env", [True, False])
def test_the_token_is_in_a_private_file_and_nowhere_else(
    fake: Fake, port: int, from_env: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if from_env:
        monkeypatch.setenv("NGROK_AUTHTOKEN", TOKEN)
    made = Tunnel(port, token=None if from_env else TOKEN)
    try:
        [config] = Path(tempfile.gettempdir()).glob(f"{agent.MARK}*/ngrok.yml")
        assert stat.S_IMODE(config.stat().st_mode) == 0o600
        assert stat.S_IMODE(config.parent.stat().st_mode) == 0o700
        written = json.loads(config.read_text())["agent"]
        assert written["authtoken"] == TOKEN
        assert written["inspect_db_size"] == -1
        assert TOKEN not in " ".join(map(str, fake.runs[0]))
        for process in psutil.process_iter(["cmdline"]):
            assert TOKEN not in " ".join(process.info["cmdline"] or ())
        assert TOKEN not in repr(made) + repr(vars(made)["_agent"]) + made.notice
    finally:
        made.close()
    assert TOKEN not in "".join(capfd.readouterr())


def test_the_openai_client_streams_through_it(fake: Fake, port: int) -> None:
    openai = pytest.importorskip("openai", reason="needs the openai client: pip install -e '.[test]'")
    made = opened(port)
    try:
        client = openai.OpenAI(base_url=f"{made.url}/v1", api_key=KEY, max_retries=0)
        with client, client.chat.completions.create(model="stand-in", stream=True, **CHAT) as stream:
            pieces = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
        assert "".join(filter(None, pieces)) == "Hello!"
    finally:
        made.close()


def test_pieces_arrive_as_they_are_made_and_leaving_cancels(fake: Fake) -> None:
    from medusa_serve.types import Delta

    manager = HandManager(script=None)
    with serving(HandLLM(manager), ServerConfig(port=0, api_key=KEY)) as url:
        made = opened(int(url.rpartition(":")[2]))
        try:
            with httpx.stream(
                "POST", f"{made.url}/generate", json=CHAT | {"stream": True}, headers={"X-API-Key": KEY}
            ) as response:
                wait_for(lambda: manager.sinks)
                lines = response.iter_lines()
                for text in ("one", " two", " three"):  # each is read before the next is made
                    manager.push("seq-0", Delta(text, (1,), (0,), (5,)))
                    event = next(line for line in lines if line)
                    assert json.loads(event.removeprefix("data: "))["text"] == text
            wait_for(lambda: manager.cancelled == ["seq-0"])
        finally:
            made.close()


# ---- bad input ---------------------------------------------------------------------------------------------------


def test_a_server_that_needs_no_key_is_not_published(fake: Fake) -> None:
    with serving(HandLLM()) as url, pytest.raises(TunnelError, match="answers without a key: give it one"):
        opened(int(url.rpartition(":")[2]))
    assert not fake.runs


def test_a_port_where_nothing_listens_is_said_before_anything_starts(fake: Fake) -> None:
    with pytest.raises(TunnelError, match="Nothing answers at port 1 of this machine: start the server first"):
        opened(1)
    assert not fake.runs


def test_no_token(fake: Fake, port: int) -> None:
    with pytest.raises(TunnelError, match="no ngrok token in the environment variable NGROK_AUTHTOKEN.*Sign up at"):
        Tunnel(port)
    assert not fake.runs


def test_a_wrong_token_is_refused_once_and_can_be_tried_again(fake: Fake, port: int) -> None:
    with pytest.raises(TunnelError, match=r"does not know this token.*\(ERR_NGROK_107\)") as caught:
        opened(port, token="wrong", patience_s=30.0)  # no use waiting
    assert caught.value.ngrok == 107
    assert "wrong" not in caught.value.message
    made = opened(port)  # the cell again, with the right one
    assert post(made.url).status_code == 200
    made.close()


@pytest.mark.parametrize(
    ("fail", "sentence"),
    [
        ("start 4018", "Sign up at"),
        ("start 108", "no more agents"),
        ("start 121", f"delete {FAKE} and run this again"),
        ("start 7777", "ngrok refused: something is wrong"),
        ("connect 334", "online elsewhere: stop the other notebook"),
        ("connect 15002", "leave `domain` out"),
        ("connect 725", "traffic is used up"),
    ],
)
def test_each_way_to_fail_gives_its_sentence_and_leaves_nothing(
    fake: Fake, port: int, fail: str, sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    fake.tell("fail", fail)
    with pytest.raises(TunnelError) as caught:
        opened(port)
    assert sentence in caught.value.message
    assert str(caught.value.ngrok) == fail.split()[1]
    assert TOKEN not in "".join(capfd.readouterr()) + str(caught.value)


def test_an_agent_that_says_nothing_is_given_up(fake: Fake, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel, "START_S", 1.0)
    fake.tell("fail", "silent")
    began = time.monotonic()
    with pytest.raises(TunnelError, match="did not connect within 1 s"):
        opened(port)
    assert time.monotonic() - began < 8


def test_no_internet_to_download_the_program(
    fake: Fake, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyngrok import installer

    monkeypatch.setenv("PYNGROK_NGROK_PATH", str(tmp_path / "none" / "ngrok"))
    # an address of this machine where nobody listens: what a machine without a network sees, at once
    for machine in installer.PLATFORMS if hasattr(installer, "PLATFORMS") else ():
        monkeypatch.setitem(installer.PLATFORMS, machine, "http://127.0.0.1:9/ngrok.tgz")
    monkeypatch.setattr(installer, "get_ngrok_cdn_url", lambda *_: "http://127.0.0.1:9/ngrok.tgz")
    with pytest.raises(TunnelError, match=r"could not be downloaded\. Is this machine connected"):
        opened(port)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setattr(env, "online", lambda: False)
    with pytest.raises(TunnelError, match=r"could not be downloaded\..*Kaggle.*turn it on in its settings"):
        opened(port)


def test_a_program_that_is_none(fake: Fake, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "ngrok"
    broken.write_text("half a download")
    monkeypatch.setenv("PYNGROK_NGROK_PATH", str(broken))
    with pytest.raises(TunnelError, match="ngrok program could not be started: Permission denied"):
        opened(port)


# ---- drops and leftovers -----------------------------------------------------------------------------------------


def test_an_address_that_is_freed_soon_is_waited_for(fake: Fake, port: int) -> None:
    fake.tell("fail", "connect 334")
    threading.Timer(0.6, fake.tell, ("fail", None)).start()
    made = opened(port, patience_s=10.0)
    assert post(made.url).status_code == 200
    made.close()


@pytest.mark.parametrize("how", ["killed", "endpoint gone"])
def test_a_tunnel_that_drops_is_reopened(fake: Fake, port: int, how: str) -> None:
    urls: list[str] = []
    made = opened(port, on_url=urls.append)
    try:
        if how == "killed":
            fake.tell("linger", "0.5")  # and its address is free only after a while
            os.kill(fake.runs[-1][0], signal.SIGKILL)
        else:  # as from ngrok's dashboard
            api = vars(made)["_agent"]._api
            assert httpx.delete(f"{api}/api/tunnels/{agent.NAME}").status_code == 204
        wait_for(lambda: len(urls) == 2, 15)
        wait_for(lambda: made.problem is None)
        assert made.url == urls[1]
        assert post(made.url).json()["text"] == "Hello!"
        assert len(fake.alive()) == 1
    finally:
        made.close()


def test_a_tunnel_that_is_refused_for_good_says_so_and_rests(fake: Fake, port: int) -> None:
    made = opened(port)
    fake.tell("fail", "start 107")
    os.kill(fake.runs[-1][0], signal.SIGKILL)
    wait_for(lambda: made.problem and "ERR_NGROK_107" in made.problem, 15)
    runs = len(fake.runs)
    time.sleep(0.5)
    assert len(fake.runs) == runs, "it goes on asking"
    assert "down" in repr(made)
    made.close()


def test_another_tunnel_for_the_port_takes_over(fake: Fake, port: int) -> None:
    first = opened(port)
    second = opened(port)  # the cell again, in a kernel that has forgotten the first
    try:
        time.sleep(0.6)  # long enough for the first to notice, and to leave it
        assert len(fake.alive()) == 1
        assert post(second.url).status_code == 200
        first.close()
        assert post(second.url).status_code == 200
    finally:
        second.close()
        first.close()


KERNEL = """
import sys, time
from medusa_serve.notebook.tunnel.tunnel import Tunnel
made = Tunnel(int(sys.argv[1]), token=sys.argv[2])
print(made.url, flush=True)
time.sleep(600)
"""


def test_a_killed_kernel_does_not_lock_the_address(fake: Fake, port: int) -> None:
    kernel = subprocess.Popen(
        [sys.executable, "-c", KERNEL, str(port), "of-the-kernel"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert kernel.stdout is not None
    with kernel, kernel.stdout as out:
        assert post(out.readline().strip()).status_code == 200
        os.kill(kernel.pid, signal.SIGKILL)
        kernel.wait(10)
    [orphan] = fake.alive()  # it outlives its kernel, and holds the address
    fake.tell("linger", "0.5")
    made = opened(port, patience_s=10.0)
    try:
        assert orphan not in fake.alive()
        assert post(made.url).json()["text"] == "Hello!"
        [config] = Path(tempfile.gettempdir()).glob(f"{agent.MARK}*")
        assert str(os.getpid()) in config.name
    finally:
        made.close()


def test_the_agent_of_a_kernel_that_lives_is_left_alone(fake: Fake, port: int) -> None:
    kernel = subprocess.Popen(
        [sys.executable, "-c", KERNEL, str(port), "of-the-kernel"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert kernel.stdout is not None
    with kernel, kernel.stdout as out:
        url = out.readline().strip()
        with pytest.raises(TunnelError, match="online elsewhere"):
            opened(port)
        assert post(url).status_code == 200
        os.kill(kernel.pid, signal.SIGTERM)  # no clean exit: python ends at once, without atexit
        kernel.wait(10)
    assert agent.clean_up(port) == 1


def test_an_end_of_the_process_closes_it(fake: Fake, port: int) -> None:
    code = KERNEL.replace("time.sleep(600)", "")
    subprocess.run(
        [sys.executable, "-c", code, str(port), TOKEN], cwd=ROOT, check=True, timeout=60, capture_output=True
    )


# ---- what its user should know -----------------------------------------------------------------------------------


def test_the_policy_is_said_where_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Tunnel.__new__(Tunnel)
    assert made.notice == tunnel.ANYBODY
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert made.notice == f"{tunnel.POLICY['kaggle']} {tunnel.ANYBODY}"
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    assert made.notice == f"{tunnel.POLICY['colab']} {tunnel.ANYBODY}"


# ---- the real one ------------------------------------------------------------------------------------------------


@pytest.mark.network
def test_live(port: int) -> None:
    if os.environ.get("MEDUSA_LIVE_NGROK") != "1" or not os.environ.get("NGROK_AUTHTOKEN"):
        pytest.skip("the live tunnel is not tested: set MEDUSA_LIVE_NGROK=1 and NGROK_AUTHTOKEN")
    made = Tunnel(port)
    try:
        assert made.url.startswith("https://")
        wait_for(lambda: post(made.url).status_code == 200, 30)
        assert httpx.post(f"{made.url}/generate", json=CHAT).status_code == 401
    finally:
        made.close()

"""POST /generate: both forms, the exact answer object, the stream."""

import threading

import pytest

from medusa_serve.errors import GenerationFailed, QueueFull, ShuttingDown
from medusa_serve.server.api.schemas import MOST_SEED
from medusa_serve.types import Delta, SamplingParams

from ..standins import HandLLM, HandManager, ask, error_of, events, generate, hello

ANSWER = {
    "id": "seq-0",
    "model": "stand-in",
    "text": "Hello!",
    "finish_reason": "stop",
    "seed": 7,
    "usage": {"prompt_tokens": 3, "completion_tokens": 6},
    "medusa": {"steps": 2, "drafted": 6, "accepted": 3, "acceptance": 2.5},
    "timings": {"queue_ms": 1.0, "prefill_ms": 2.0, "decode_ms": 4.0, "tokens_per_second": 1250.0},
}


def test_prompt_gives_the_exact_object() -> None:
    llm = HandLLM()
    response = generate(llm, {"prompt": "abc"})
    assert response.status_code == 200
    assert response.json() == ANSWER
    assert llm.manager.calls == [([97, 98, 99], SamplingParams(), "")]
    assert llm.manager.cancelled == []


def test_messages_go_through_the_template() -> None:
    llm = HandLLM()
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert generate(llm, {"messages": chat, "return_token_ids": True}).json()["token_ids"] == list(b"Hello!")
    assert llm.codec.decode(llm.manager.calls[0][0]) == "Be brief.\nHi"


def test_every_parameter_arrives() -> None:
    llm = HandLLM()
    body = {
        "prompt": "a\0b",
        "max_tokens": 5,
        "temperature": 1,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "seed": 2**63 - 1,
        "stop": ["x", "yz"],
        "speculation": False,
    }
    assert generate(llm, body).status_code == 200
    want = SamplingParams(5, 1.0, 0.5, 3, 0.1, 2**63 - 1, ("x", "yz"), False)
    assert llm.manager.calls[0][1] == want


@pytest.mark.parametrize(("sent", "seed"), [(2**63 - 1, 2**63 - 1), (2**63, 0), (float(2**63), 0), (MOST_SEED, 192)])
def test_a_seed_that_a_double_rounded_up_wraps_around(sent: float, seed: int) -> None:
    llm = HandLLM()
    assert generate(llm, {"prompt": "a", "seed": sent}).status_code == 200
    assert llm.manager.calls[0][1].seed == seed


def test_null_means_absent_and_zero_top_k_is_off() -> None:
    llm = HandLLM()
    names = ("messages", "max_tokens", "temperature", "top_p", "min_p", "seed", "stop", "stream", "speculation")
    body = dict.fromkeys((*names, "return_token_ids")) | {"prompt": "a", "top_k": 0}
    assert generate(llm, body).json() == ANSWER
    assert generate(llm, {"prompt": "a", "top_k": None, "stop": "one"}).status_code == 200
    assert [params for _, params, _ in llm.manager.calls] == [SamplingParams(), SamplingParams(stop=("one",))]


@pytest.mark.parametrize("token_ids", [False, True])
def test_stream(token_ids: bool) -> None:
    # pushed before the reader looks, all steps arrive as one event: nothing is lost whatever the timing
    response = generate(HandLLM(), {"prompt": "abc", "stream": True, "return_token_ids": token_ids})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no"
    got = events(response.text)
    assert "".join(event["text"] for event in got) == "Hello!"
    assert [n for event in got for n in event["tokens"]] == [1, 3, 2]
    assert [n for event in got for n in event["accepted"]] == [0, 2, 1]
    last = got[-1]
    want = ANSWER | {name: last[name] for name in ("text", "tokens", "accepted")}
    assert last == want | ({"token_ids": list(b"Hello!")} if token_ids else {})


def test_refusals_of_the_engine() -> None:
    full = generate(HandLLM(HandManager(error=QueueFull("Too many sequences wait."))), {"prompt": "a", "stream": True})
    assert (full.status_code, error_of(full)["code"], full.headers["retry-after"]) == (429, "queue_full", "1")
    stop = generate(HandLLM(HandManager(error=ShuttingDown("Stopping."))), {"prompt": "a"})
    assert (stop.status_code, error_of(stop)["code"], stop.headers["retry-after"]) == (503, "shutting_down", "5")


def failing(name: str, ids: list[int], params: SamplingParams) -> list[Delta]:
    return [
        *hello(name, ids, params)[:2],
        Delta("o", (1,), (0,), error=GenerationFailed("Not finite.")),
    ]


def test_a_failure_midway() -> None:
    plain = generate(HandLLM(HandManager(failing)), {"prompt": "a"})
    assert (plain.status_code, error_of(plain)["code"]) == (500, "generation_failed")
    assert plain.headers["x-should-retry"] == "false"
    got = events(generate(HandLLM(HandManager(failing)), {"prompt": "a", "stream": True}).text)
    assert "".join(event["text"] for event in got[:-1]) == "Hello"
    assert got[-1]["error"]["code"] == "generation_failed"


def test_the_unexpected_is_a_500_that_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def encode(self, text: str) -> list[int]:
            raise RuntimeError(f"cannot encode {text}")

    response = generate(HandLLM(codec=Broken()), {"prompt": "SECRET words"})
    assert response.status_code == 500
    assert error_of(response)["type"] == "server_error"
    assert "SECRET" not in response.text + caplog.text
    assert "RuntimeError" in caplog.text
    assert "encode" in caplog.text


def test_the_unexpected_inside_a_stream_is_an_event() -> None:
    def wrong(name: str, ids: list[int], params: SamplingParams) -> list[Delta]:
        return [Delta(b"bytes", (1,), (0,))]  # type: ignore[arg-type]

    llm = HandLLM(HandManager(wrong))
    got = events(generate(llm, {"prompt": "a", "stream": True}).text)
    assert got[-1]["error"]["type"] == "server_error"
    assert llm.manager.cancelled == ["seq-0"]


def test_tokenising_does_not_block_the_loop() -> None:
    import asyncio

    import httpx

    from medusa_serve.server.app import create_app
    from medusa_serve.server.config import ServerConfig
    from medusa_serve.server.submit import SHORT

    gate = threading.Event()
    running, most = [], []

    class Slow:
        def encode(self, text: str) -> list[int]:
            running.append(text)
            most.append(len(running))
            gate.wait(5)
            running.pop()
            return [1]

    async def go() -> None:
        app = create_app(HandLLM(codec=Slow()), ServerConfig())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            posts = [
                asyncio.create_task(client.post("/generate", json={"prompt": "a" * (SHORT + 1)})) for _ in range(5)
            ]
            while len(running) < 2:
                await asyncio.sleep(0.01)
            assert (await asyncio.wait_for(client.get("/health"), 1)).status_code == 200
            gate.set()
            assert [r.status_code for r in await asyncio.gather(*posts)] == [200] * 5

    asyncio.run(go())
    assert max(most) == 2


STATUSES = (400, 401, 404, 405, 408, 413, 415, 429, 431, 500, 503, 504)


def test_the_openapi_page_is_honest() -> None:
    (response,) = ask(HandLLM(), {"method": "GET", "url": "/openapi.json"})
    page = response.json()
    post = page["paths"]["/generate"]["post"]["responses"]
    assert set(post) == {"200", *map(str, STATUSES), "default"}
    assert set(post["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "ValidationError" not in str(page)
    fields = page["components"]["schemas"]["GenerateRequest"]
    assert fields["additionalProperties"] is False
    assert {"type": "integer", "minimum": 0, "maximum": float(MOST_SEED)} in fields["properties"]["seed"]["anyOf"]
    assert {"type": "integer", "minimum": 1, "maximum": 2**31 - 1} in fields["properties"]["max_tokens"]["anyOf"]

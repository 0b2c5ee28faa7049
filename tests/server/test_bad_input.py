"""Whatever is sent: the right status, the one error shape, the field named, nothing echoed."""

import json
from typing import Any

import pytest

from medusa_serve.server.api.schemas import MOST_SEED
from medusa_serve.server.config import ServerConfig

from .standins import HandLLM, ask, error_of

httpx = pytest.importorskip("httpx", reason="the server's tests need httpx: pip install -e '.[test]'")

MARK = "zqxj"  # stands in every value a client could find echoed
USER = {"role": "user", "content": MARK}
SURROGATE = "\\ud800"


def with_prompt(**fields: Any) -> str:
    return json.dumps({"prompt": MARK} | fields)


def raw(field: str, value: str) -> str:
    return f'{{"prompt": "{MARK}", "{field}": {value}}}'


NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", '"5"', "true", "[1]", "{}", "9" * 400)
WRONG: list[tuple[str, str | None]] = [  # body, param
    ("{}", "prompt"),
    ('{"prompt": null, "messages": null}', "prompt"),
    (with_prompt(messages=[USER]), "prompt"),
    ('{"prompt": ""}', "prompt"),
    ('{"prompt": 5}', "prompt"),
    ('{"prompt": ["zqxj"]}', "prompt"),
    (f'{{"prompt": "{MARK}{SURROGATE}"}}', "prompt"),
    (f'{{"prompt": "\\udc00{MARK}"}}', "prompt"),
    ('{"messages": []}', "messages"),
    ('{"messages": {}}', "messages"),
    ('{"messages": "zqxj"}', "messages"),
    (json.dumps({"messages": [USER] * 129}), "messages"),
    ('{"messages": ["zqxj"]}', "messages[0]"),
    ('{"messages": [null]}', "messages[0]"),
    ('{"messages": [{"role": "user"}]}', "messages[0].content"),
    ('{"messages": [{"content": "zqxj"}]}', "messages[0].role"),
    (json.dumps({"messages": [USER, {"role": "zqxj", "content": "a"}]}), "messages[1].role"),
    (json.dumps({"messages": [{"role": "user", "content": [MARK]}]}), "messages[0].content"),
    (json.dumps({"messages": [{"role": "user", "content": None}]}), "messages[0].content"),
    (json.dumps({"messages": [USER | {"name": MARK}]}), "messages[0].name"),
    (f'{{"messages": [{{"role": "user", "content": "{SURROGATE}"}}]}}', "messages[0].content"),
    (json.dumps({"messages": [{"role": "assistant", "content": MARK}]}), "messages"),
    *((raw("max_tokens", v), "max_tokens") for v in (*NUMBERS, "0", "-1", "1.5", str(2**31))),
    *((raw("seed", v), "seed") for v in (*NUMBERS, "-1", str(MOST_SEED + 1), "1.5")),
    *((raw("top_k", v), "top_k") for v in (*NUMBERS, "-1", "2.5", str(2**31))),
    *((raw("temperature", v), "temperature") for v in (*NUMBERS, "-0.1", "100.5")),
    *((raw("top_p", v), "top_p") for v in (*NUMBERS, "0", "-1", "1.01")),
    *((raw("min_p", v), "min_p") for v in (*NUMBERS, "-0.01", "1.01")),
    *((raw(f, v), f) for f in ("stream", "speculation", "return_token_ids") for v in ("1", '"true"', "[]", "{}")),
    (raw("stop", "5"), "stop"),
    (raw("stop", "[5]"), "stop"),
    (raw("stop", "[null]"), "stop"),
    (raw("stop", '""'), "stop"),
    (raw("stop", '["a", ""]'), "stop"),
    (raw("stop", '["a","b","c","d","e"]'), "stop"),
    (raw("stop", json.dumps(MARK * 17)), "stop"),
    (raw("stop", f'"{SURROGATE}"'), "stop"),
    (raw("stop", f'["{SURROGATE}"]'), "stop[0]"),
    (with_prompt(n=2), "n"),
    (with_prompt(tools=[MARK]), "tools"),
    (with_prompt(ignore_eos=True), "ignore_eos"),
    (with_prompt(inputs=MARK), "inputs"),
    (with_prompt(**{"Prompt": MARK}), "Prompt"),
    (with_prompt(**{"<script>" * 20: MARK}), None),
    (f'{{"prompt": "{MARK}", "{SURROGATE}": 1}}', None),
    ("", None),
    ("null", None),
    ("5", None),
    ('"zqxj"', None),
    ('["zqxj"]', None),
    ("zqxj", None),
    ('{"prompt": "zqxj"', None),
    ("{'prompt': 'zqxj'}", None),
    ('{"prompt": "zqxj"} zqxj', None),
    ("[" * 100_000, None),
    (raw("seed", "9" * 5000), None),
]


def test_each_gets_a_sentence_and_its_field() -> None:
    llm = HandLLM()
    bodies = [body for body, _ in WRONG]
    streamed = ['{"stream": true, ' + body[1:] for body in bodies if body.startswith('{"') and body.endswith("}")]
    replies = ask(llm, *({"content": b, "headers": {"content-type": "application/json"}} for b in bodies + streamed))
    for body, reply in zip(bodies + streamed, replies, strict=True):
        assert reply.status_code == 400, body[:80]
        assert error_of(reply)["type"] == "invalid_request_error", body[:80]
        assert MARK not in reply.text, body[:80]
        assert len(reply.content) < 400, body[:80]
    got = [error_of(reply)["param"] for reply in replies[: len(WRONG)]]
    assert [(b[:80], p) for (b, _), p in zip(WRONG, got, strict=True)] == [(b[:80], p) for b, p in WRONG]
    assert llm.manager.calls == []


def test_a_number_without_a_fraction_is_an_integer() -> None:
    """JSON has one kind of number, and schemas of JSON take 5.0 for an integer."""
    llm = HandLLM()
    (reply,) = ask(llm, {"json": {"prompt": "a", "max_tokens": 5.0, "seed": 1.0, "top_k": 2.0}})
    assert reply.status_code == 200
    params = llm.manager.calls[0][1]
    assert [type(value) for value in (params.max_tokens, params.seed, params.top_k)] == [int] * 3


@pytest.mark.parametrize("body", [b'{"prompt": "\xff\xfe"}', b'{"prompt": "\xed\xa0\x80"}', b"\x00\x01\x02", b"\xff"])
def test_bytes_that_are_no_utf8(body: bytes) -> None:
    (reply,) = ask(HandLLM(), {"content": body, "headers": {"content-type": "application/json"}})
    assert reply.status_code == 400
    error_of(reply)


def test_sentences_name_the_field() -> None:
    def message(body: dict[str, Any]) -> str:
        return error_of(ask(HandLLM(), {"json": body})[0])["message"]

    assert message({"prompt": "a", "max_tokens": "5"}) == "max_tokens must be an integer."
    assert message({"prompt": "a", "max_tokens": 0}).startswith("max_tokens must be an integer from 1")
    assert message({"prompt": "a", "foo": 1}) == "foo is not a field of this request."
    assert message({"prompt": "a", "stop": 1}) == "stop must be a string or a list of strings."
    assert message({"messages": [{"role": "x", "content": "a"}]}) == (
        "messages[0].role must be 'system', 'user' or 'assistant'."
    )


@pytest.mark.parametrize(
    "kind",
    [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonx"],
)
def test_other_content_types_are_415(kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    (reply,) = ask(HandLLM(), {"content": b'{"prompt": "zqxj"}', "headers": headers})
    assert reply.status_code == 415
    assert "-H 'Content-Type: application/json'" in error_of(reply)["message"]


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON"])
def test_json_by_any_spelling(kind: str) -> None:
    (reply,) = ask(HandLLM(), {"content": b'{"prompt": "a"}', "headers": {"content-type": kind}})
    assert reply.status_code == 200


def test_too_many_characters_never_reach_the_tokenizer() -> None:
    class Untouched:
        def encode(self, text: str) -> list[int]:
            raise AssertionError

        encode_chat = encode

    llm = HandLLM(codec=Untouched())
    long = "a" * (8 * 256 + 1)
    replies = ask(llm, {"json": {"prompt": long}}, {"json": {"messages": [USER | {"content": long[:1100]}] * 2}})
    assert [r.status_code for r in replies] == [400, 400]
    assert [error_of(r)["code"] for r in replies] == ["context_length_exceeded"] * 2
    assert [error_of(r)["param"] for r in replies] == ["prompt", "messages"]


def test_unknown_paths_and_methods() -> None:
    replies = ask(
        HandLLM(),
        {"url": "/nowhere", "json": {}},
        {"method": "GET", "url": "/generate"},
        {"method": "DELETE", "url": "/health"},
        {"method": "GET", "url": "/generate/"},
        {"method": "GET", "url": "/health/", "headers": {"host": "evil.example"}},
        {"method": "BREW", "url": "/generate"},
    )
    assert [r.status_code for r in replies] == [404, 405, 405, 404, 400, 405]
    assert [error_of(r)["code"] for r in replies[:3]] == ["not_found", "method_not_allowed", "method_not_allowed"]
    assert replies[1].headers["allow"] == "POST"
    assert not any("evil" in str(r.headers) + r.text for r in replies)


def test_bodies_over_the_limit() -> None:
    config = ServerConfig(max_body_bytes=1024)

    def post(size: int, **headers: str) -> dict[str, Any]:
        body = json.dumps({"prompt": "a" * (size - len('{"prompt": ""}'))}).encode()
        return {"content": body, "headers": {"content-type": "application/json", **headers}}

    async def chunks() -> Any:
        for _ in range(1000):
            yield b"a" * 1000

    chunked = {"content": chunks(), "headers": {"content-type": "application/json"}}
    lying = post(2000, **{"content-length": "10"})
    unrouted = {"url": "/nowhere"} | post(2000)
    replies: list[httpx.Response] = ask(HandLLM(), post(1024), post(1025), chunked, lying, unrouted, config=config)
    assert [r.status_code for r in replies] == [200, 413, 413, 413, 413]
    assert error_of(replies[1])["code"] == "body_too_large"

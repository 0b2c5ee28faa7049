"""/v1: the shapes that clients of the OpenAI API read, with and without a stream, and what is refused by name."""

from typing import Any

import pytest

from medusa_serve.errors import GenerationFailed
from medusa_serve.types import Delta, SamplingParams, TokenLogprob

from ..standins import HandLLM, HandManager, ask, completion, error_of, events

httpx = pytest.importorskip("httpx", reason="the server's tests need httpx: pip install -e '.[test]'")

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hi"}]
FACTS = {
    "seed": 7,
    "total": {"steps": 2, "drafted": 6, "accepted": 3, "acceptance": 2.5},
    "timings": {"queue_ms": 1.0, "prefill_ms": 2.0, "decode_ms": 4.0, "tokens_per_second": 1250.0},
}
USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 6,
    "total_tokens": 9,
    "completion_tokens_details": {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 3},
}


def post(url: str, body: Any, llm: Any = None) -> Any:
    return ask(llm or HandLLM(), {"url": url, "json": body})[0]


def test_a_chat_completion() -> None:
    llm = HandLLM()
    response = post(CHAT, {"messages": USER, "model": "stand-in"}, llm)
    assert response.status_code == 200
    body = response.json()
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    message = {"role": "assistant", "content": "Hello!", "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "medusa": FACTS}
    assert body == {"object": "chat.completion", "model": "stand-in", "choices": [choice], "usage": USAGE}
    assert llm.manager.calls[0][1] == SamplingParams(temperature=1.0)  # OpenAI's default


def test_a_text_completion_of_several_prompts_and_choices() -> None:
    llm = HandLLM()
    body = post(TEXT, {"prompt": ["ab", "cd"], "n": 2, "seed": 2**63 - 1, "temperature": 0}, llm).json()
    assert body["object"] == "text_completion"
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(i, "Hello!") for i in range(4)]
    assert [ids for ids, _, _ in llm.manager.calls] == [[97, 98], [97, 98], [99, 100], [99, 100]]
    assert [params.seed for _, params, _ in llm.manager.calls] == [2**63 - 1, 0] * 2
    assert body["usage"]["prompt_tokens"] == 6  # each prompt once
    assert body["usage"]["completion_tokens"] == 24


def test_every_parameter_arrives() -> None:
    llm = HandLLM()
    common = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "seed": 4,
        "stop": ["x", "y"],
        "repetition_penalty": 1.1,
        "presence_penalty": -1,
        "frequency_penalty": 2,
        "logit_bias": {"5": -100, "60": 3.5},
        "speculation": False,
    }
    chat = {"messages": USER, "max_tokens": 5, "max_completion_tokens": 6, "logprobs": True, "top_logprobs": 4}
    assert post(CHAT, common | chat, llm).status_code == 200
    assert post(TEXT, common | {"prompt": "a", "max_tokens": 6, "logprobs": 4}, llm).status_code == 200
    want = SamplingParams(**common | {"stop": ("x", "y"), "logit_bias": {5: -100, 60: 3.5}}, max_tokens=6, logprobs=4)
    assert [params for _, params, _ in llm.manager.calls] == [want, want]


def test_content_parts_developer_and_harmless_fields() -> None:
    llm = HandLLM()
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    messages = [{"role": "developer", "content": parts, "name": "me"}, *USER]
    harmless = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "parallel_tool_calls": True,
        "tools": None,
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "model": "tgi",
        "something_new": [1],
        "stream_options": {"include_usage": True},
    }
    assert post(CHAT, {"messages": messages} | harmless, llm).status_code == 200
    assert llm.codec.decode(llm.manager.calls[0][0]) == "Be brief.\nHi"


def test_a_chat_stream_with_usage() -> None:
    response = post(CHAT, {"messages": USER, "stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    first, *parts, usage = events(response.text)
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert {chunk["object"] for chunk in (first, *parts, usage)} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in (first, *parts, usage)}) == 1
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in parts) == "Hello!"
    assert [n for chunk in parts for n in chunk["medusa"]["tokens"]] == [1, 3, 2]
    assert [n for chunk in parts for n in chunk["medusa"]["accepted"]] == [0, 2, 1]
    assert {name: parts[-1]["medusa"][name] for name in FACTS} == FACTS
    assert parts[-1]["choices"][0]["finish_reason"] == "stop"
    assert (usage["choices"], usage["usage"]) == ([], USAGE)
    assert all(chunk["usage"] is None for chunk in (first, *parts))


def test_a_text_stream_of_two_choices_without_usage() -> None:
    got = events(post(TEXT, {"prompt": "ab", "stream": True, "n": 2}).text)
    texts = {0: "", 1: ""}
    for chunk in got:
        assert "usage" not in chunk
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == {0: "Hello!", 1: "Hello!"}
    assert [c["choices"][0]["finish_reason"] for c in got].count("stop") == 2


def told(name: str, ids: list[int], params: SamplingParams) -> list[Delta]:
    """Two tokens with log-probabilities, in two steps."""
    one, two = TokenLogprob(-0.5, ((72, -0.5), (0xFFFD, -2.0))), TokenLogprob(-9999.0, ((34, -0.1), (35, -3.0)))
    done = completion(name, "H!", logprobs=(one, two))
    return [Delta("H", (1,), (0,), (72,), logprobs=(one,)), Delta("!", (1,), (0,), (33,), done, logprobs=(two,))]


CONTENT = [
    {
        "token": "H",
        "logprob": -0.5,
        "bytes": [72],
        "top_logprobs": [
            {"token": "H", "logprob": -0.5, "bytes": [72]},
            {"token": "\ufffd", "logprob": -2.0, "bytes": None},
        ],
    },
    {
        "token": "!",
        "logprob": -9999.0,
        "bytes": [33],
        "top_logprobs": [
            {"token": '"', "logprob": -0.1, "bytes": [34]},
            {"token": "#", "logprob": -3.0, "bytes": [35]},
        ],
    },
]


def test_logprobs_in_both_shapes() -> None:
    def llm() -> HandLLM:
        return HandLLM(HandManager(told))

    body = {"messages": USER, "logprobs": True, "top_logprobs": 2}
    assert post(CHAT, body, llm()).json()["choices"][0]["logprobs"] == {"content": CONTENT, "refusal": None}
    parts = events(post(CHAT, body | {"stream": True}, llm()).text)[1:]
    assert [one for chunk in parts for one in chunk["choices"][0]["logprobs"]["content"]] == CONTENT
    text = post(TEXT, {"prompt": "a", "logprobs": 2}, llm()).json()["choices"][0]["logprobs"]
    assert text == {
        "tokens": ["H", "!"],
        "token_logprobs": [-0.5, -9999.0],
        "top_logprobs": [{"H": -0.5, "\ufffd": -2.0}, {"!": -9999.0, '"': -0.1, "#": -3.0}],
        "text_offset": [0, 1],
    }
    parts = events(post(TEXT, {"prompt": "a", "logprobs": 0, "stream": True}, llm()).text)
    assert [n for chunk in parts for n in chunk["choices"][0]["logprobs"]["text_offset"]] == [0, 1]
    assert parts[0]["choices"][0]["logprobs"]["top_logprobs"] is None


def test_a_failure_of_one_choice_ends_the_stream() -> None:
    def play(name: str, ids: list[int], params: SamplingParams) -> list[Delta]:
        if name == "seq-1":
            return [Delta("H", (1,), (0,), (72,), error=GenerationFailed("Not finite."))]
        return [Delta("H", (1,), (0,), (72,))]  # goes on for ever

    llm = HandLLM(HandManager(play))
    got = events(post(CHAT, {"messages": USER, "stream": True, "n": 2}, llm).text)
    assert got[-1]["error"]["code"] == "generation_failed"
    assert [c["choices"][0]["delta"].get("content") for c in got[2:-1]] == ["H", "H"]
    assert llm.manager.cancelled == ["seq-0"]
    failed = post(CHAT, {"messages": USER, "n": 2}, HandLLM(HandManager(play)))
    assert (failed.status_code, error_of(failed)["code"]) == (500, "generation_failed")


def test_a_choice_that_the_queue_refuses_takes_the_others_with_it() -> None:
    from medusa_serve.errors import QueueFull

    class Full(HandManager):
        def submit(self, *args: Any, **named: Any) -> str:
            if len(self.calls) == 2:
                raise QueueFull("Too many.")
            return super().submit(*args, **named)

    llm = HandLLM(Full(None))
    response = post(TEXT, {"prompt": "a", "n": 3}, llm)
    assert (response.status_code, error_of(response)["code"]) == (429, "queue_full")
    assert llm.manager.cancelled == ["seq-0", "seq-1"]


def test_models() -> None:
    listed, one, other = ask(
        HandLLM(),
        {"method": "GET", "url": "/v1/models"},
        {"method": "GET", "url": "/v1/models/stand-in"},
        {"method": "GET", "url": "/v1/models/zqxj/zqxj"},
    )
    assert listed.json()["object"] == "list"
    assert listed.json()["data"] == [one.json()]
    assert (one.json()["id"], one.json()["object"], one.json()["max_model_len"]) == ("stand-in", "model", 256)
    assert (other.status_code, error_of(other)["code"], "zqxj" in other.text) == (404, "model_not_found", False)
    for url, body in ((CHAT, {"messages": USER}), (TEXT, {"prompt": "a"})):
        wrong = post(url, body | {"model": "zqxj"})
        assert (wrong.status_code, error_of(wrong)["code"], "zqxj" in wrong.text) == (404, "model_not_found", False)


UNSUPPORTED = [
    ("tools", [{"type": "function", "function": {"name": "zqxj"}}]),
    ("tool_choice", "required"),
    ("functions", [{"name": "zqxj"}]),
    ("response_format", {"type": "json_object"}),
    ("response_format", {"type": "json_schema", "json_schema": {}}),
    ("response_format", {"type": "text", "x": 1}),
    ("best_of", 2),
    ("best_of", True),
    ("echo", True),
    ("echo", 0),
    ("suffix", "zqxj"),
    ("modalities", ["text", "audio"]),
    ("audio", {}),
    ("stop_token_ids", [1]),
    ("guided_regex", "(a+)+$"),
    ("chat_template", "{{ zqxj }}"),
    ("chat_template_kwargs", {"tokenize": True}),
    ("prompt_embeds", "zqxj"),
    ("use_beam_search", True),
    ("min_tokens", 5),
    ("ignore_eos", True),
    ("logits_processors", ["zqxj"]),
]


@pytest.mark.parametrize(("field", "value"), UNSUPPORTED)
@pytest.mark.parametrize("url", [CHAT, TEXT])
def test_what_would_change_the_answer_is_refused_by_name(url: str, field: str, value: Any) -> None:
    body = {"messages": USER} if url == CHAT else {"prompt": "a"}
    response = post(url, body | {field: value})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["code"], error["param"]) == ("unsupported_parameter", field)
    assert "zqxj" not in response.text


WRONG_CHAT = [
    ({}, "messages"),
    ({"messages": [{"role": "tool", "content": "zqxj"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages"),
    ({"messages": [{"role": "user", "content": ["zqxj"]}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "zqxj"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages"),
    ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": "zqxj"}]}, *USER]}, "tool_calls"),
    ({"messages": USER, "top_logprobs": 2}, "top_logprobs"),
    ({"messages": USER, "logprobs": True, "top_logprobs": 6}, "top_logprobs"),
    ({"messages": USER, "logprobs": 1}, "logprobs"),
    ({"messages": USER, "n": 0}, "n"),
    ({"messages": USER, "n": 5}, "n"),
    ({"messages": USER, "n": True}, "n"),
    ({"messages": USER, "max_completion_tokens": 0}, "max_completion_tokens"),
    ({"messages": USER, "logit_bias": {"zqxj": 1}}, "logit_bias"),
    ({"messages": USER, "logit_bias": {"05": 1}}, "logit_bias"),
    ({"messages": USER, "logit_bias": {"5": "zqxj"}}, "logit_bias"),
    ({"messages": USER, "logit_bias": {"5": 101}}, "logit_bias"),
    ({"messages": USER, "logit_bias": [5]}, "logit_bias"),
    ({"messages": USER, "presence_penalty": 2.5}, "presence_penalty"),
    ({"messages": USER, "stream_options": "zqxj"}, "stream_options"),
    ({"messages": USER, "stream_options": {"include_usage": "zqxj"}}, "stream_options.include_usage"),
    ({"messages": USER, "model": 5}, "model"),
]
WRONG_TEXT = [
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt"),
    ({"prompt": ["a"] * 9}, "prompt"),
    ({"prompt": [5]}, "prompt"),
    ({"prompt": {"zqxj": 1}}, "prompt"),
    ({"prompt": "a", "logprobs": 6}, "logprobs"),
    ({"prompt": "a", "logprobs": True}, "logprobs"),
]


@pytest.mark.parametrize(
    ("url", "body", "param"),
    [*((CHAT, body, param) for body, param in WRONG_CHAT), *((TEXT, body, param) for body, param in WRONG_TEXT)],
)
def test_wrong_bodies_are_a_400_that_names_the_field(url: str, body: Any, param: str) -> None:
    response = post(url, body)
    assert response.status_code == 400
    assert error_of(response)["param"].startswith(param)
    assert "zqxj" not in response.text


def test_request_ids_in_and_out() -> None:
    mine, none, odd, wrong = ask(
        HandLLM(),
        {"url": TEXT, "json": {"prompt": "a"}, "headers": {"X-Request-Id": "abc-1.2"}},
        {"url": TEXT, "json": {"prompt": "a"}},
        {"url": TEXT, "json": {"prompt": "a"}, "headers": {"X-Request-Id": "a b" * 100}},
        {"url": TEXT, "json": {}, "headers": {"X-Request-Id": "abc"}},
    )
    assert mine.headers["x-request-id"] == "abc-1.2"
    assert len(none.headers["x-request-id"]) == len(odd.headers["x-request-id"]) == 32
    assert (wrong.status_code, wrong.headers["x-request-id"]) == (400, "abc")


def test_the_openapi_page_tells_of_statuses_and_events() -> None:
    (response,) = ask(HandLLM(), {"method": "GET", "url": "/openapi.json"})
    page = response.json()
    for path in (CHAT, TEXT, "/generate", "/generate_stream", "/"):
        answers = page["paths"][path]["post"]["responses"]
        assert {"200", "400", "401", "404", "405", "408", "413", "415", "429", "431", "500", "503", "504"} <= set(
            answers
        )
        assert "text/event-stream" in answers["200"]["content"]
    for path in ("/info", "/metrics", "/v1/models"):
        assert {"200", "401", "405"} <= set(page["paths"][path]["get"]["responses"])
    assert "ValidationError" not in str(page)

"""text-generation-inference's API: its shapes, its reading of the parameters, and no mixing with our own form."""

from typing import Any

import pytest

from medusa_serve.types import Delta, SamplingParams, TokenLogprob

from ..standins import HandLLM, HandManager, ask, completion, error_of, events

TOLD = TokenLogprob(-0.5, ((72, -0.5), (33, -2.0)))


def two_steps(name: str, ids: list[int], params: SamplingParams) -> list[Delta]:
    """H, then ! and the end of the sequence."""
    done = completion(name, "H!", token_ids=(72, 33, 0), completion_tokens=3, logprobs=(TOLD,) * 3)
    return [
        Delta("H", (1,), (0,), (72,), logprobs=(TOLD,)),
        Delta("!", (2,), (1,), (33, 0), completion=done, logprobs=(TOLD, TOLD)),
    ]


def post(url: str, body: Any, llm: Any = None) -> Any:
    return ask(llm or HandLLM(HandManager(two_steps)), {"url": url, "json": body})[0]


def token(id: int, text: str, special: bool = False) -> dict[str, Any]:
    return {"id": id, "text": text, "logprob": -0.5, "special": special}


TOKENS = [token(72, "H"), token(33, "!"), token(0, "", True)]
MEDUSA = {"steps": 2, "drafted": 6, "accepted": -1, "acceptance": 1.0}


def test_generate_with_inputs() -> None:
    llm = HandLLM(HandManager(two_steps))
    body = post("/generate", {"inputs": "abc"}, llm).json()
    details = {"finish_reason": "eos_token", "generated_tokens": 3, "seed": 7, "prefill": [], "tokens": TOKENS}
    assert body == {"generated_text": "H!", "details": details | {"medusa": MEDUSA}}
    assert llm.manager.calls[0][:2] == ([97, 98, 99], SamplingParams(logprobs=0))


def test_the_root_answers_with_a_list_or_events() -> None:
    options = {"details": False, "return_full_text": True}
    assert post("/", {"inputs": "abc", "parameters": options}).json() == [{"generated_text": "abcH!"}]
    assert len(events(post("/", {"inputs": "abc", "stream": True}).text)) == 3


@pytest.mark.parametrize("url", ["/generate_stream", "/generate"])
def test_one_event_a_token(url: str) -> None:
    got = events(post(url, {"inputs": "abc", "stream": True, "parameters": {"top_n_tokens": 2}}).text)
    assert [event["token"] for event in got] == TOKENS
    assert [event["index"] for event in got] == [1, 2, 3]
    assert [event["generated_text"] for event in got] == [None, None, "H!"]
    facts = {"finish_reason": "eos_token", "generated_tokens": 3, "seed": 7, "input_length": 3}
    assert [event["details"] for event in got] == [None, None, facts | {"medusa": MEDUSA}]
    assert [one["id"] for one in got[0]["top_tokens"]] == [72, 33]
    medusa = [event["medusa"] for event in got if "medusa" in event]
    assert [n for part in medusa for n in part["accepted"]] == [0, 1]


def test_the_stop_string_is_no_part_of_any_token() -> None:
    def play(name: str, ids: list[int], params: SamplingParams) -> list[Delta]:
        done = completion(name, "He", token_ids=(72, 101, 108, 108), completion_tokens=4, logprobs=(TOLD,) * 4)
        return [Delta("He", (4,), (3,), (72, 101, 108, 108), completion=done, logprobs=(TOLD,) * 4)]

    body = {"inputs": "a", "parameters": {"stop": ["ll"]}}
    got = events(post("/generate_stream", body, HandLLM(HandManager(play))).text)
    assert "".join(event["token"]["text"] for event in got) == got[-1]["generated_text"] == "He"
    assert got[-1]["details"]["finish_reason"] == "stop_sequence"


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({}, {}),
        ({"max_new_tokens": 5, "seed": 3, "stop": ["a"]}, {"max_tokens": 5, "seed": 3, "stop": ("a",)}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"temperature": 1.0}, {}),  # as TGI: nothing warps, nothing samples
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"top_k": 5}, {"temperature": 1.0, "top_k": 5}),
        ({"top_p": 0.9, "temperature": 0.5}, {"temperature": 0.5, "top_p": 0.9}),
        ({"repetition_penalty": 1.2, "frequency_penalty": 0.1}, {"repetition_penalty": 1.2, "frequency_penalty": 0.1}),
        ({"top_n_tokens": 3}, {"logprobs": 3}),
        ({"best_of": 1, "watermark": False, "typical_p": 1.0, "decoder_input_details": False}, {}),
        (dict.fromkeys(("max_new_tokens", "temperature", "top_k", "truncate", "grammar", "adapter_id")), {}),
    ],
)
def test_parameters(given: Any, want: Any) -> None:
    llm = HandLLM(HandManager(two_steps))
    assert post("/generate", {"inputs": "a", "parameters": given}, llm).status_code == 200
    assert llm.manager.calls[0][1] == SamplingParams(**({"logprobs": 0} | want))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"inputs": "zqxj", "prompt": "zqxj"}, "inputs"),
        ({"inputs": "zqxj", "messages": []}, "inputs"),
        ({"inputs": "zqxj", "prompt": None}, "inputs"),
        ({"inputs": ""}, "inputs"),
        ({"inputs": 5}, "inputs"),
        ({"inputs": "zqxj", "max_tokens": 5}, "max_tokens"),
        ({"inputs": "zqxj", "parameters": {"max_tokens": 5}}, "parameters.max_tokens"),
        ({"inputs": "zqxj", "parameters": {"best_of": 2}}, "best_of"),
        ({"inputs": "zqxj", "parameters": {"watermark": True}}, "watermark"),
        ({"inputs": "zqxj", "parameters": {"grammar": {"type": "regex", "value": "zqxj"}}}, "grammar"),
        ({"inputs": "zqxj", "parameters": {"truncate": 5}}, "truncate"),
        ({"inputs": "zqxj", "parameters": {"decoder_input_details": True}}, "decoder_input_details"),
        ({"inputs": "zqxj", "parameters": {"top_n_tokens": 6}}, "top_n_tokens"),
        ({"inputs": "zqxj", "parameters": {"max_new_tokens": 0}}, "max_new_tokens"),
        ({"inputs": "zqxj", "parameters": {"stop": "zqxj"}}, "parameters.stop"),
        ({"inputs": "zqxj", "parameters": []}, "parameters"),
    ],
)
@pytest.mark.parametrize("url", ["/", "/generate", "/generate_stream"])
def test_wrong_bodies(url: str, body: Any, param: str) -> None:
    response = post(url, body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert "zqxj" not in response.text

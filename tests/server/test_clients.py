"""The clients that people have, unchanged, against a real server with a real (tiny) model: openai-python,
huggingface_hub, langchain-openai, curl."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from medusa_serve.llm import LLM
from medusa_serve.server.config import ServerConfig
from medusa_serve.types import SamplingParams

from ..tiny import save_tiny_folder
from .api.test_generate import failing
from .standins import HandLLM, HandManager, serving

openai = pytest.importorskip("openai", reason="the clients' tests need openai: pip install -e '.[test]'")

USER = [{"role": "user", "content": "Say the word again: the the the"}]
PROMPT = "the the the in an"
TOKENS = 24


class Served:
    """A server, and what it must say: greedy text for PROMPT, and for USER through the chat template."""

    def __init__(self, llm: LLM, url: str) -> None:
        self.llm, self.url, self.name = llm, url, llm.model_name
        params = SamplingParams(max_tokens=TOKENS)
        self.text, self.chat = llm.generate([PROMPT, USER], params)
        self.sampled = llm.generate(PROMPT, SamplingParams(max_tokens=TOKENS, temperature=1.0, seed=5))[0]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = save_tiny_folder(tmp_path_factory.mktemp("clients") / "tiny", eos_token_id=2)
    with LLM(str(folder), slots=4, max_context=256) as llm, serving(llm) as url:
        yield Served(llm, url)


@pytest.fixture
def client(served: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


# ---- openai-python -------------------------------------------------------------------------------------------------


def test_openai_lists_the_model(client: Any, served: Served) -> None:
    [model] = client.models.list().data
    assert model.id == served.name
    assert client.models.retrieve(served.name).object == "model"


def test_openai_chat(client: Any, served: Served) -> None:
    made = client.chat.completions.create(model=served.name, messages=USER, temperature=0, max_completion_tokens=TOKENS)
    [choice] = made.choices
    assert (choice.message.role, choice.message.content) == ("assistant", served.chat.text)
    assert choice.finish_reason == served.chat.finish_reason
    assert made.usage.completion_tokens == served.chat.completion_tokens
    details = made.usage.completion_tokens_details
    total = choice.medusa["total"]
    assert details.accepted_prediction_tokens == total["accepted"]
    assert details.rejected_prediction_tokens == total["drafted"] - total["accepted"]
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens


def test_openai_chat_stream(client: Any, served: Served) -> None:
    stream = client.chat.completions.create(
        model=served.name,
        messages=USER,
        temperature=0,
        max_tokens=TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == served.chat.text
    assert chunks[-1].choices[0].finish_reason == served.chat.finish_reason
    assert last.choices == []
    assert last.usage.completion_tokens == served.chat.completion_tokens
    assert sum(n for chunk in chunks[1:] for n in chunk.medusa["tokens"]) == served.chat.completion_tokens
    accepted = sum(n for chunk in chunks[1:] for n in chunk.medusa["accepted"])
    assert accepted == last.usage.completion_tokens_details.accepted_prediction_tokens


def test_openai_completions_with_choices_seed_and_logprobs(client: Any, served: Served) -> None:
    made = client.completions.create(model=served.name, prompt=PROMPT, max_tokens=TOKENS, n=2, seed=5, logprobs=3)
    first, second = made.choices
    assert first.text == served.sampled.text  # the seed alone decides, as does OpenAI's default temperature of 1
    assert first.text != second.text
    count = served.sampled.completion_tokens
    assert len(first.logprobs.tokens) == len(first.logprobs.token_logprobs) == count
    assert all(-9999 <= value <= 0 for value in first.logprobs.token_logprobs)
    assert all(1 <= len(top) <= 4 for top in first.logprobs.top_logprobs)  # parts of characters share a text
    for text, value, top in zip(
        first.logprobs.tokens, first.logprobs.token_logprobs, first.logprobs.top_logprobs, strict=True
    ):
        assert top[text] == value


def test_openai_usage_tells_of_speculation(client: Any, served: Served) -> None:
    """A bias that makes the model repeat one token, which the lookup drafts."""
    made = client.completions.create(model=served.name, prompt=PROMPT, max_tokens=TOKENS, logit_bias={"70": 100})
    details = made.usage.completion_tokens_details
    assert (made.usage.completion_tokens, made.choices[0].finish_reason) == (TOKENS, "length")
    assert details.accepted_prediction_tokens > TOKENS // 4
    assert details.rejected_prediction_tokens >= 0


def test_openai_completions_stream_stop_and_penalties(client: Any, served: Served) -> None:
    options = {"model": served.name, "temperature": 0, "max_tokens": TOKENS}
    stop = served.text.text[3:6]
    parts = client.completions.create(prompt=PROMPT, stop=[stop], stream=True, **options)
    assert "".join(part.choices[0].text for part in parts) == served.text.text.partition(stop)[0]
    asked = {"presence_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": {"70": 3}}
    want = served.llm.generate(PROMPT, SamplingParams(max_tokens=TOKENS, **asked | {"logit_bias": {70: 3}}))[0].text
    made = client.completions.create(prompt=PROMPT, **options, **asked)
    assert (made.choices[0].text, want == served.text.text) == (want, False)


def test_openai_chat_logprobs(client: Any, served: Served) -> None:
    made = client.chat.completions.create(
        model=served.name, messages=USER, temperature=0, max_tokens=4, logprobs=True, top_logprobs=2
    )
    content = made.choices[0].logprobs.content
    assert len(content) == made.usage.completion_tokens
    for one in content:
        assert one.token == one.top_logprobs[0].token  # greedy: the likeliest
        assert one.logprob == one.top_logprobs[0].logprob >= one.top_logprobs[1].logprob


def test_openai_errors(client: Any, served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=served.name, messages=USER, tools=[{"type": "function"}])
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "tools")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=served.name, prompt=PROMPT * 90, max_tokens=200)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=USER)
    assert caught.value.code == "model_not_found"
    assert caught.value.request_id
    lost = openai.OpenAI(base_url=f"{served.url}/v2", api_key="none", max_retries=0)
    with lost, pytest.raises(openai.NotFoundError):
        lost.models.list()


def test_openai_keys_and_an_error_within_a_stream() -> None:
    config = ServerConfig(port=0, api_key="secret")
    with serving(HandLLM(HandManager(failing)), config) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as wrong:
            with pytest.raises(openai.AuthenticationError) as refused:
                wrong.models.list()
            assert refused.value.code == "invalid_api_key"
        with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as right:
            stream = right.chat.completions.create(model="stand-in", messages=USER, stream=True)
            got = []
            with pytest.raises(openai.APIError, match="Not finite"):
                got.extend(chunk.choices[0].delta.content for chunk in stream)
            assert "".join(got) == "Hello"


def test_openai_async(served: Served) -> None:
    async def go() -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            options: dict[str, Any] = {"model": served.name, "temperature": 0, "max_tokens": TOKENS}
            made = await asyncio.gather(
                *(client.chat.completions.create(messages=USER, **options) for _ in range(6))  # more than slots
            )
            assert {one.choices[0].message.content for one in made} == {served.chat.text}
            stream = await client.completions.create(prompt=PROMPT, stream=True, **options)
            assert "".join([part.choices[0].text async for part in stream]) == served.text.text
            with pytest.raises(openai.BadRequestError):
                await client.completions.create(prompt=PROMPT, best_of=3, **options)

    asyncio.run(go())


# ---- huggingface_hub -----------------------------------------------------------------------------------------------


def test_inference_client_text_generation(served: Served) -> None:
    from huggingface_hub import InferenceClient

    client = InferenceClient(model=served.url, token="none")
    assert client.text_generation(PROMPT, max_new_tokens=TOKENS) == served.text.text
    told = client.text_generation(PROMPT, max_new_tokens=TOKENS, details=True, top_n_tokens=2)
    assert told.generated_text == served.text.text
    assert [token.id for token in told.details.tokens] == list(served.text.token_ids)
    assert "".join(token.text for token in told.details.tokens) == served.text.text
    assert told.details.finish_reason == {"length": "length", "stop": "eos_token"}[served.text.finish_reason]
    assert [len(tops) for tops in told.details.top_tokens] == [2] * served.text.completion_tokens
    assert "".join(client.text_generation(PROMPT, max_new_tokens=TOKENS, stream=True)) == served.text.text
    events = list(client.text_generation(PROMPT, max_new_tokens=TOKENS, stream=True, details=True))
    assert [event.token.id for event in events] == list(served.text.token_ids)
    assert "".join(event.token.text for event in events) == events[-1].generated_text == served.text.text
    assert events[-1].details.generated_tokens == served.text.completion_tokens
    sampled = client.text_generation(PROMPT, max_new_tokens=TOKENS, do_sample=True, seed=5)
    assert sampled == served.sampled.text


def test_inference_client_chat_and_errors(served: Served) -> None:
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import HfHubHTTPError

    client = InferenceClient(model=served.url, provider="hf-inference", token="none")
    made = client.chat_completion(USER, max_tokens=TOKENS, temperature=0)
    assert made.choices[0].message.content == served.chat.text
    chunks = list(client.chat_completion(USER, max_tokens=TOKENS, temperature=0, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == served.chat.text
    assert client.get_endpoint_info()["model_id"] == served.name
    with pytest.raises(HfHubHTTPError) as caught:
        client.text_generation(PROMPT, watermark=True)
    assert caught.value.response.status_code == 400


# ---- langchain-openai ----------------------------------------------------------------------------------------------


def test_langchain(served: Served) -> None:
    from langchain_openai import ChatOpenAI, OpenAI

    options: dict[str, Any] = {
        "base_url": f"{served.url}/v1",
        "api_key": "none",
        "model": served.name,
        "max_retries": 0,
    }
    chat = ChatOpenAI(temperature=0, max_tokens=TOKENS, **options)
    question = USER[0]["content"]
    answer = chat.invoke(question)
    assert answer.content == served.chat.text
    assert answer.usage_metadata["output_tokens"] == served.chat.completion_tokens
    assert "".join(part.content for part in chat.stream(question)) == served.chat.text
    assert OpenAI(temperature=0, max_tokens=TOKENS, **options).invoke(PROMPT) == served.text.text


# ---- curl ----------------------------------------------------------------------------------------------------------


def curl(*arguments: str) -> str:
    assert shutil.which("curl"), "the clients' tests need curl"
    done = subprocess.run(["curl", "-sS", "--max-time", "20", *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def test_curl(served: Served) -> None:
    kind = ("-H", "Content-Type: application/json", "-d")
    body = {"messages": USER, "max_tokens": TOKENS, "temperature": 0}
    made = json.loads(curl(f"{served.url}/v1/chat/completions", *kind, json.dumps(body)))
    assert made["choices"][0]["message"]["content"] == served.chat.text
    lines = curl("-N", f"{served.url}/v1/chat/completions", *kind, json.dumps(body | {"stream": True})).splitlines()
    parts = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts) == served.chat.text
    assert [line for line in lines if line][-1] == "data: [DONE]"
    [old] = json.loads(
        curl(served.url, *kind, json.dumps({"inputs": PROMPT, "parameters": {"max_new_tokens": TOKENS}}))
    )
    assert old["generated_text"] == served.text.text
    assert "medusa_serve_tokens_emitted_total" in curl(f"{served.url}/metrics")
    told = curl("-D", "-", "-H", "X-Request-Id: from-curl", f"{served.url}/info")
    assert "x-request-id: from-curl" in told

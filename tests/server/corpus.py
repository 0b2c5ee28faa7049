"""Bodies that strangers send, each with the status that it must get, from the classes of bugs that other servers had:
numbers that are none, ids out of range, prompts of every wrong shape, half surrogates, template and schema injection,
addresses to fetch, pickles, files, parameters that crash a step. `cases(endpoint)` has more than 300 for each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from medusa_serve.server.api.schemas import MOST_SEED

MARK = "zqxj"  # stands in every value a client could find echoed
OWN, TEXT, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
ENDPOINTS = (OWN, TEXT, CHAT)
CONTEXT = 512  # tokens, one a byte, of the server that they are for


class Case(NamedTuple):
    body: str
    status: int
    param: str | None = None  # begins with this, where it is known


NO_NUMBER = ("NaN", "Infinity", "-Infinity", "1e999", '"5"', '"NaN"', "true", "[1]", "{}", '""', f'"{MARK}"')
NO_SEED = (*NO_NUMBER, "1.5", "-1", "9" * 400, str(MOST_SEED + 1), str(2**70), "1e300")
NO_WHOLE = (*NO_SEED, str(2**63))
WHOLE = {  # field: values that are wrong, values that are right
    "max_tokens": ((*NO_WHOLE, "0", str(2**31), str(CONTEXT)), ("1", "5.0", "100", "null")),
    "top_k": ((*NO_WHOLE, str(2**31)), ("0", "1", "3.0", str(2**31 - 1), "null")),
    "seed": (NO_SEED, ("0", "1.0", str(2**63 - 1), str(2**63), str(MOST_SEED), "null")),
}
REAL = {
    "temperature": ((*NO_NUMBER, "-0.1", "100.5"), ("0", "-0.0", "5e-324", "1e-4", "2", "100", "null")),
    "top_p": ((*NO_NUMBER, "0", "-1", "1.01"), ("1", "0.5", "5e-324", "null")),
    "min_p": ((*NO_NUMBER, "-0.01", "1.01"), ("0", "0.5", "1", "null")),
    "repetition_penalty": ((*NO_NUMBER, "0", "-1", "101"), ("1", "1.1", "null")),
    "presence_penalty": ((*NO_NUMBER, "-2.1", "2.1"), ("-2", "0", "2", "null")),
    "frequency_penalty": ((*NO_NUMBER, "-2.1", "2.1"), ("-2", "0", "2", "null")),
}
NO_BIAS = (
    *('{"-1": 1}', '{"a": 1}', '{"1.5": 1}', '{"": 1}', '{"NaN": 1}', '{"1": 101}', '{"1": -101}', '{"1": NaN}'),
    *('{"1": "5"}', '{"1": true}', '{"1": null}', "[1]", "5", f'"{MARK}"', '{"01": 1}', '{"1": 1e999}', '{"1": [1]}'),
    json.dumps({str(n): 1 for n in range(301)}),
)
NO_STOP = (
    *("5", "true", "[5]", "[null]", '""', '["a", ""]', '["a","b","c","d","e"]', "{}", '[["a"]]', '"\\ud800"'),
    *(json.dumps(MARK * 17), json.dumps(["a", MARK * 17]), '["\\udc00"]', '{"a": "b"}'),
)
OTHER = {
    "stop": (NO_STOP, ('"a"', '["a"]', '["a","b","c","d"]', "[]", "null", '"\\u0000"', '"\\n\\n"')),
    "logit_bias": (NO_BIAS, ("{}", '{"0": 100}', '{"5": -100, "6": 0.5}', "null")),
    "speculation": (("1", '"true"', "[]", "{}", "0.0"), ("true", "false", "null")),
}
FIELDS = WHOLE | REAL | OTHER
LOGPROBS = {
    OWN: {"logprobs": (("-1", "6", "true", '"1"', "1.5"), ("0", "5", "null"))},
    TEXT: {"logprobs": (("-1", "6", "true", '"1"', "1.5"), ("0", "5", "null"))},
    CHAT: {
        "logprobs": (("1", '"true"', "[]"), ("true", "false", "null")),
        "top_logprobs": (("-1", "6", "true", "1", '"1"'), ("null",)),
        "max_completion_tokens": ((*NO_WHOLE, "0", str(2**31)), ("1", "5", "null")),
    },
}
CHOICES = {"n": ((*NO_WHOLE, "0", "5", "1000000000"), ("1", "2", "4", "1.0", "null"))}

UNSUPPORTED = {  # would change the answer: a 400 that names them on /v1, and no fields of /generate at all
    "tools": [{"type": "function", "function": {"name": MARK, "parameters": {}}}],
    "tool_choice": "required",
    "functions": [{"name": MARK}],
    "function_call": {"name": MARK},
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "array"}}},
    "best_of": 1_000_000,
    "echo": True,
    "suffix": MARK,
    "use_beam_search": True,
    "length_penalty": 2.0,
    "stop_token_ids": [-1],
    "min_tokens": 5,
    "ignore_eos": True,
    "include_stop_str_in_output": True,
    "bad_words": [MARK],
    "allowed_token_ids": [2**31],
    "prompt_logprobs": 1,
    "prompt_embeds": "gASVIAAAAAAAAACMBXBvc2l4",
    "truncate_prompt_tokens": -1,
    "structured_outputs": {"regex": "(a+)+$"},
    "guided_json": {"$ref": "#"},
    "guided_regex": "(a+)+$",
    "guided_choice": [MARK],
    "guided_grammar": "root ::= root",
    "grammar": "root ::= root",
    "json_schema": {"type": "object"},
    "chat_template": "{{ cycler.__init__.__globals__.os.popen('id') }}",
    "chat_template_kwargs": {"tokenize": True},
    "documents": [{"text": MARK}],
    "logits_processors": ["os.system"],
    "typical_p": 0.5,
    "audio": {"voice": MARK},
    "modalities": ["audio"],
    "web_search_options": {},
}
HARMLESS = {  # ignored on /v1, where clients send such; no fields of /generate
    "user": MARK,
    "metadata": {"a": MARK},
    "store": True,
    "service_tier": "auto",
    "lora": "../../etc/passwd",
    "n_discard": -1,
    "cache_salt": MARK,
    "priority": -5,
    "__proto__": {"a": 1},
    "{{7*7}}": MARK,
}
WEIRD = ("\u0000", "\u202e", "\ufeff", "<|im_start|>system", "{{7*7}}", "${jndi:ldap://x}", "'; DROP TABLE", "🙂" * 50)
URLS = ("http://169.254.169.254/latest", "file:///etc/passwd", "http://127.0.0.1:1/", "data:image/png;base64,AAAA")


def prompt_of(endpoint: str, text: str = MARK) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]} if endpoint == CHAT else {"prompt": text}


def _raw(endpoint: str, field: str, value: str) -> str:
    return f'{{{json.dumps(prompt_of(endpoint))[1:-1]}, "{field}": {value}}}'


def cases(endpoint: str) -> list[Case]:
    """Without `stream`, which may be put in front of every body that is an object."""
    return [*_numbers(endpoint), *_features(endpoint), *_prompts(endpoint), *_no_objects(endpoint)]


def _numbers(endpoint: str) -> Iterator[Case]:
    fields = FIELDS | LOGPROBS[endpoint] | ({} if endpoint == OWN else CHOICES)
    for field, (wrong, right) in fields.items():
        name = "max_" if field.startswith("max_") else field  # either of the two names of one thing
        yield from (Case(_raw(endpoint, field, value), 400, name) for value in wrong)
        yield from (Case(_raw(endpoint, field, value), 200) for value in right)


def _features(endpoint: str) -> Iterator[Case]:
    for field, value in UNSUPPORTED.items():
        yield Case(json.dumps(prompt_of(endpoint) | {field: value}), 400, field)
    for field, value in HARMLESS.items():
        yield Case(json.dumps(prompt_of(endpoint) | {field: value}), 400 if endpoint == OWN else 200)
    for model in (MARK, "../../x", "", "a" * 5000):
        expected = 400 if endpoint == OWN else 404
        yield Case(json.dumps(prompt_of(endpoint) | {"model": model}), expected, None)
    yield Case(json.dumps(prompt_of(endpoint) | {"model": 5}), 400, "model")


def _prompts(endpoint: str) -> Iterator[Case]:
    yield from (Case(json.dumps(prompt_of(endpoint, f"{text} {MARK}")), 200) for text in WEIRD)
    yield Case(json.dumps(prompt_of(endpoint, "a" * 3000)), 400)  # longer than the context could be
    yield Case(json.dumps(prompt_of(endpoint, "a" * CONTEXT)), 400)
    surrogates = ("\\ud800", "\\udc00", "a\\udfff", "\\udc00\\ud800")
    base = json.dumps(prompt_of(endpoint, "HERE"))
    yield from (Case(base.replace("HERE", text), 400) for text in surrogates)
    yield Case(base.replace("HERE", "\\ud83d\\ude42"), 200)  # both halves
    yield Case('{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}', 400 if endpoint == OWN else 200)
    yield Case("{}", 400)
    if endpoint != CHAT:
        for value in ("null", "5", "true", "{}", '""', "[]", "[5]", "[[1, 2]]", '[""]', "[null]", "-1", "NaN"):
            yield Case(f'{{"prompt": {value}}}', 400, "prompt")
        yield Case('{"prompt": ["a", "b"]}', 200 if endpoint == TEXT else 400)
        yield Case(json.dumps({"prompt": ["a"] * 9}), 400, "prompt")
    if endpoint != TEXT:
        yield from _messages(endpoint)


def _messages(endpoint: str) -> Iterator[Case]:
    user = {"role": "user", "content": MARK}
    wrong: list[Any] = [None, [], {}, MARK, 5, [MARK], [None], [[]], [{}], [{"role": "user"}], [{"content": MARK}]]
    wrong += [[{"role": role, "content": MARK}] for role in ("tool", "function", "", "User", 5, None, "root")]
    wrong += [[{"role": "user", "content": content}] for content in (5, True, {}, [], [5], [None], [{}], None)]
    wrong += [[user] * 129, [user, MARK], [user, None]]
    wrong += [[{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": [{"text": MARK}]}]]
    wrong += [
        [{"role": "user", "content": [{"type": kind, kind: {"url": url}}]}]
        for kind in ("image_url", "input_audio", "video_url", "file")
        for url in URLS
    ]
    yield from (Case(json.dumps({"messages": value}), 400, "messages") for value in wrong if value is not None)
    yield Case('{"messages": null}', 400)
    yield Case(json.dumps({"messages": [user] * 20}), 200)
    parts = [{"type": "text", "text": "a"}] * 3
    yield Case(json.dumps({"messages": [{"role": "user", "content": parts}]}), 200 if endpoint == CHAT else 400)


def _no_objects(endpoint: str) -> Iterator[Case]:
    texts = ("", "null", "5", '"zqxj"', '["zqxj"]', "zqxj", "{", "}", '{"prompt": "zqxj"', "{'prompt': 'zqxj'}", "NaN")
    yield from (Case(text, 400) for text in texts)
    base = json.dumps(prompt_of(endpoint))
    yield Case(base + " zqxj", 400)
    yield Case(base[:-1] + ",}", 400)
    yield Case("\ufeff" + base, 200)  # a byte order mark, which JSON's readers may skip
    yield Case("[" * 100_000, 400)
    yield Case(base[:-1] + ', "a": ' + "[" * 50_000 + "]" * 50_000 + "}", 400)
    yield Case(_raw(endpoint, "seed", "9" * 5000), 400)
    yield Case(_raw(endpoint, "stream", '"true"'), 400, "stream")
    yield Case(_raw(endpoint, "stream", "1"), 400, "stream")

"""Penalties, bias and log-probabilities through the whole engine: the same with speculation as without, and as
transformers'."""

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from medusa_serve.config import EngineConfig
from medusa_serve.errors import InvalidRequest
from medusa_serve.model.sampling.noise import gumbel
from medusa_serve.types import SamplingParams
from tests.model.rows import processors
from tests.oracles import Oracle, engine, run
from tests.tiny import VOCAB, tiny_model, tiny_prompts

TOKENS = 32
BIAS = {5: 4.0, 17: -6.0, 40: 2.5}
ASKED = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "logit_bias": BIAS},
    {"presence_penalty": 1.5, "frequency_penalty": 0.8},
    {"frequency_penalty": -0.3, "repetition_penalty": 1.2, "temperature": 0.8, "top_k": 30, "top_p": 0.95, "seed": 3},
    {"logit_bias": BIAS, "presence_penalty": 2.0, "temperature": 1.0, "seed": 4},
    {},  # a neighbour that asks for nothing
]


def test_the_same_with_and_without_speculation_alone_and_in_company():
    model = tiny_model("llama")
    prompts = tiny_prompts(len(ASKED), 5)
    prompts = [prompt * 2 if index % 2 else prompt for index, prompt in enumerate(prompts)]
    jobs = [(p, SamplingParams(max_tokens=TOKENS, **asked)) for p, asked in zip(prompts, ASKED, strict=True)]
    with engine(model, EngineConfig(slots=1, max_context=160, tree="off")) as manager:
        plain = [run(manager, [job])[0].token_ids for job in jobs]
        free = run(manager, [(prompts[0], SamplingParams(max_tokens=TOKENS))])[0].token_ids
    assert free != plain[0]  # the penalties do something
    truth = {tuple(prompt): list(ids) for prompt, ids in zip(prompts, plain, strict=True)}
    for heads, tree, slots, join in (("none", "8", 6, 2), ("random", "64", 3, 3), ("right", "16", 6, 1)):
        drafter = None if heads == "none" else Oracle(heads, VOCAB, truth)
        with engine(model, EngineConfig(slots=slots, max_context=160, tree=tree, prefill_chunk=5), drafter) as manager:
            done = run(manager, jobs, join)
            again = run(manager, jobs[::-1])[::-1]  # slots that others have used
        assert [completion.token_ids for completion in done] == plain
        assert [completion.token_ids for completion in again] == plain
        if heads == "right":  # the walk did go deep: this was not a comparison of plain with plain
            assert sum(c.accepted for c in done) > sum(c.steps for c in done)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_equals_generate_with_its_processors(family):
    model = tiny_model(family, torch.float32)
    prompt = tiny_prompts(1, 9)[0]
    ids = torch.tensor([prompt])
    options = {"repetition_penalty": 1.4, "sequence_bias": [[[token], value] for token, value in BIAS.items()]}
    want = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS, **options)[
        0, len(prompt) :
    ].tolist()
    params = SamplingParams(max_tokens=TOKENS, repetition_penalty=1.4, logit_bias=BIAS)
    oracle = Oracle("right", VOCAB, {tuple(prompt): want})
    with engine(model, EngineConfig(slots=2, max_context=128, tree="16"), oracle) as manager:
        (done,) = run(manager, [(prompt, params)])
    assert list(done.token_ids) == want
    assert done.steps < TOKENS // 2


def test_sampled_tokens_are_those_of_transformers_processors_and_the_noise():
    """Token by token: bias, repetition, temperature, top_k, top_p by transformers, then argmax with the keyed noise."""
    model = tiny_model("qwen2", torch.float32)
    prompt = tiny_prompts(1, 9)[0]
    rest = {"temperature": 1.5, "top_k": 4, "top_p": 0.9}
    params = SamplingParams(max_tokens=TOKENS, seed=1, repetition_penalty=1.5, logit_bias=BIAS, **rest)
    with engine(model, EngineConfig(slots=1, max_context=128, tree="8")) as manager:
        (done,) = run(manager, [(prompt, params)])
    ids = torch.tensor([[*prompt, *done.token_ids]])
    logits = model(ids).logits[0]
    before = LogitsProcessorList(
        [SequenceBiasLogitsProcessor({(k,): v for k, v in BIAS.items()}), RepetitionPenaltyLogitsProcessor(1.5)]
    )
    for at in range(len(prompt), ids.shape[1]):
        x = before(ids[:, :at], logits[at - 1][None])
        noise = gumbel(torch.tensor([[1]]), torch.tensor([[at]]), torch.arange(VOCAB))
        assert int((processors(**rest)(None, x) + noise).argmax()) == int(ids[0, at])


@pytest.mark.parametrize("tree", ["off", "16"])
def test_logprobs_are_the_models_own(tree):
    model = tiny_model("llama", torch.float32)
    prompts = tiny_prompts(3, 6)
    asked = [
        SamplingParams(max_tokens=20, logprobs=3),
        SamplingParams(max_tokens=20, logprobs=0, temperature=1.0, seed=1, repetition_penalty=1.5),
        SamplingParams(max_tokens=20),
    ]
    with engine(model, EngineConfig(slots=3, max_context=64, tree=tree)) as manager:
        done = run(manager, list(zip(prompts, asked, strict=True)), join_every=2)
    assert done[2].logprobs == ()
    for completion, prompt, params in zip(done[:2], prompts, asked, strict=False):
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        want = model(ids).logits[0].log_softmax(-1)[len(prompt) - 1 :]
        assert len(completion.logprobs) == 20
        for told, token, row in zip(completion.logprobs, completion.token_ids, want, strict=False):
            assert told.logprob == pytest.approx(float(row[token]), abs=1e-4)
            best = row.topk(params.logprobs)
            assert [token for token, _ in told.top] == best.indices.tolist()
            assert [value for _, value in told.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_bias_out_of_the_vocabulary_is_refused_at_submission():
    with engine(tiny_model("llama"), EngineConfig(slots=1, max_context=64)) as manager:
        with pytest.raises(InvalidRequest, match="logit_bias") as caught:
            run(manager, [([5, 6], SamplingParams(logit_bias={VOCAB: 1.0}))])
        assert caught.value.param == "logit_bias"
        (done,) = run(manager, [([5, 6], SamplingParams(max_tokens=3, logit_bias={VOCAB - 1: 100.0}))])
    assert done.token_ids == (VOCAB - 1,) * 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", True),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {3: 101.0}),
        ("logit_bias", {3: float("inf")}),
        ("logit_bias", {"3": 1.0}),
        ("logit_bias", ((3, 1.0), (3, 2.0))),
        ("logit_bias", dict.fromkeys(range(301), 0.0)),
        ("logit_bias", 5),
        ("logprobs", -1),
        ("logprobs", 6),
        ("logprobs", True),
    ],
)
def test_nonsense_is_refused_by_name(field, value):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field


@pytest.mark.gpu
def test_in_captured_steps_on_a_gpu():
    """Graphs of penalised steps and of those with log-probabilities, beside rows that ask for nothing."""
    model = tiny_model("llama", torch.float32, hidden=64).to("cuda")
    prompts = [prompt * 3 for prompt in tiny_prompts(len(ASKED), 5)]
    told = [None, 2, None, 5, None, 0]
    jobs = [
        (prompt, SamplingParams(max_tokens=TOKENS, logprobs=num, **asked))
        for prompt, asked, num in zip(prompts, ASKED, told, strict=True)
    ]
    with engine(model, EngineConfig(slots=1, max_context=160, tree="off")) as manager:
        plain = [run(manager, [job])[0] for job in jobs]
    with engine(model, EngineConfig(slots=6, max_context=160, tree="8")) as manager:
        assert manager.runner.overlaps
        done = run(manager, jobs, join_every=2)
    assert [c.token_ids for c in done] == [c.token_ids for c in plain]
    assert sum(c.accepted for c in done) > 0
    for prompt, completion, num in zip(prompts, done, told, strict=True):
        assert len(completion.logprobs) == (0 if num is None else TOKENS)
        if num is not None:
            ids = torch.tensor([[*prompt, *completion.token_ids]], device="cuda")
            want = model(ids).logits[0].float().log_softmax(-1)[len(prompt) - 1 : -1]
            chosen = [float(row[token]) for row, token in zip(want, completion.token_ids, strict=True)]
            assert [one.logprob for one in completion.logprobs] == pytest.approx(chosen, abs=1e-3)

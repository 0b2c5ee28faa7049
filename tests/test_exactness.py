"""Greedy ids equal `generate`, whatever the heads, the tree, the company, the chunking: the oracle of the whole
engine."""

import itertools
import json

import pytest
import torch

from medusa_serve.config import EngineConfig
from medusa_serve.engine import scheduler
from medusa_serve.model.drafting.drafters import SequentialDrafter
from medusa_serve.model.drafting.heads import SequentialHeads
from medusa_serve.types import SamplingParams
from tests.oracles import NUM_HEADS, Oracle, engine, run
from tests.tiny import VOCAB, greedy, tiny_model, tiny_prompts

FAMILIES = ["llama", "qwen2", "gpt2"]
HEADS = ("none", "random", "right", "wrong")
TREES = ("off", "chain", "wide", "64")
COUNT, TOKENS = 10, 96  # prompts of a family, tokens of each
COMPARED = {"tokens": 0}
PAIRS = [(heads, tree) for heads in HEADS for tree in TREES if tree != "off" or heads in ("none", "right")]
MIXES = [(True, 5, 512, 0), (False, 8, 7, 3), (True, 7, 3, 2)]  # lookup, slots, prefill chunk, steps between arrivals


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(model, prompts, truth) of a family in float64; half of the prompts repeat themselves, so that the lookup finds
    something."""
    model = tiny_model(request.param)
    prompts = tiny_prompts(COUNT, 5)
    prompts = [prompt * 2 if index % 2 else prompt for index, prompt in enumerate(prompts)]
    truth = {tuple(prompt): greedy(model, prompt, TOKENS) for prompt in prompts}
    return model, prompts, truth


def tree_option(kind: str, heads: str, tmp_path) -> str:
    if kind in ("off", "64") or heads == "none":
        return {"chain": "5", "wide": "11"}.get(kind, kind)
    paths = {"chain": [[0] * depth for depth in range(1, NUM_HEADS + 1)], "wide": [[rank] for rank in range(10)]}[kind]
    file = tmp_path / f"{kind}.json"
    file.write_text(json.dumps(paths))
    return str(file)


def test_the_tiny_models_say_something(family):
    _, _, truth = family
    assert len({token for answer in truth.values() for token in answer}) >= 30


def compare(done, prompts, truth, lengths=None):
    for completion, prompt, count in zip(done, prompts, lengths or [TOKENS] * len(prompts), strict=True):
        assert list(completion.token_ids) == truth[tuple(prompt)][:count]
        assert completion.finish_reason == "length"
        COMPARED["tokens"] += count


@pytest.mark.parametrize(("heads", "tree"), PAIRS)
def test_greedy_ids_equal_generate(family, heads, tree, tmp_path):
    """Drafts that are refused are the slowest: with two of the mixes, which each family shifts, and fewer prompts."""
    model, prompts, truth = family
    mixes, shift = MIXES, PAIRS.index((heads, tree)) + FAMILIES.index(model.config.model_type)
    if heads in ("random", "wrong"):
        mixes = [mix for index, mix in enumerate(MIXES) if index != shift % len(MIXES)]
        prompts = prompts[:7]
    for index, (lookup, slots, chunk, join) in enumerate(mixes):
        config = EngineConfig(
            slots=slots, max_context=256, prefill_chunk=chunk, lookup=lookup, tree=tree_option(tree, heads, tmp_path)
        )
        drafter = None if heads == "none" else Oracle(heads, VOCAB, truth)
        lengths = [TOKENS - 7 * ((i + index) % 4) for i in range(len(prompts))]
        jobs = [(p, SamplingParams(max_tokens=n)) for p, n in zip(prompts, lengths, strict=True)]
        with engine(model, config, drafter) as manager:
            compare(run(manager, jobs, join), prompts, truth, lengths)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "qwen3", "mistral", "gemma2"])
def test_float32_and_more_families(name, tmp_path):
    """float32, windows and soft caps; the reference runs in the same dtype."""
    model = tiny_model(name, torch.float32)
    prompts = tiny_prompts(4, 6)
    truth = {tuple(prompt): greedy(model, prompt, 48) for prompt in prompts}
    for heads, tree in (("none", "16"), ("right", "64"), ("random", "chain")):
        drafter = None if heads == "none" else Oracle(heads, VOCAB, truth)
        config = EngineConfig(slots=3, max_context=200, prefill_chunk=5, tree=tree_option(tree, heads, tmp_path))
        with engine(model, config, drafter) as manager:
            done = run(manager, [(p, SamplingParams(max_tokens=48)) for p in prompts], 2)
        compare(done, prompts, truth, [48] * len(prompts))


@pytest.mark.parametrize("heads", ["right", "random", "sequential"])
def test_the_size_of_tree_may_change_at_every_step(family, heads, monkeypatch):
    """As the node budget changes it, through plain steps, behind which heads have drafted nothing."""
    model, prompts, truth = family
    config = EngineConfig(slots=4, max_context=256, tree="auto")
    if heads == "sequential":
        torch.manual_seed(0)
        hidden = model.config.hidden_size
        made = SequentialHeads(hidden, inner=16, readout=8, max_depth=4).double()
        made.attach(model.get_output_embeddings(), model.get_input_embeddings())
        drafter = SequentialDrafter(made.eval())
    else:
        drafter = Oracle(heads, VOCAB, truth)
    sizes = itertools.cycle([16, 1, 4, 8, 8, 2, 1, 1, 16, 4])
    used = []

    def pick(choices, ready, budget):
        used.append(next(sizes))
        return used[-1]

    monkeypatch.setattr(scheduler, "choose_nodes", pick)
    jobs = [(p, SamplingParams(max_tokens=TOKENS, speculation=i != 1)) for i, p in enumerate(prompts)]
    with engine(model, config, drafter) as manager:
        done = run(manager, jobs, 2)
    compare(done, prompts, truth)
    assert {1, 2, 4, 8, 16} <= set(used)
    if heads == "right":
        assert done[0].acceptance > 1.5


@pytest.mark.parametrize(("tree", "per_step"), [("chain", NUM_HEADS + 1), ("wide", 2)])
def test_always_right_heads_emit_depth_plus_one_tokens_a_step(family, tree, per_step, tmp_path):
    model, prompts, truth = family
    config = EngineConfig(slots=4, max_context=256, lookup=False, tree=tree_option(tree, "right", tmp_path))
    with engine(model, config, Oracle("right", VOCAB, truth)) as manager:
        done = run(manager, [(p, SamplingParams(max_tokens=TOKENS)) for p in prompts])
        compare(done, prompts, truth)
        for completion in done:
            assert completion.steps == -(-(TOKENS - 1) // per_step)
            assert (
                completion.accepted == TOKENS - 1 - completion.steps or completion.accepted == TOKENS - completion.steps
            )
            assert completion.acceptance == pytest.approx((TOKENS - 1) / completion.steps)


def test_always_wrong_heads_and_speculation_off_emit_one(family, tmp_path):
    model, prompts, truth = family
    config = EngineConfig(slots=4, max_context=256, lookup=False, tree="16")
    with engine(model, config, Oracle("wrong", VOCAB, truth)) as manager:
        (done,) = run(manager, [(prompts[0], SamplingParams(max_tokens=TOKENS))])
        assert (done.steps, done.accepted, done.drafted) == (TOKENS - 1, 0, 15 * (TOKENS - 1))
    with engine(model, config, Oracle("right", VOCAB, truth)) as manager:
        jobs = [(p, SamplingParams(max_tokens=TOKENS, speculation=i == 0)) for i, p in enumerate(prompts[:2])]
        fast, plain = run(manager, jobs)
        assert fast.steps < TOKENS // 2
        assert (plain.steps, plain.drafted, plain.accepted) == (TOKENS - 1, 0, 0)
        assert list(plain.token_ids) == truth[tuple(prompts[1])]


@pytest.mark.parametrize("heads", ["none", "right"])
def test_a_sequence_may_fill_the_context_to_its_last_token(heads):
    """Also where the model has no position left for the tree's nodes behind the end (learned positions: gpt2)."""
    model = tiny_model("gpt2", positions=64)
    prompt = tiny_prompts(1, 9)[0]
    truth = greedy(model, prompt, 55)
    config = EngineConfig(slots=2, max_context=64, tree="16")
    with engine(model, config, None if heads == "none" else Oracle("right", VOCAB, {tuple(prompt): truth})) as manager:
        (done,) = run(manager, [(prompt, SamplingParams(max_tokens=55))])
    assert list(done.token_ids) == truth


@pytest.mark.parametrize("at", [0, 1, 4, 11])
def test_eos_anywhere_in_a_path_ends_the_sequence_there(family, at):
    model, prompts, truth = family
    answer = truth[tuple(prompts[0])]
    eos = answer[at]
    end = answer.index(eos) + 1
    config = EngineConfig(slots=2, max_context=256, tree="64")
    with engine(model, config, Oracle("right", VOCAB, truth), eos=(eos,)) as manager:
        (done,) = run(manager, [(prompts[0], SamplingParams(max_tokens=TOKENS))])
        (on,) = run(manager, [(prompts[0], SamplingParams(max_tokens=TOKENS, ignore_eos=True))])
    assert (list(done.token_ids), done.finish_reason) == (answer[:end], "stop")
    assert list(on.token_ids) == answer


def test_one_token_is_prefill_alone(family):
    model, prompts, truth = family
    with engine(model, EngineConfig(slots=2, max_context=256)) as manager:
        (done,) = run(manager, [(prompts[0], SamplingParams(max_tokens=1))])
    assert (list(done.token_ids), done.steps, done.acceptance) == (truth[tuple(prompts[0])][:1], 0, None)


def test_a_reused_prefix_changes_nothing(family):
    """The second turn of a conversation reuses the KV rows of the first, with accepted draft tokens among them."""
    model, prompts, truth = family
    first, first_answer = prompts[1], truth[tuple(prompts[1])][:40]
    second = [*first, *first_answer, 5, 6, 7]
    second_answer = greedy(model, second, 40)
    oracle = Oracle("right", VOCAB, {tuple(second): second_answer, tuple(first): first_answer})
    with engine(model, EngineConfig(slots=2, max_context=400, tree="16"), oracle) as manager:
        run(manager, [(first, SamplingParams(max_tokens=40))])
        (done,) = run(manager, [(second, SamplingParams(max_tokens=40))])
        assert manager.metrics.snapshot()["reused"] == len(first) + 39  # all but the pending token
    assert list(done.token_ids) == second_answer


def test_enough_tokens_were_compared(request):
    """The claim of the issue, counted rather than believed (skipped when only a part of this file runs)."""
    ran = sum(item.name.startswith("test_greedy_ids_equal_generate") for item in request.session.items)
    if ran < len(FAMILIES) * len(PAIRS):
        pytest.skip("a part of the matrix was selected")
    print(f"{COMPARED['tokens']} tokens compared")
    assert COMPARED["tokens"] >= 100_000

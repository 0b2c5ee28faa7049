"""At T > 0: the text depends on the prompt, the parameters and the seed alone, and follows the model's distribution."""

from functools import cache

import pytest
import torch

from medusa_serve.config import EngineConfig
from medusa_serve.model.build import build_runner
from medusa_serve.types import SamplingParams
from tests.model.rows import processors
from tests.oracles import Oracle, engine, run
from tests.tiny import VOCAB, tiny_model, tiny_prompts

stats = pytest.importorskip("scipy.stats", reason="the chi-square tests need scipy: pip install -e '.[test]'")

SETTINGS = [
    {"temperature": 0.3},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 20},
    {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "min_p": 0.01},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_seeded_text_is_the_same_with_speculation_off_alone_and_in_company(dtype):
    model = tiny_model("llama", dtype)
    prompts = tiny_prompts(8, 6)
    jobs = [
        (prompt, SamplingParams(max_tokens=40, seed=40 + i, **SETTINGS[i % len(SETTINGS)]))
        for i, prompt in enumerate(prompts)
    ]
    with engine(model, EngineConfig(slots=1, max_context=256, tree="off")) as manager:
        plain = [run(manager, [job])[0].token_ids for job in jobs]
    truth = {tuple(prompt): list(ids) for prompt, ids in zip(prompts, plain, strict=True)}
    for heads, tree, slots, join in (
        ("none", "8", 8, 2),
        ("random", "64", 5, 3),
        ("right", "16", 8, 1),
        ("wrong", "4", 3, 0),
    ):
        drafter = None if heads == "none" else Oracle(heads, VOCAB, truth)
        config = EngineConfig(slots=slots, max_context=256, tree=tree, prefill_chunk=5)
        with engine(model, config, drafter) as manager:
            done = run(manager, jobs, join)
        assert [completion.token_ids for completion in done] == plain
        if heads == "right":  # the walk did go deep: this was not a comparison of plain with plain
            assert sum(c.accepted for c in done) > sum(c.steps for c in done)


def test_greedy_and_sampled_sequences_share_a_batch():
    model = tiny_model("qwen2")
    prompts = tiny_prompts(4, 6)
    params = [SamplingParams(max_tokens=40, seed=1, temperature=t) for t in (0.0, 1.0, 0.0, 0.5)]
    jobs = list(zip(prompts, params, strict=True))
    with engine(model, EngineConfig(slots=4, max_context=128, tree="off")) as manager:
        alone = [run(manager, [job])[0].token_ids for job in jobs]
        assert [c.token_ids for c in run(manager, jobs)] == alone


def test_seeds_differ_and_repeat():
    model = tiny_model("llama")
    prompt = tiny_prompts(1)[0]
    with engine(model, EngineConfig(slots=8, max_context=128)) as manager:
        params = [SamplingParams(max_tokens=30, temperature=1.0, seed=seed) for seed in (1, 2, 3, 1)]
        one, two, three, again = (c.token_ids for c in run(manager, [(prompt, p) for p in params]))
    assert one == again
    assert len({one, two, three}) == 3


PARAMS = {
    "T 1": {"temperature": 1.0},
    "T 1.1": {"temperature": 1.1},
    "T 0.7, filtered": {"temperature": 0.7, "top_k": 5, "top_p": 0.9},
}


@cache
def joint_counts(settings: str, heads: str, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(observed, expected probability) of the first two tokens after a prompt, over `rounds` × 1024 seeds, through the
    runner's own tree step. Expected: transformers' processors over plain forwards. settings: of PARAMS"""
    vocab, slots, params = 8, 1024, PARAMS[settings]
    drafter = None if heads == "none" else Oracle(heads, vocab)
    model = tiny_model("llama", torch.float32, vocab=vocab)
    prompt = [3, 5, 4, 7, 3, 5]
    built = build_runner(
        model, EngineConfig(slots=slots, max_context=16, tree="16"), eos_ids=[], max_positions=512, drafter=drafter
    )
    runner = built.runner
    observed = torch.zeros(vocab, vocab)
    runner.admit(0, prompt, SamplingParams(seed=0), 16, 0)
    runner.prefill([chunk(0, len(prompt))])
    cache = runner.forward.cache
    cache.keys[:] = cache.keys[:, :1]
    cache.values[:] = cache.values[:, :1]
    for part in range(rounds):
        tokens: list[list[int]] = [[] for _ in range(slots)]
        for slot in range(slots):
            seed = part * slots + slot
            runner.admit(slot, prompt, SamplingParams(seed=seed, **params), 16, len(prompt) - 1)
            if drafter is not None:
                runner.tables.heads.tokens[slot] = torch.arange(runner.tables.heads.tokens.shape[1]) % vocab
                runner.tables.heads.depths[slot] = 1  # the first step speculates, too
        while short := [slot for slot in range(slots) if len(tokens[slot]) < 2]:
            for out in runner.decode(short, 16).outputs():
                tokens[out.slot] += out.token_ids
        for first, second, *_ in tokens:
            observed[first, second] += 1
    runner.close()
    plain = tiny_model("llama", torch.float32, vocab=vocab)
    expected = torch.zeros(vocab, vocab)
    for first in range(vocab):
        begin = processors(**params)(None, plain(torch.tensor([prompt])).logits[:, -1]).softmax(-1)[0, first]
        after = processors(**params)(None, plain(torch.tensor([[*prompt, first]])).logits[:, -1]).softmax(-1)[0]
        expected[first] = begin * after
    return observed.flatten().double(), expected.flatten().double()


def chunk(slot: int, count: int):
    from medusa_serve.types import PrefillChunk

    return PrefillChunk(slot, count)


def p_value(observed: torch.Tensor, expected: torch.Tensor) -> float:
    likely = expected * observed.sum() >= 5
    assert observed[expected == 0].sum() == 0
    counts = torch.cat([observed[likely], observed[~likely].sum()[None]])
    wanted = torch.cat([expected[likely], expected[~likely].sum()[None]]) * observed.sum()
    keep = wanted > 0
    wanted = wanted[keep] / wanted[keep].sum() * counts[keep].sum()
    return float(stats.chisquare(counts[keep], wanted).pvalue)


@pytest.mark.parametrize("heads", ["none", "random"])
@pytest.mark.parametrize("settings", ["T 1", "T 0.7, filtered"])
def test_two_token_joints_follow_the_model(settings, heads):
    """Marginals would hide an error in the second token that depends on how the first was accepted."""
    observed, expected = joint_counts(settings, heads, rounds=10)
    assert p_value(observed, expected) > 1e-4


def test_negative_control_another_temperature_is_seen():
    observed, _ = joint_counts("T 1", "none", rounds=10)
    _, other = joint_counts("T 1.1", "none", rounds=0)
    assert p_value(observed, other) < 1e-6

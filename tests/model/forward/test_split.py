"""A model over several GPUs: which layer goes where, and that a cache in parts is a cache. The GPUs themselves are in
`tests.campaigns replicas --parts split`."""

from __future__ import annotations

import pytest
import torch

from medusa_serve.config import EngineConfig
from medusa_serve.errors import LoadError
from medusa_serve.model.forward import split
from medusa_serve.model.forward import tree_forward as forward
from medusa_serve.model.forward.slab import SlotCache
from medusa_serve.types import SamplingParams
from tests.oracles import engine, run
from tests.tiny import greedy, tiny_model, tiny_prompts


def test_layers_go_in_order_and_all_else_stays_home() -> None:
    model = tiny_model("llama", layers=5)
    found = split.device_map(model, ["a", "b", "c"], [2.0, 2.0, 1.0])
    layers = [found[f"model.layers.{index}"] for index in range(5)]
    assert layers == ["a", "a", "b", "b", "c"]
    assert {found[name] for name in ("model.embed_tokens", "model.norm", "lm_head")} == {"a"}


def test_every_weight_has_a_place() -> None:
    for family in ("llama", "gpt2", "gemma2"):
        model = tiny_model(family)
        places = split.device_map(model, ["a", "b"], [1.0, 1.0])
        for name, _ in model.named_parameters():
            assert sum(name.startswith(f"{place}.") for place in places) == 1, name


def test_a_cache_in_parts_commits_and_wipes_as_one() -> None:
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    whole = SlotCache([(2, 4, 4)] * 3, 2, 16, torch.float32, cpu)
    parts = split.SplitCache([(2, 4, 4)] * 3, 2, 16, torch.float32, [cpu] * 3, groups="aba")
    slots, columns = torch.tensor([1]), torch.tensor([[5, 6, 7, 8]])
    for layer in range(3):
        keys, values = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
        for cache in (whole, parts):
            got = cache.write(layer, slots, columns, keys, values)
            assert torch.equal(got[0][1, 5:9], keys[0].transpose(0, 1))
    for cache in (whole, parts):
        cache.commit(slots, torch.tensor([5]), torch.tensor([[0, 2, 3]]))

    def layers_of(cache) -> list[torch.Tensor]:
        none = torch.zeros(0, 2, 4, 4)
        return [cache.write(layer, slots[:0], columns[:0], none, none)[0].clone() for layer in range(3)]

    assert all(torch.equal(a, b) for a, b in zip(layers_of(whole), layers_of(parts), strict=True))
    parts.zero(1)
    assert not any(layer[1].any() for layer in layers_of(parts))
    assert parts.nbytes == whole.keys.nbytes + whole.values.nbytes


def test_a_model_whose_layers_lie_apart_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny_model("llama"), [prompt * 2 for prompt in tiny_prompts(2)]  # the lookup finds something
    want = [greedy(model, prompt, 24) for prompt in prompts]
    # two names of one CPU: all of the way that several devices take but the copies
    monkeypatch.setattr(forward, "layer_devices", lambda _: [torch.device("cpu"), torch.device("cpu:0")])
    with engine(model, EngineConfig(slots=2, max_context=128, tree="8")) as manager:
        assert isinstance(manager.runner.forward.cache, split.SplitCache)
        assert not manager.runner.forward.can_capture
        done = run(manager, [(prompt, SamplingParams(max_tokens=24)) for prompt in prompts])
    assert [list(answer.token_ids) for answer in done] == want
    assert sum(answer.accepted for answer in done) > 0


@pytest.mark.parametrize("count", [0, 1])
def test_split_needs_two_gpus(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(LoadError, match="needs two GPUs or more"):
        split.gpu_shares(100, 80)


def test_the_home_gets_fewer_layers_and_too_large_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (2**30, 2**30))
    _, shares = split.gpu_shares(2**30, 2**30 - 2**28)
    assert shares == [2**30 - 2**28, 2**30]
    with pytest.raises(LoadError, match=r"take 3\.0 GiB and 2\.0 GiB are free on 2 GPUs"):
        split.gpu_shares(3 * 2**30, 2**30)

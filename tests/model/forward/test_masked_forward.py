"""Trees by a mask, for models whose attention cannot be replaced: Falcon is the one in transformers.

pytest tests/model/test_masked.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medusa_serve.config import EngineConfig
from medusa_serve.errors import LoadError
from medusa_serve.model import build
from medusa_serve.model.build import build_runner
from medusa_serve.model.drafting.tree import Tree
from medusa_serve.model.forward.masked_forward import MaskedForward
from medusa_serve.model.forward.tree_forward import PlugInError, TreeForward
from medusa_serve.model.forward.view import tree_view
from medusa_serve.types import SamplingParams
from tests.campaigns.families import tiny
from tests.oracles import Oracle, engine, run
from tests.tiny import greedy, tiny_model, tiny_prompts

VOCAB = 97  # of `tiny`


@pytest.fixture(scope="module")
def falcon() -> Any:
    return tiny("falcon").double()


@pytest.mark.parametrize(("heads", "tree"), [("none", "16"), ("right", "64"), ("wrong", "11"), ("random", "5")])
def test_greedy_ids_equal_generate(falcon: Any, heads: str, tree: str) -> None:
    prompts = tiny_prompts(5, 6, VOCAB)
    truth = {tuple(prompt): greedy(falcon, prompt, 40) for prompt in prompts}
    drafter = None if heads == "none" else Oracle(heads, VOCAB, truth)
    config = EngineConfig(slots=3, max_context=128, prefill_chunk=4, tree=tree)
    with engine(falcon, config, drafter) as manager:
        done = run(manager, [(prompt, SamplingParams(max_tokens=40)) for prompt in prompts], 2)
    assert [list(answer.token_ids) for answer in done] == [truth[tuple(prompt)] for prompt in prompts]
    if heads == "right":
        assert max(answer.steps for answer in done) < 20, "trees are verified, not only plain steps"


def test_it_is_said_and_the_model_stays_as_it_was(falcon: Any) -> None:
    implementation = falcon.config._attn_implementation
    config = EngineConfig(slots=2, max_context=64, compile=True)
    built = build_runner(falcon, config, eos_ids=[], max_positions=256)
    assert built.tree_error is not None
    assert "the tree is a mask for this model's own attention, because its attention cannot be replaced" in " ".join(
        built.notes
    )
    assert falcon.config._attn_implementation == implementation
    built.runner.close()
    with pytest.raises(LoadError, match="exact mode cannot be had"):
        build_runner(falcon, EngineConfig(slots=2, max_context=64, exact=True), eos_ids=[], max_positions=256)


def test_both_kinds_give_the_same_logits() -> None:
    """On a model whose attention can be replaced: the mask is the reference."""
    model = tiny_model("llama")
    draft = Tree(((0,), (1,), (0, 0))).draft(torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]))
    slots, lengths = torch.tensor([2, 0]), torch.tensor([3, 0])
    made = []
    for kind in (TreeForward, MaskedForward):
        forward = kind(model, 3, 32, None)
        forward.cache.keys[:, 2, :3] = torch.randn(3, *forward.cache.keys.shape[3:], generator=torch.manual_seed(1))
        forward.cache.values[:, 2, :3] = torch.randn(3, *forward.cache.keys.shape[3:], generator=torch.manual_seed(2))
        with torch.no_grad():
            made.append(forward.run(draft.tokens, tree_view(slots, lengths, [2, 0], [3, 0], draft))[0])
        forward.close()
    assert torch.allclose(*made, atol=1e-9)


def test_a_model_that_does_not_heed_the_mask_decodes_plainly(falcon: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MaskedForward, "_options", lambda self, view: {})
    built = build_runner(falcon, EngineConfig(slots=2, max_context=64), eos_ids=[], max_positions=256)
    assert built.tree_error is None
    assert "decodes plainly, one row at a time, because its attention cannot be replaced" in " ".join(built.notes)
    built.runner.close()


def test_where_nothing_takes_a_mask_the_first_reason_is_told(falcon: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> None:
        raise PlugInError("it takes no mask")

    monkeypatch.setattr(MaskedForward, "_plug_in", refuse)
    built = build.build_runner(falcon, EngineConfig(slots=2, max_context=64), eos_ids=[], max_positions=256)
    assert built.tree_error is None
    assert built.notes[-1].endswith("because its attention cannot be replaced")
    built.runner.close()

"""The hidden states that heads read while they serve are those they were trained on.

pytest tests/model/test_forward.py
"""

import pytest
import torch

from medusa_serve.config import EngineConfig
from medusa_serve.errors import LoadError
from medusa_serve.model.drafting.drafters import SequentialDrafter
from medusa_serve.model.drafting.heads import SequentialHeads
from medusa_serve.model.drafting.tree import Tree
from medusa_serve.model.forward.hidden_tap import HiddenTap, decoder_layers
from medusa_serve.model.forward.plain_forward import PlainForward
from medusa_serve.model.forward.tree_forward import TreeForward
from medusa_serve.model.forward.view import chain_view, tree_view
from medusa_serve.training.teacher import Teacher
from medusa_serve.types import SamplingParams
from tests.oracles import engine, run
from tests.tiny import FAMILIES, HIDDEN, greedy, tiny_model, tiny_prompts

LAYERS = 3
INPUTS = (-1, 2, 0, -2)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # gemma2 computes its softmax in float32, the rest is float64
TREE = Tree(paths=((0,), (1,), (0, 0), (0, 1)))


def reference(model, ids, indexes=INPUTS):
    """transformers' own hidden states at these indexes, side by side (N, M·H)."""
    out = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    return torch.cat([out.hidden_states[index][0] for index in indexes], dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_teacher_reads_what_transformers_calls_hidden_states(family):
    model = tiny_model(family, layers=LAYERS)
    ids = tiny_prompts(1)[0]
    states, last = Teacher(model, INPUTS).hidden(torch.tensor([[*ids, 0, 0]]))
    torch.testing.assert_close(states[: len(ids)], reference(model, ids))
    torch.testing.assert_close(last, states[:, :HIDDEN])
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("indexes", [INPUTS, (-1,), (-2,), (LAYERS, 1)])
def test_a_pass_over_slots_gives_what_the_teacher_gives(family, indexes):
    """Prefill in two chunks, of which only the last token is asked for, then a tree; and the model's own cache."""
    model = tiny_model(family, layers=LAYERS)
    prompt = tiny_prompts(1)[0]
    nodes = [5, 6, 7, 8, 9]
    want = reference(model, prompt, indexes)
    paths = [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4]]  # of each node, from the root
    want_nodes = torch.stack([reference(model, [*prompt, *(nodes[i] for i in path)], indexes)[-1] for path in paths])

    plain = PlainForward(model, 1, lambda slot, length: torch.tensor(prompt[:length]), indexes)
    for start, end in ((0, 5), (5, len(prompt))):
        view = chain_view([0], [start], [end - start], model.device)
        _, hidden = plain.run(torch.tensor([prompt[start:end]]), view, last_only=True)
        torch.testing.assert_close(hidden[0], want[end - 1 : end], **CLOSE)
    plain.close()

    forward = TreeForward(model, 2, 64, None, indexes)
    for start, end in ((0, 5), (5, len(prompt))):
        view = chain_view([1], [start], [end - start], model.device)
        _, hidden = forward.run(torch.tensor([prompt[start:end]]), view, last_only=True)
        torch.testing.assert_close(hidden[0], want[end - 1 : end], **CLOSE)
    tokens = torch.tensor([nodes])
    view = tree_view(torch.tensor([1]), torch.tensor([len(prompt)]), [1], [len(prompt)], TREE.draft(tokens))
    _, hidden = forward.run(tokens, view)
    torch.testing.assert_close(hidden[0], want_nodes, **CLOSE)
    forward.close()
    assert not any(module._forward_pre_hooks for module in model.modules())


class Spy(SequentialDrafter):
    """Keeps what the heads are given."""

    def draft(self, slots, hidden, pending, length, sampling, nodes=None):
        self.seen += list(zip(hidden.clone(), pending.tolist(), length.tolist(), strict=True))
        return super().draft(slots, hidden, pending, length, sampling, nodes)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_served_heads_of_several_layers_see_the_states_they_were_trained_on(family):
    """Through the whole engine, two sequences at once; and the text stays the model's own."""
    model = tiny_model(family, layers=LAYERS)
    inputs = (-1, 1)
    teacher = Teacher(model, inputs)
    torch.manual_seed(0)
    heads = SequentialHeads(HIDDEN, inner=16, readout=8, hidden_inputs=2, max_depth=3).double()
    heads.hidden_indexes = inputs
    teacher.attach(heads)
    drafter = Spy(heads)
    drafter.seen = []
    prompts = tiny_prompts(2)
    truth = [greedy(model, prompt, 24) for prompt in prompts]
    config = EngineConfig(slots=2, max_context=128, tree="8")
    with engine(model, config, drafter) as manager:
        done = run(manager, [(prompt, SamplingParams(max_tokens=24)) for prompt in prompts])
    assert [list(completion.token_ids) for completion in done] == truth
    texts = [prompt + answer for prompt, answer in zip(prompts, truth, strict=True)]
    states = [teacher.hidden(torch.tensor([text]))[0] for text in texts]
    found = 0
    for hidden, pending, length in drafter.seen:
        for text, state in zip(texts, states, strict=True):
            if 0 < length < len(text) and text[length] == pending and torch.allclose(hidden, state[length - 1]):
                found += 1
                break
    assert found == len(drafter.seen) >= 10


def test_what_cannot_be_read_is_said():
    model = tiny_model("llama", layers=LAYERS)
    for index in (LAYERS + 1, -LAYERS - 2):
        with pytest.raises(LoadError, match=f"hidden state {index}, the model has only {LAYERS} layers"):
            HiddenTap(model, (-1, index))
    assert decoder_layers(model) is model.model.layers
    assert decoder_layers(tiny_model("gpt2")) is not None
    model.config.num_hidden_layers = 7
    with pytest.raises(LoadError, match="no list of decoder layers"):
        HiddenTap(model, (-1, 0))
    HiddenTap(model).close()  # the last state needs no layers
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layers_that_pass_on_something_else_are_refused():
    model = tiny_model("llama", layers=LAYERS)
    tap = HiddenTap(model, (-1, 1))
    model(input_ids=torch.tensor([[1, 2, 3]]))
    tap._kept[1] = tap._kept[1][None]  # four dimensions, as in models with several streams
    with pytest.raises(LoadError, match="do not pass on one by one"):
        tap.take()


@torch.no_grad()
def test_a_pass_that_is_no_sequences_touches_no_slot():
    forward = TreeForward(tiny_model("llama"), 3, 160, None)
    ids = torch.tensor(tiny_prompts(1)[:1])
    forward.run(ids, chain_view([1], [0], [ids.shape[1]], ids.device))
    slab, keys, values = forward.cache, forward.cache.keys.clone(), forward.cache.values.clone()
    want, _ = forward.run(ids[:, :4], chain_view([0], [0], [4], ids.device))
    slab.keys.copy_(keys)
    with forward.aside():
        got, _ = forward.run(ids[:, :4], chain_view([0], [0], [4], ids.device))
        forward.run(ids[:, :4].flip(1), chain_view([1], [0], [4], ids.device))
        forward.zero(1)
    assert torch.equal(got, want)
    assert forward.cache is slab
    assert torch.equal(slab.keys, keys)
    assert torch.equal(slab.values[:, 1:], values[:, 1:])
    forward.close()

"""A pass without the model's own code around its layers gives what that code gives; what is put together otherwise
keeps it."""

from functools import wraps

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from medusa_serve.model.cpu import whole_pass as native_pass
from medusa_serve.model.cpu.int_products import NativeInt4Linear
from medusa_serve.model.cpu.layers import native_layers
from medusa_serve.model.cpu.whole_pass import NativePass
from medusa_serve.model.forward.tree_forward import TreeForward
from medusa_serve.model.forward.view import chain_view
from medusa_serve.model.selftest import make_exact
from medusa_serve.model.weights.int4 import use_few_bits
from tests.model.cpu.test_layers import passes
from tests.model.test_exact import COLUMNS, SLOTS, on_steps
from tests.tiny import tiny_model


class Scaled(torch.nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


class Doubled(torch.nn.Module):
    """A norm without an ε of its own."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x) * 2


class Soft(LlamaForCausalLM):
    @wraps(LlamaForCausalLM.forward)
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 3 * (out.logits / 3).tanh()
        return out


def scaled_embedding(model):
    old = model.model.embed_tokens
    model.model.embed_tokens = Scaled(*old.weight.shape).bfloat16().requires_grad_(False)
    model.model.embed_tokens.weight.data = old.weight.data


def doubled_norm(model):
    model.model.norm = Doubled(model.model.norm)


def soft_logits(model):
    model.__class__ = Soft


def positions_that_depend_on_others(model):
    facts = model.config.to_dict() | {
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    }
    model.model.rotary_emb = type(model.model.rotary_emb)(LlamaConfig(**facts))


def hidden_states_between(model):
    class Halved(type(model.model.layers[0])):
        def __call__(self, hidden, *args, **kwargs):
            return super().__call__(hidden / 2, *args, **kwargs)

    for layer in model.model.layers:
        layer.__class__ = Halved


def forward_of(change=None, family="llama", hidden_inputs=(-1,)):
    model = on_steps(tiny_model(family, torch.float32, layers=3))
    use_few_bits(model, NativeInt4Linear)
    if change is not None:
        change(model)
    forward = TreeForward(model, SLOTS, COLUMNS, None, hidden_inputs)
    note = native_layers(forward, lambda: 0.0)
    assert make_exact(forward, None, SLOTS).startswith("exact:")
    return forward, note


@pytest.mark.parametrize(
    ("family", "hidden_inputs", "change"),
    [("llama", (-1,), None), ("mistral", (0, 2, -1), None), ("llama", (-1, 1), None), ("llama", (-1,), doubled_norm)],
)
@torch.inference_mode()
def test_a_pass_gives_what_the_models_code_gives(family, hidden_inputs, change, monkeypatch):
    forward, note = forward_of(change, family, hidden_inputs)
    assert isinstance(forward.active, NativePass)
    assert "because" not in note
    calls = []
    monkeypatch.setattr(type(forward.model), "forward", lambda *_, **__: calls.append(0))
    got = passes(forward)
    monkeypatch.undo()
    assert not calls
    forward.use(forward.active.inner, exact=True)
    wanted = passes(forward)
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, atol=0.02, rtol=0.02)
    assert torch.equal(got[-1], wanted[-1])  # what the layers wrote is the same bits
    forward.close()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (scaled_embedding, "its embedding is more than a table"),
        (soft_logits, "its logits are more than the output layer's"),
        (positions_that_depend_on_others, "its cosines and sines depend on more than a token's own position"),
        (hidden_states_between, "something happens between the layers"),
    ],
)
@torch.inference_mode()
def test_what_is_put_together_otherwise_keeps_its_code(change, why):
    forward, note = forward_of(change)
    assert not isinstance(forward.active, NativePass)
    assert note.endswith(f"; around them the model's own code runs, because {why}")
    forward.close()


@torch.inference_mode()
def test_a_pass_whose_logits_differ_is_not_taken(monkeypatch):
    monkeypatch.setattr(native_pass, "rms_norm", lambda x, weight, epsilon: x * weight)
    monkeypatch.setattr(native_pass.torch, "allclose", lambda *_, **__: True)
    forward, note = forward_of()
    assert not isinstance(forward.active, NativePass)
    assert "its logits differ by" in note
    forward.close()


@torch.inference_mode()
def test_a_pass_over_another_cache_writes_there():
    forward, _ = forward_of()
    before = forward.cache.keys.clone()
    with forward.aside():
        aside = forward.cache
        view = chain_view([0], [0], [5], torch.device("cpu"))
        forward.run(torch.arange(5)[None], view)
    assert torch.equal(forward.cache.keys, before)
    assert aside.keys[:, 0, :5].abs().sum() > 0
    forward.close()

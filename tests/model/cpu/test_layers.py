"""A CPU's traced layers and their kernels give what the model's own modules and torch's operations give."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from medusa_serve.config import EngineConfig
from medusa_serve.model.build import build_runner
from medusa_serve.model.cpu import layer_ops as native_ops
from medusa_serve.model.cpu.layers import NativeLayers, native_layers
from medusa_serve.model.drafting.tree import Tree
from medusa_serve.model.forward.hidden_tap import decoder_layers
from medusa_serve.model.forward.view import chain_view, tree_view
from medusa_serve.model.weights.int4 import Int4Linear
from tests.model.test_exact import SLOTS, forward_in
from tests.model.weights.test_int4 import eight_bits, four_bits, linear
from tests.tiny import tiny_model

PATHS = ((0,), (1,), (0, 0), (0, 0, 0))


@torch.inference_mode()
def passes(forward) -> list[torch.Tensor]:
    """Prompts of several rows, trees of several rows and of one, single tokens, then the cache."""
    found = []
    forward.cache.keys.zero_()
    forward.cache.values.zero_()
    ids = torch.arange(3 * 70).view(3, 70) * 7 % 97
    view = chain_view([2, 1, 0], [0, 0, 0], [70, 70, 70], torch.device("cpu"))
    found += [each.clone() for each in forward.run(ids, view, last_only=True)]
    for rows, nodes in ((3, 5), (1, 5), (2, 1), (1, 1)):
        tokens, lengths = ids[:rows, :nodes], [70 + nodes] * rows
        slots = list(range(rows))[::-1]
        draft = Tree(PATHS[: nodes - 1]).draft(tokens)
        view = tree_view(torch.tensor(slots), torch.tensor(lengths), slots, lengths, draft)
        found += [each.clone() for each in forward.run(tokens, view)]
    return [*found, forward.cache.keys.clone(), forward.cache.values.clone()]


@pytest.mark.parametrize(
    ("numbers", "family", "kernels"),
    [("bfloat16", "llama", 5), ("int8", "llama", 5), ("int4", "mistral", 5), ("bfloat16", "qwen3", 7),
     ("bfloat16", "qwen2", 5), ("bfloat16", "gpt2", 0)],
)  # fmt: skip
def test_traced_layers_are_the_models_own(numbers, family, kernels):
    forward = forward_in(numbers, family)
    wanted = passes(forward)
    own, layers = forward.active, NativeLayers(forward, decoder_layers(forward.model))
    forward.use(layers.over(own))
    assert layers.kernels == kernels
    calls = []
    run = layers._natives[0].run
    layers._natives[0].run = lambda *given: calls.append(0) or run(*given)
    for got, want in zip(passes(forward), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=0.05, rtol=0.02)
    assert len(calls) == 5 * 2  # passes and layers: none took the model's own way
    forward.use(own)
    layers.close()
    assert all("forward" not in vars(layer) for layer in decoder_layers(forward.model))
    for got, want in zip(passes(forward), wanted, strict=True):
        assert torch.equal(got, want)  # merged weights are the layers' own still


@pytest.mark.parametrize("make", [four_bits, eight_bits])
def test_a_merged_product_is_the_separate_ones(make):
    torch.manual_seed(0)
    parts = [Int4Linear.of(linear(make(rows, 64))) for rows in (128, 64, 192)]
    x = torch.randn(1, 5, 64).bfloat16()
    wanted = torch.cat([part(x) for part in parts], dim=-1)
    assert Int4Linear.can_merge(parts)
    whole = Int4Linear.merged(parts)
    assert torch.equal(whole(x), wanted)
    assert torch.equal(torch.cat([part(x) for part in parts], dim=-1), wanted)
    assert parts[1].packed.untyped_storage().data_ptr() == whole.packed.untyped_storage().data_ptr()
    assert not Int4Linear.can_merge([parts[0], Int4Linear.of(linear(make(80, 64)))])


def test_kernels_round_where_the_models_operations_do():
    generator = torch.Generator().manual_seed(0)

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).bfloat16()

    x, weight = random(1, 5, 72, scale=3), random(72)
    wide = x.float()
    normed = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).bfloat16()
    torch.testing.assert_close(native_ops.rms_norm(x, weight, 1e-5), normed, rtol=2**-7, atol=0)
    gate, up = random(1, 5, 130, scale=20).split([64, 66], -1)
    torch.testing.assert_close(
        native_ops.silu_times(gate, up[..., :64]), F.silu(gate) * up[..., :64], rtol=2**-7, atol=1e-9
    )
    q = random(1, 5, 96).view(1, 5, 6, 16).transpose(1, 2)
    cos, sin = random(1, 5, 16), random(1, 5, 16)
    turned = torch.cat([-q[..., 8:], q[..., :8]], -1)
    assert torch.equal(native_ops.rotate(q, cos, sin), q * cos[:, None] + turned * sin[:, None])
    slab = torch.zeros(3, 20, 6, 16).bfloat16()
    other, slots, columns = slab.clone(), torch.tensor([2]), torch.tensor([[4, 5, 9, 7, 0]])
    native_ops.write_rows(slab, slots, columns, q)
    other[slots[:, None], columns] = q.transpose(1, 2)
    assert torch.equal(slab, other)


def test_a_build_says_what_runs_and_an_option_leaves_the_layers():
    for compile_, told in ((None, True), (False, False)):
        model = tiny_model("llama", torch.bfloat16)
        built = build_runner(model, EngineConfig(compile=compile_), eos_ids=[], max_positions=512)
        assert any("layers are traced, 5" in note for note in built.notes) is told
        assert any(note.startswith("exact:") for note in built.notes)
        assert built.runner.forward.packs is told
        built.runner.close()


def test_nothing_is_kept_of_a_runner_that_was_closed():
    def closed() -> list[weakref.ref]:
        model = tiny_model("llama", torch.bfloat16)
        runner = build_runner(model, EngineConfig(), eos_ids=[], max_positions=512).runner
        forward = runner.forward
        parts = [model, forward, forward.cache, forward.active.layers, model.lm_head.weight]
        runner.close()
        return [weakref.ref(part) for part in parts]

    refs = closed()
    gc.collect()
    assert [ref() for ref in refs] == [None] * 5


def test_layers_that_do_not_pass_the_test_stay_as_they_are(monkeypatch):
    forward = forward_in("bfloat16", "llama")

    def wrong() -> float:
        raise ValueError("its logits differ")

    assert native_layers(forward, wrong) == "decoder layers stay as they are (its logits differ)"
    assert forward.active.layers is None
    assert not forward.packs
    assert len(passes(forward)) > SLOTS

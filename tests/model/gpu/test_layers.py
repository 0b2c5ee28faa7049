"""Fused decoder layers give what the model's own give: traced here, compiled with `-m gpu`.

pytest tests/model/test_layers.py
"""

import gc
import weakref

import pytest
import torch

from medusa_serve.config import EngineConfig
from medusa_serve.model.build import build_runner
from medusa_serve.model.drafting.tree import Tree
from medusa_serve.model.forward.hidden_tap import decoder_layers
from medusa_serve.model.forward.tree_forward import PlugInError, TreeForward
from medusa_serve.model.forward.view import tree_view
from medusa_serve.model.gpu.layers import FusedLayers, fuse_layers
from medusa_serve.model.selftest import check, references
from tests.campaigns.shapes import quantize_nf4
from tests.tiny import at_once, tiny_model

LAYERS, COLUMNS = 3, 160
PATHS = ((0,), (1,), (0, 0), (0, 0, 0))
QKV, GATE_UP = [f"self_attn.{name}_proj" for name in "qkv"], ["mlp.gate_proj", "mlp.up_proj"]
MERGED = {"llama": [QKV, GATE_UP], "qwen2": [QKV, GATE_UP]}


def forward_of(family: str, **options) -> TreeForward:
    return TreeForward(tiny_model(family, layers=LAYERS, **options), 3, COLUMNS, None)


def nothing() -> None: ...


def fused_of(forward: TreeForward, **options) -> FusedLayers:
    fused = FusedLayers(forward, decoder_layers(forward.model), **options)
    at_once(fused.make(nothing))
    forward.use(fused.over(forward.active, compiled=False))
    return fused


def fuse(forward: TreeForward, check, wanted: bool | None = None) -> str:
    return at_once(fuse_layers(forward, check, nothing, wanted=wanted))


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without a compiler: what Dynamo traces is run as it is."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, options=None, **how: real(function, backend="eager", **how))


@torch.inference_mode()
def passes(forward: TreeForward) -> list[torch.Tensor]:
    """Logits and hidden states of trees of several rows, of one, and of a single token, then the cache."""
    found = []
    forward.cache.keys.normal_(generator=torch.Generator().manual_seed(1))
    forward.cache.values.normal_(generator=torch.Generator().manual_seed(2))
    for rows, nodes in ((3, 5), (1, 5), (2, 1), (1, 1)):
        tokens = torch.arange(rows * nodes).view(rows, nodes) * 7 % 97
        slots, lengths = torch.arange(rows).flip(0), torch.tensor([5, 9, 3][:rows])
        draft = Tree(PATHS[: nodes - 1]).draft(tokens)
        view = tree_view(slots, lengths, slots.tolist(), lengths.tolist(), draft, packed=True)
        found += [each.clone() for each in forward.run(tokens, view)]
    return [*found, forward.cache.keys.clone(), forward.cache.values.clone()]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_traced_layers_are_the_models_own(family):
    forward = forward_of(family)
    wanted = passes(forward)
    weights = {name: value.clone() for name, value in forward.model.state_dict().items()}
    own = forward.active
    fused = fused_of(forward)
    assert len(fused._kinds) == 1
    assert fused._of[0][False].merged == MERGED.get(family, [])
    for got, want in zip(passes(forward), wanted, strict=True):
        torch.testing.assert_close(got, want)
    for name, value in forward.model.state_dict().items():
        assert torch.equal(value, weights[name])
    forward.use(own)
    fused.close()
    assert all("forward" not in vars(layer) for layer in decoder_layers(forward.model))
    for got, want in zip(passes(forward), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_a_merged_weight_is_in_memory_once():
    forward = forward_of("llama")
    layer = decoder_layers(forward.model)[1]
    fused_of(forward)
    weights = [layer.get_submodule(name).weight for name in QKV]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1


def test_nothing_is_kept_of_what_was_closed():
    def closed() -> list[weakref.ref]:
        forward = forward_of("llama")
        fused_of(forward)
        passes(forward)
        parts = [
            forward,
            forward.model,
            forward.cache,
            forward.active.layers,
            forward.active.layers._weights[1][False][1],
        ]
        forward.close()
        return [weakref.ref(part) for part in parts]

    refs = closed()
    gc.collect()
    assert [ref() for ref in refs] == [None] * 5


def test_layers_that_differ_have_functions_of_their_own():
    forward = forward_of("llama")
    layers = decoder_layers(forward.model)
    layers[1].input_layernorm.variance_epsilon = 0.5
    wanted = passes(forward)
    fused = fused_of(forward, merge=False)
    assert len(fused._kinds) == 2
    assert not fused._of[0][False].merged
    for got, want in zip(passes(forward), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_a_call_of_another_form_takes_the_models_own_code():
    """What a pass hands the layers may change; a function that was traced without it must not run."""
    forward = forward_of("llama")
    wanted = passes(forward)
    fused = fused_of(forward)

    def never(*arguments):
        raise AssertionError("a traced function ran")

    for mine in fused._of:
        for traced in mine.values():
            traced.takes, traced.run = (lambda *call: False), never
    for got, want in zip(passes(forward), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_soft_caps_cannot_be_traced():
    forward = forward_of("gemma2")
    with pytest.raises(PlugInError, match="soft cap"):
        fused_of(forward)
    note = fuse(forward, lambda: 0.0, wanted=True)
    assert note == "decoder layers stay as they are (its attention has a soft cap or sinks)"
    assert forward.active.layers is None
    assert len(passes(forward)) == 10


def test_four_bit_weights_are_not_traced():
    """Their class would fail in the middle of it, with words of its own."""
    pytest.importorskip("bitsandbytes", reason="needs the extra `quant`")
    forward = TreeForward(tiny_model("llama", torch.bfloat16, hidden=64), 3, COLUMNS, None)
    quantize_nf4(forward.model)
    assert fuse(forward, lambda: 0.0) == "decoder layers stay as they are (four-bit weights are not traced)"
    assert forward.active.layers is None


@pytest.mark.usefixtures("traced")
def test_the_self_test_decides():
    """Layers whose code was traced wrongly are not used."""
    model = tiny_model("llama", torch.float32)
    prompts, wanted = references(model, model.device)
    forward = TreeForward(model, 3, COLUMNS, None)
    calls = []

    def damaged() -> float:
        layer = forward.active.layers._of[0][False]
        calls.append(forward.active.layers.compiled)
        forward.active.layers.compiled = False
        layer.graph.forward = lambda *inputs: (torch.randn_like(next(i for i in inputs if i.dim() == 3)),)
        return check(forward, prompts, wanted, 3, packed=True)

    note = fuse(forward, damaged, wanted=True)
    assert note.startswith("decoder layers stay as they are (its logits differ"), note
    assert calls == [True, False]
    assert check(forward, prompts, wanted, 3) < 1e-4


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, True), (torch.float64, True), (torch.bfloat16, False)])
def test_only_half_precision_is_compiled_unless_it_is_asked_for(dtype, kept):
    forward, asked = forward_of("llama", dtype=dtype), []
    note = fuse(forward, lambda: asked.append(forward.active.layers.compiled) or 0.0)
    assert asked == [not kept]
    assert ("not compiled (float32 keeps its own kernels), but with merged products" in note) == kept


@pytest.mark.usefixtures("traced")
def test_between_the_parts_the_model_runs_as_it_is():
    """No part leaves traced code in a layer, and none but the one that moves the weights voids what was captured."""
    forward = forward_of("llama", dtype=torch.float32)
    wanted, layers, told, voided = passes(forward), decoder_layers(forward.model), [], []

    def check() -> float:
        told.append(all("forward" in vars(layer) for layer in layers))
        return 0.0

    moved = layers[0].self_attn.k_proj.weight.data_ptr()
    parts, count = fuse_layers(forward, check, lambda: voided.append(bool(told)), wanted=True), 0
    for _ in parts:
        count += 1
        assert forward.active.layers is None
        assert not any("forward" in vars(layer) for layer in layers)
        assert (layers[0].self_attn.k_proj.weight.data_ptr() != moved) == bool(voided)
        for got, want in zip(passes(forward), wanted, strict=True):
            assert torch.equal(got, want)
    assert count >= 5, "two functions are traced and compiled, and the weights are moved"
    assert (told, voided) == ([True], [False, True])
    assert forward.active.layers.compiled
    for got, want in zip(passes(forward), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("traced")
def test_a_compiler_that_fails_leaves_merged_products(monkeypatch):
    def broken(function, **how):
        raise RuntimeError("no gcc here")

    monkeypatch.setattr(torch, "compile", broken)
    forward, asked = forward_of("llama"), []
    wanted = passes(forward)
    note = fuse(forward, lambda: asked.append(forward.active.layers.compiled) or 0.0, wanted=True)
    assert note.startswith("decoder layers are not compiled (no gcc here), but with merged products"), note
    assert asked == [False]
    for got, want in zip(passes(forward), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_what_is_given_up_half_way_leaves_the_model_alone():
    forward = forward_of("llama")
    wanted = passes(forward)
    parts = fuse_layers(forward, lambda: 0.0, nothing, wanted=True)
    for _ in range(3):
        next(parts)
    parts.close()
    assert forward.active.layers is None
    for got, want in zip(passes(forward), wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_compiled_layers_on_a_gpu(family, dtype):
    model = tiny_model(family, getattr(torch, dtype), hidden=64).to("cuda")
    built = build_runner(
        model, EngineConfig(dtype=dtype, slots=3, max_context=96, compile=True), eos_ids=[], max_positions=512
    )
    [note] = [note for note in built.notes if "decoder layers" in note]
    assert "are compiled, with merged products" in note
    forward = built.runner.forward
    tokens = torch.arange(15, device="cuda").view(3, 5)
    slots, lengths = torch.tensor([2, 0, 1], device="cuda"), torch.tensor([5, 9, 3], device="cuda")
    found = []
    for packed in (True, False):  # the model's own layers serve passes that are not packed
        view = tree_view(slots, lengths, slots.tolist(), lengths.tolist(), Tree(PATHS).draft(tokens), packed=packed)
        with torch.inference_mode():
            found.append(forward.run(tokens, view)[0].float())
    error = float((found[0] - found[1]).norm() / found[1].norm())
    assert error < (1e-5 if dtype == "float32" else 0.05), error
    built.runner.close()

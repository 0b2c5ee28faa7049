"""Weights that are few-bit numbers already: found, read smaller, and not changed."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from medusa_serve.config import EngineConfig
from medusa_serve.errors import LoadError
from medusa_serve.model.cpu import few_bits
from medusa_serve.model.cpu.int_products import NativeInt4Linear
from medusa_serve.model.drafting.heads import SequentialHeads
from medusa_serve.model.loading import choose as choices
from medusa_serve.model.loading import load as loader
from medusa_serve.model.weights.int4 import (
    Int4Linear,
    few_bit_parts,
    int4_kind_of,
    stored_in_few_bits,
)
from tests.tiny import save_tiny_folder, tiny_tokenizer


def four_bits(rows: int, columns: int) -> torch.Tensor:
    """As a Q4_1 block is: a scale and a smallest number for 32 steps, of which both ends occur."""
    steps = torch.randint(0, 16, (rows, columns // 32, 32)).float()
    steps[..., 0], steps[..., 1] = 0, 15
    scale = torch.rand(rows, columns // 32, 1) * 0.01 + 1e-3
    return (steps * scale.half() - torch.rand(rows, columns // 32, 1).half() * 0.1).flatten(1)


def eight_bits(rows: int, columns: int) -> torch.Tensor:
    """As a Q8_0 block is: a scale for 32 numbers of -127 … 127, of which one is an end."""
    steps = torch.randint(-127, 128, (rows, columns // 32, 32)).float()
    steps[..., 5] = -127
    return (steps * (torch.rand(rows, columns // 32, 1).half() * 0.01 + 1e-3)).flatten(1)


def linear(weight: torch.Tensor, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    layer.weight.data = weight
    return layer.requires_grad_(False)


@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (48, 64), (192, 576), (80, 96), (2064, 64)])
@pytest.mark.parametrize(("make", "count"), [(four_bits, 1), (eight_bits, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_gives_what_its_weights_give(rows, columns, make, count, bias):
    torch.manual_seed(0)
    exact = linear(make(rows, columns), bias)
    layer = Int4Linear.of(exact)
    assert (layer.packed.shape[0], layer.in_features, layer.out_features) == (count, columns, rows)
    x = torch.randn(2, 5, columns)
    got = layer(x)
    assert (got.shape, got.dtype) == ((2, 5, rows), torch.bfloat16)
    wanted = x.bfloat16().double() @ exact.weight.double().T + (exact.bias.double() if bias else 0)
    assert float((got.double() - wanted).norm() / wanted.norm()) < 2**-7  # bfloat16 rounds scales and the result
    if rows < 1000:
        error = (layer.dense().double() - exact.weight.double()).abs().max()
        assert error < 2**-6 * exact.weight.abs().max()


@pytest.mark.parametrize("few_bit_parts", [few_bit_parts, few_bits.few_bit_parts])
def test_steps_and_scales_are_the_ones_it_was_made_of(few_bit_parts):
    weight = torch.tensor([[float(n % 16) for n in range(32)]]) * 0.5 - 1.0
    ((steps, scales),) = few_bit_parts(weight)
    assert steps.tolist() == [[n % 16 for n in range(32)]]
    assert scales.tolist() == [[[0.5, 3.0]]]  # (step - 8) x 0.5 + 3
    weight = torch.tensor([[-127.0, 127.0, 5.0, -16.0, *[0.0] * 28]]) * 0.25
    (high, high_scales), (low, low_scales) = few_bit_parts(weight)
    assert (16 * high.int() + low - 128)[0, :5].tolist() == [-127, 127, 5, -16, 0]
    assert (high_scales.tolist(), low_scales.tolist()) == ([[[4.0, 0.0]]], [[[0.25, 2.0]]])


@pytest.mark.parametrize("make", [four_bits, eight_bits])
def test_one_pass_finds_the_steps_that_torchs_operations_find(make):
    torch.manual_seed(0)
    weight = make(70, 96)
    weight[3, 32:64] = 0.0  # a group without a scale
    for one, other in zip(few_bits.few_bit_parts(weight), few_bit_parts(weight), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for wrong in (1e-3, torch.nan, torch.inf):
        weight[17, 40] += wrong
        assert few_bits.few_bit_parts(weight) is None
        assert few_bit_parts(weight) is None
        weight = make(70, 96)


def test_other_weights_are_left_alone():
    torch.manual_seed(0)
    assert Int4Linear.of(nn.Linear(64, 32)) is None
    on = four_bits(32, 64)
    on[17, 40] += 1e-3  # one number beside its step
    assert Int4Linear.of(linear(on)) is None
    assert Int4Linear.of(linear(four_bits(17, 64))) is None  # the kernel packs 16 rows together
    assert Int4Linear.of(linear(four_bits(32, 64)).bfloat16()) is None
    assert Int4Linear.of(linear(torch.cat([four_bits(1024, 32), eight_bits(16, 32)]))) is None


def test_no_row_sees_the_others():
    """Bitwise, for any number of rows and any place among them, past the largest product too."""
    torch.manual_seed(0)
    for make in (four_bits, eight_bits):
        layer, x = Int4Linear.of(linear(make(96, 576))), torch.randn(150, 576)
        together = layer(x)
        for count in (1, 2, 3, 4, 5, 7, 8, 16, 31, 64, 65, 128):
            for start in (0, 1, 150 - count):
                assert torch.equal(layer(x[start : start + count]), together[start : start + count])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama whose matrices are four-bit numbers, but for the eight-bit output layer."""
    torch.manual_seed(0)
    made = save_tiny_folder(
        tmp_path_factory.mktemp("few") / "bits", hidden=64, vocab=-(-len(tiny_tokenizer()) // 16) * 16
    )
    weights = load_file(made / "model.safetensors")
    for name, weight in weights.items():
        if weight.dim() == 2:
            weights[name] = (eight_bits if "lm_head" in name else four_bits)(*weight.shape)
    save_file(weights, made / "model.safetensors", {"format": "pt"})
    return made


def load(path, **options):
    return loader.load_model(EngineConfig(model=str(path), device="cpu", **options), progress=False)


@pytest.mark.parametrize("kind", [Int4Linear, NativeInt4Linear])
def test_a_model_of_such_weights_keeps_its_text(folder, kind, monkeypatch):
    monkeypatch.setattr(loader, "int4_kind", lambda cache, own: kind)
    assert stored_in_few_bits(folder)
    exact, found = load(folder, dtype="float32"), load(folder, quantize="int4")
    assert (found.numbers, found.dtype, found.weights) == ("int4", torch.bfloat16, "int4")
    assert any("not changed" in note for note in found.notes)
    layers = [module for module in found.model.modules() if isinstance(module, Int4Linear)]
    assert {type(layer) for layer in layers} == {kind} == {int4_kind_of(found.model)}
    assert any("by Numba" in note for note in found.notes) == (kind is NativeInt4Linear)
    if kind is NativeInt4Linear:
        assert {layer.bits for layer in layers} == {4, 8}
    else:
        assert {layer.packed.shape[0] for layer in layers} == {1, 2}
    assert not any(type(module) is nn.Linear for module in found.model.modules())
    assert found.model.dtype == torch.bfloat16
    assert found.model.model.rotary_emb.inv_freq.dtype == torch.float32
    ids = torch.arange(12)[None]
    wanted, got = exact.model(ids).logits.double(), found.model(ids).logits.double()
    rounded = load(folder, dtype="bfloat16").model(ids).logits.double()
    error = float((got - wanted).norm() / wanted.norm())
    assert error < 2 * float((rounded - wanted).norm() / wanted.norm())  # bfloat16 itself is no nearer


def test_heads_share_such_an_output_layer(folder):
    model = load(folder, quantize="int4").model
    assert isinstance(model.get_output_embeddings(), Int4Linear)
    heads = SequentialHeads(64, inner=32, readout=32, token_map=torch.arange(0, 60, 2))
    heads.attach(model.get_output_embeddings(), model.get_input_embeddings())
    wanted = load_file(folder / "model.safetensors")["lm_head.weight"][:60:2].bfloat16()
    torch.testing.assert_close(heads.output.weight, wanted, rtol=0, atol=2**-7 * float(wanted.abs().max()))


def test_heads_share_its_bias_too():
    torch.manual_seed(0)
    base = linear(four_bits(48, 64), bias=True)
    heads = SequentialHeads(64, inner=32, readout=32, token_map=torch.arange(0, 40, 2))
    heads.attach(Int4Linear.of(base), torch.nn.Embedding(48, 64))
    assert torch.equal(heads.output.bias, base.bias[:40:2].bfloat16())


def test_int4_never_rounds(tmp_path, monkeypatch, folder):
    other = save_tiny_folder(tmp_path / "other")
    assert not stored_in_few_bits(other)
    assert not stored_in_few_bits(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    assert not stored_in_few_bits(tmp_path)
    with pytest.raises(LoadError, match="would be rounded"):
        load(other, quantize="int4")
    asked = []

    def choose(config, formats, cache, own):
        asked.append(formats)
        return formats[-2], "of a test"

    monkeypatch.setattr(choices, "choose_format", choose)
    assert load(other).numbers == "bfloat16"
    assert load(folder).numbers == "int4"
    assert load(folder, quantize="none").numbers == "float32"
    assert asked == [("float32", "bfloat16", "int8"), ("float32", "bfloat16", "int4", "int8"), ("float32", "bfloat16")]


@pytest.fixture
def mixed(tmp_path, folder):
    """As `folder`, but some of its matrices are any numbers; the first one's rows do not tell."""
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if "up_proj" in name]:
        weights[name] = torch.randn_like(weights[name])
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / file).exists():
            (tmp_path / file).write_bytes((folder / file).read_bytes())
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def test_a_model_that_is_such_only_in_part_is_named(mixed):
    assert stored_in_few_bits(mixed)
    with pytest.raises(LoadError, match="cannot have int4 weights: only"):
        load(mixed, quantize="int4")


def test_answers_come_from_such_weights_where_all_are_and_nothing_else_was_asked_for(folder, mixed):
    def numbers(path, **options):
        return loader.load_to_answer(EngineConfig(model=str(path), device="cpu", **options)).numbers

    assert numbers(folder, quantize="none") == numbers(folder, quantize="none", dtype="bfloat16") == "int4"
    assert numbers(folder, quantize="none", dtype="float32") == "float32"
    assert numbers(folder, quantize="int8") == "int8"
    assert numbers(mixed, quantize="none", dtype="bfloat16") == "bfloat16"


def test_a_model_of_the_hub_is_looked_for_once(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LoadError):
        loader.load_to_answer(EngineConfig(model="someone/something", device="cpu", quantize="none"))
    assert capsys.readouterr().err.count("Looking for someone/something") == 1

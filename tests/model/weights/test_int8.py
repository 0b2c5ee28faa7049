"""Int8 weights: close to the model, bitwise the same for any number of rows."""

import pytest
import torch
from torch import nn

from medusa_serve.model.weights.int8 import Int8Linear, int8_product, linear_share, quantize_linears, quantized
from tests.tiny import tiny_model


def test_a_row_is_255_steps_of_its_largest_number():
    weight = torch.tensor([[1.0, -2.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [3e-4, 1e-4, -1e-4, 2e-4]])
    steps, scale = quantized(weight)
    assert steps.tolist() == [[64, -127, 32, 0], [0, 0, 0, 0], [127, 42, -42, 84]]
    error = (steps.float() * scale.float()[:, None] - weight).abs()
    assert bool((error <= 0.51 * scale.float()[:, None] + 1e-12).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_gives_what_its_weights_give(dtype, bias):
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias)
    layer = Int8Linear.of(linear)
    x = torch.randn(3, 5, 96).to(dtype)
    got = layer(x)
    assert (got.shape, got.dtype) == ((3, 5, 40), torch.bfloat16)
    exact = x.bfloat16().double() @ (layer.weight.double() * layer.scale.double()[:, None]).T
    exact = exact + (layer.bias.double() if bias else 0)
    torch.testing.assert_close(got.double(), exact, rtol=2e-2, atol=1e-2)
    part = torch.tensor([7, 3])
    some = Int8Linear(layer.weight[part], layer.scale[part], layer.bias[part] if bias else None)
    assert torch.equal(some(x), got[..., part])


def test_other_widths_are_left_alone():
    """The kernel would read past their ends."""
    model = nn.Sequential(nn.Linear(33, 8), nn.Linear(64, 33))
    quantize_linears(model)
    assert [type(layer) for layer in model] == [nn.Linear, Int8Linear]
    with pytest.raises(ValueError, match="multiple of 32 inputs, not 33"):
        int8_product(torch.ones(1, 33), torch.ones(8, 33, dtype=torch.int8), torch.ones(8, dtype=torch.bfloat16))


def test_no_row_sees_the_others():
    """Bitwise, for any number of rows and any place among them, past the largest product too."""
    torch.manual_seed(0)
    weight, scale = quantized(torch.randn(96, 576))
    x = torch.randn(150, 576)
    together = int8_product(x, weight, scale)
    for count in (1, 2, 3, 4, 5, 7, 8, 16, 31, 64, 65, 128):
        for start in (0, 1, 150 - count):
            assert torch.equal(int8_product(x[start : start + count], weight, scale), together[start : start + count])


def test_a_model_keeps_its_hooks_and_its_embedding():
    model = tiny_model("qwen2", torch.bfloat16)  # its output layer is the embedding
    ids = torch.arange(12)[None]
    exact = model(ids).logits.float()
    assert linear_share(model) > 0.9
    quantize_linears(model)
    assert not any(type(module) is nn.Linear for module in model.modules())
    assert model.get_input_embeddings().weight.dtype == model.dtype == torch.bfloat16
    assert isinstance(model.get_output_embeddings(), Int8Linear)
    got = model(ids).logits.float()
    assert 0 < float((got - exact).norm() / exact.norm()) < 0.1


def test_the_share_of_linear_layers():
    model = nn.Module()
    model.embed, model.a = nn.Embedding(1000, 32), nn.Linear(32, 10, bias=False)
    model.get_input_embeddings = lambda: model.embed
    assert linear_share(model) == 1.0
    model.conv = nn.Conv1d(32, 10, 1, bias=False)
    assert linear_share(model) == 0.5
    model.b = nn.Linear(32, 1000, bias=False)
    model.b.weight = model.embed.weight  # tied: now it is read whole
    assert linear_share(model) == pytest.approx(1010 / 1020)

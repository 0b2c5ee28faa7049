"""Draft heads: the stacked maths against straightforward loops."""

import copy

import pytest
import torch
import torch.nn.functional as F

from medusa_serve.errors import LoadError
from medusa_serve.model.drafting.heads import HydraHeads, MedusaHeads, OutputLayer, SequentialHeads, num_parameters

H, V = 16, 40
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randomised(heads):
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(std=0.3)
    return heads


def base(bias=False):
    output = torch.nn.Linear(H, V, bias=bias)
    return output, torch.nn.Embedding(V, H)


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


# --- Medusa ---


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("output", ["tied", "own", "shared", "own+bias"])
def test_medusa_equals_a_loop_over_heads(layers, bias, output):
    own = output != "tied"
    heads = MedusaHeads(
        H,
        3,
        layers,
        bias=bias,
        vocab_size=V if own else None,
        shared_output=output == "shared",
        output_bias=output == "own+bias",
    )
    randomised(heads)
    lm_head = base(bias=True)[0]
    heads.attach(lm_head)
    hidden = torch.randn(5, H)
    want = []
    for h in range(3):
        x = hidden
        for layer in range(layers):
            x = x + F.silu(x @ heads.weight[layer, h].T + (heads.bias[layer, h] if bias else 0))
        if output == "tied":
            want.append(lm_head(x))
        elif output == "shared":
            want.append(x @ heads.output.weight.T)
        else:
            want.append(x @ heads.output.weight[h].T + (heads.output.bias[h] if output == "own+bias" else 0))
    got = heads.logits(hidden)
    assert got.shape == (5, 3, V)
    torch.testing.assert_close(got, torch.stack(want, 1))
    features = heads.features(hidden)
    torch.testing.assert_close(heads.project(features[:, 1], head=1), got[:, 1])


def test_fresh_tied_heads_repeat_the_base():
    heads = MedusaHeads(H, 2, 1)
    lm_head = base()[0]
    heads.attach(lm_head)
    hidden = torch.randn(4, H)
    torch.testing.assert_close(heads.logits(hidden)[:, 1], lm_head(hidden))


@pytest.mark.parametrize("bias", [True, False])
def test_token_map_selects_rows_of_the_base(bias):
    ids = torch.tensor([7, 3, 39, 0])
    heads = randomised(MedusaHeads(H, 2, 1, token_map=ids))
    full = copy.deepcopy(heads)
    full.output.token_map = None
    lm_head = base(bias)[0]
    heads.attach(lm_head)
    full.attach(lm_head)
    hidden = torch.randn(3, H)
    assert heads.output.vocab_size == 4
    assert heads.output.weight.is_contiguous()
    torch.testing.assert_close(heads.logits(hidden), full.logits(hidden)[..., ids])


def test_the_borrowed_output_is_no_parameter_and_shared():
    heads = MedusaHeads(H, 2, 1)
    lm_head, _ = base()
    before = num_parameters(heads)
    heads.attach(lm_head)
    assert num_parameters(heads) == before == 2 * (H * H + H)
    assert set(heads.state_dict()) == {"weight", "bias"}
    assert heads.output.weight.data_ptr() == lm_head.weight.data_ptr()
    assert not heads.output.weight.requires_grad


def test_attach_may_replace_the_token_map():
    output = OutputLayer(H)
    lm_head = base()[0]
    output.attach(lm_head, torch.tensor([5, 6]))
    assert output.vocab_size == 2
    with pytest.raises(LoadError, match="own token map"):
        OutputLayer(H, vocab_size=V).attach(lm_head, torch.tensor([1]))


def test_attach_refuses_what_does_not_fit():
    with pytest.raises(LoadError, match=r"16.*32"):
        MedusaHeads(H, 1).attach(torch.nn.Linear(32, V))
    with pytest.raises(LoadError, match=r"40.*39"):
        MedusaHeads(H, 1, token_map=torch.tensor([40])).attach(base()[0])
    with pytest.raises(LoadError, match="floating-point"):
        MedusaHeads(H, 1).attach(torch.zeros(V, H, dtype=torch.int8))
    with pytest.raises(LoadError, match=r"16.*8"):
        SequentialHeads(H, inner=8, readout=4).attach(base()[0], torch.zeros(V, 8))
    with pytest.raises(RuntimeError, match="attached"):
        MedusaHeads(H, 1).logits(torch.zeros(1, H))


# --- sequential ---


def sequential(**sizes):
    heads = SequentialHeads(H, **{"inner": 12, "readout": 6, "max_depth": 3} | sizes)
    return randomised(heads)


def unrolled(heads, embedding, output, hidden, tokens):
    """The recurrence with the hidden state concatenated at each block, as the docstring's formulas read."""
    parts = torch.cat([rms(part) for part in hidden.split(H, -1)], -1)
    if heads.mix is not None:
        parts = parts @ heads.mix.weight.T + heads.mix.bias
    rows = list(heads.start_proj.weight.split(heads._splits))
    biases = list(heads.start_proj.bias.split(heads._splits))

    def block(module, parts_in, at):
        x = torch.cat([rms(p) for p in parts_in], -1) * module.norm
        joint = torch.cat([module.w_in.weight, rows[at]], 1)  # one weight over [x, hidden]
        a, b = (torch.cat([x, parts], -1) @ joint.T + biases[at]).chunk(2, -1)
        return (F.silu(a) * b) @ module.w_out.weight.T

    s = parts @ rows[0].T + biases[0]
    out = []
    for depth in range(tokens.shape[1]):
        for at, module in enumerate(heads.cell):
            s = s + block(module, [s, embedding[tokens[:, depth]]] if at == 0 else [s], at + 1)
        x = s + block(heads.readout, [s], len(heads.cell) + 1)
        if heads.to_hidden is not None:
            x = x @ heads.to_hidden.weight.T
        out.append(rms(x) * heads.norm @ output.T)
    return torch.stack(out, 1)


@pytest.mark.parametrize(
    "sizes", [{}, {"layers": 2}, {"width": 24}, {"hidden_inputs": 2}, {"width": 8, "layers": 3, "hidden_inputs": 3}]
)
def test_sequential_equals_the_unrolled_recurrence(sizes):
    heads = sequential(**sizes).double()
    lm_head, embedding = (module.double() for module in base())
    heads.attach(lm_head, embedding)
    hidden, tokens = torch.randn(4, H * heads.hidden_inputs).double(), torch.randint(V, (4, 3))
    want = unrolled(heads, embedding.weight, lm_head.weight, hidden, tokens)
    state = heads.start(hidden, tokens[:, 0])
    for depth in range(3):
        assert state.shape == (4, heads.state_sizes[depth])
        torch.testing.assert_close(heads.logits(state), want[:, depth])
        if depth < 2:
            state = heads.advance(state, tokens[:, depth + 1])
    torch.testing.assert_close(heads.project(heads.unroll(hidden, tokens)), want)


def test_sequential_rows_are_independent_and_may_be_gathered():
    heads = sequential()
    heads.attach(*base())
    hidden = torch.randn(2, H)
    state = heads.start(hidden, torch.tensor([1, 2]))
    beams = heads.advance(state[torch.tensor([0, 0, 1])], torch.tensor([3, 4, 5]))
    alone = heads.advance(heads.start(hidden[1:], torch.tensor([2])), torch.tensor([5]))
    torch.testing.assert_close(heads.logits(beams)[2:], heads.logits(alone))
    assert not torch.allclose(heads.logits(beams)[0], heads.logits(beams)[1])


def test_sequential_token_map():
    ids = torch.tensor([9, 1, 30])
    heads = sequential(token_map=ids)
    full = copy.deepcopy(heads)
    full.output.token_map = None
    parts = base()
    heads.attach(*parts)
    full.attach(*parts)
    state = heads.start(torch.randn(2, H), torch.tensor([39, 0]))  # tokens are base ids, also outside the map
    torch.testing.assert_close(heads.logits(state), full.logits(state)[:, ids])


def test_fresh_sequential_heads_are_close_to_the_base():
    heads = SequentialHeads(64)
    lm_head, embedding = torch.nn.Linear(64, V, bias=False), torch.nn.Embedding(V, 64)
    heads.attach(lm_head, embedding)
    hidden = 3 * rms(torch.randn(200, 64))
    heads.match_scale(hidden)
    got, want = heads.logits(heads.start(hidden, torch.randint(V, (200,)))), lm_head(hidden)
    assert torch.corrcoef(torch.stack([got.flatten(), want.flatten()]))[0, 1] > 0.8


def test_fresh_heads_of_several_hidden_states_start_at_the_last_one():
    """Mixed before anything else, so that further states cost little; and close to the base all the same."""
    one, three = SequentialHeads(64), SequentialHeads(64, hidden_inputs=3)
    assert num_parameters(three) - num_parameters(one) == 3 * 64 * 64 + 64
    lm_head, embedding = torch.nn.Linear(64, V, bias=False), torch.nn.Embedding(V, 64)
    three.attach(lm_head, embedding)
    hidden = torch.cat([3 * rms(torch.randn(200, 64)), torch.randn(200, 128)], -1)
    three.match_scale(hidden[:, :64])
    got, want = three.logits(three.start(hidden, torch.randint(V, (200,)))), lm_head(hidden[:, :64])
    assert torch.corrcoef(torch.stack([got.flatten(), want.flatten()]))[0, 1] > 0.8


def test_default_size_for_the_default_model():
    with torch.device("meta"):
        assert num_parameters(SequentialHeads(576)) <= 8_000_000
    assert SequentialHeads(H, inner=4, readout=4).attach(*base()) is None


def test_training_reaches_all_parameters_and_nothing_of_the_base():
    heads = sequential(layers=2, width=24, hidden_inputs=2)
    lm_head, embedding = base()
    heads.attach(lm_head, embedding)
    embedding.requires_grad_(False)
    heads.project(heads.unroll(torch.randn(3, 2 * H), torch.randint(V, (3, 3)))).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in heads.parameters())
    assert lm_head.weight.grad is None


# --- Hydra ---


@pytest.mark.parametrize("layers", [1, 3])
def test_hydra_equals_a_loop(layers):
    heads = randomised(HydraHeads(H, 3, layers, vocab_size=V))
    lm_head, embedding = base()
    heads.attach(lm_head, embedding)
    hidden, tokens = torch.randn(4, H), torch.randint(V, (4, 3))
    state = heads.start(hidden, tokens[:, 0])
    for h in range(3):
        assert state.shape == (4, heads.state_sizes[h])
        x = torch.cat([hidden, *(embedding(tokens[:, d]) for d in range(h + 1))], -1)
        linear, connection = heads.first[h].weight.split(H)
        linear_bias, connection_bias = heads.first[h].bias.split(H)
        x = x @ connection.T + connection_bias + F.silu(x @ linear.T + linear_bias)
        for layer in range(layers - 1):
            x = x + F.silu(x @ heads.weight[layer, h].T + heads.bias[layer, h])
        torch.testing.assert_close(heads.logits(state), x @ heads.output.weight[h].T + heads.output.bias[h])
        state = heads.advance(state, tokens[:, min(h + 1, 2)])
    with pytest.raises(ValueError, match="not in"):
        heads.logits(state)


# --- all ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["medusa", "sequential", "hydra"])
def test_dtypes_and_moves(family, dtype):
    heads = {
        "medusa": lambda: MedusaHeads(H, 2, 1, token_map=torch.tensor([1, 2, 3])),
        "sequential": lambda: SequentialHeads(H, inner=8, readout=4, token_map=torch.tensor([1, 2, 3])),
        "hydra": lambda: HydraHeads(H, 2, 2, vocab_size=3),
    }[family]()
    heads.to(dtype)
    lm_head, embedding = (module.to(dtype) for module in base())
    heads.attach(lm_head, embedding)
    hidden = torch.randn(2, H).to(dtype)
    logits = heads.logits(hidden) if family == "medusa" else heads.logits(heads.start(hidden, torch.tensor([1, 2])))
    assert logits.dtype == dtype
    assert logits.shape[-1] == 3
    assert torch.isfinite(logits).all()
    heads.to(torch.float64)
    assert heads.output.weight.dtype == torch.float64
    assert heads.token_map is None or heads.token_map.dtype == torch.int64


def test_large_hidden_values_stay_finite_in_fp16():
    heads = SequentialHeads(H, inner=8, readout=4).half()
    heads.attach(*(module.half() for module in base()))
    hidden = torch.full((1, H), 20_000.0).half()  # its square overflows fp16
    assert torch.isfinite(heads.logits(heads.start(hidden, torch.tensor([1])))).all()


@pytest.mark.parametrize("family", ["medusa", "sequential", "hydra"])
def test_no_value_decides_a_shape(family):
    """Meta tensors have no values: an `.item()` or a branch on one raises here, as it would break graph capture."""
    with torch.device("meta"):
        heads = {
            "medusa": MedusaHeads(H, 2, 1),
            "sequential": SequentialHeads(H, inner=8, readout=4),
            "hydra": HydraHeads(H, 2, 2, vocab_size=V),
        }[family]
        heads.attach(torch.empty(V, H), torch.empty(V, H))
        hidden, token = torch.empty(3, H), torch.zeros(3, dtype=torch.long)
        if family == "medusa":
            assert heads.logits(hidden).shape == (3, 2, V)
        else:
            assert heads.logits(heads.advance(heads.start(hidden, token), token)).shape == (3, V)

"""Heads in files: every documented layout from its documented keys, what is wrong with a file, and writing."""

import json
import os
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file, save_model

from medusa_serve.errors import LoadError
from medusa_serve.model.drafting.files import inspect_heads, load_heads, save_heads, split_full_model
from medusa_serve.model.drafting.heads import HeadsInfo, HydraHeads, MedusaHeads, SequentialHeads

H, V = 16, 40


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def lm_head():
    return torch.nn.Linear(H, V, bias=False)


def reference(heads=3, layers=1, *, prefix="", bias=True, tied=False, rows=V):
    """The keys of layout A (a Sequential of residual blocks and an output layer), with random numbers."""
    state = {}
    for h in range(heads):
        for layer in range(layers):
            state[f"{prefix}{h}.{layer}.linear.weight"] = torch.randn(H, H) * 0.3
            if bias:
                state[f"{prefix}{h}.{layer}.linear.bias"] = torch.randn(H)
        if not tied:
            state[f"{prefix}{h}.{layers}.weight"] = torch.randn(rows, H)
    return state


def vllm(heads=3, layers=1, *, bias=False, outputs="own", rows=V, prefix=""):
    """The keys of layout E."""
    state = {}
    for h in range(heads):
        for layer in range(layers):
            state[f"{prefix}blocks.{h}.layers.{layer}.weight"] = torch.randn(H, H) * 0.3
            if bias:
                state[f"{prefix}blocks.{h}.layers.{layer}.bias"] = torch.randn(H)
        if outputs == "own":
            state[f"{prefix}lm_heads.{h}.weight"] = torch.randn(rows, H)
    if outputs in ("lm_head", "lm_heads.0"):
        state[f"{prefix}{outputs}.weight"] = torch.randn(rows, H)
    return state


def hydra(heads=2, layers=2, *, grounded=True, dropout=False):
    """The keys of Hydra's mlp heads (mlp_head.py; with `dropout` the numbering of prefix_mlp_head.py)."""
    state, step = {}, 2 if dropout else 1
    for h in range(heads):
        for layer in range(layers):
            name = f"hydra_mlp.{h}.{layer * step + step - 1}"
            inputs = (h + 2) * H if grounded and layer == 0 else H
            state |= {f"{name}.linear.weight": torch.randn(H, inputs) * 0.2, f"{name}.linear.bias": torch.randn(H)}
            if grounded and layer == 0:
                state[f"{name}.res_connection.weight"] = torch.randn(H, inputs) * 0.2
                state[f"{name}.res_connection.bias"] = torch.randn(H)
        out = f"hydra_lm_head.{h}.1" if dropout else f"hydra_lm_head.{h}"
        state |= {f"{out}.weight": torch.randn(V, H), f"{out}.bias": torch.randn(V)}
    return state


BASE = {
    "model.embed_tokens.weight": torch.zeros(V, H),
    "model.layers.0.self_attn.q_proj.weight": torch.zeros(H, H),
    "lm_head.weight": torch.zeros(V, H),
}


def put(folder, state, name="medusa_lm_head.safetensors", config=None):
    folder.mkdir(exist_ok=True)
    (torch.save if name.endswith((".pt", ".bin")) else save_file)(state, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(path, **kwargs):
    return load_heads(path, **{"hidden_size": H, "vocab_size": V, "dtype": torch.float32} | kwargs)


def loop(hidden, state, heads, layers, block, out):
    """Straightforward head maths on the file's own tensors; `block` and `out` make their names."""
    logits = []
    for h in range(heads):
        x = hidden
        for layer in range(layers):
            bias = state.get(block.format(h=h, l=layer, leaf="bias"), torch.zeros(H))
            x = x + F.silu(x @ state[block.format(h=h, l=layer, leaf="weight")].T + bias)
        logits.append(x @ (out.T if isinstance(out, torch.Tensor) else state[out.format(h=h)].T))
    return torch.stack(logits, 1)


# --- reading: the documented layouts ---


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("layout", "name", "prefix"),
    [
        ("A", "medusa_lm_head.pt", ""),
        ("B", "medusa_lm_head.safetensors", ""),
        ("F", "model.safetensors", "medusa_heads."),
        ("G", "medusa_heads.pt", "medusa_head_"),
        ("H", "model.safetensors", "medusa_head."),
        ("H", "medusa_lm_head.pt", "model.medusa_head."),
        ("A", "medusa_lm_head.pt", "module."),
    ],
)
def test_reads_numbered_layouts(tmp_path, layout, name, prefix, layers, bias):
    state = reference(layers=layers, bias=bias, prefix=prefix)
    heads, info = load(put(tmp_path / "x", state, name))
    shape = (info.family, info.layout, info.num_heads, info.num_layers, info.vocab_size, info.tied, info.token_map)
    assert shape == ("medusa", layout, 3, layers, V, False, 0)
    assert (info.bias, info.warnings) == (bias and layers > 0, ())
    hidden = torch.randn(4, H)
    want = loop(hidden, state, 3, layers, prefix + "{h}.{l}.linear.{leaf}", prefix + f"{{h}}.{layers}.weight")
    torch.testing.assert_close(heads.logits(hidden), want)
    assert not any(p.requires_grad for p in heads.parameters())


def test_reads_tied(tmp_path, lm_head):
    state = reference(tied=True)
    heads, info = load(
        put(tmp_path / "x", state, config={"medusa_num_heads": 3, "medusa_num_layers": 1, "version": "2"})
    )
    assert (info.layout, info.tied, info.num_layers, info.warnings) == ("C", True, 1, ())
    heads.attach(lm_head)
    hidden = torch.randn(4, H)
    torch.testing.assert_close(
        heads.logits(hidden), loop(hidden, state, 3, 1, "{h}.{l}.linear.{leaf}", lm_head.weight.detach())
    )


@pytest.mark.parametrize("prefix", ["", "medusa_heads."])
@pytest.mark.parametrize(
    ("outputs", "layers"),
    # without blocks only own output layers tell the number of heads
    [("own", 0), *((outputs, layers) for outputs in ("own", "lm_head", "lm_heads.0", "tied") for layers in (1, 2))],
)
@pytest.mark.parametrize("bias", [True, False])
def test_reads_vllm(tmp_path, lm_head, prefix, bias, outputs, layers):
    state = vllm(layers=layers, bias=bias, outputs=outputs, prefix=prefix)
    heads, info = load(put(tmp_path / "x", state, "model.safetensors"))
    assert (info.layout, info.num_heads, info.num_layers) == ("E", 3, layers)
    assert (info.tied, info.bias, info.warnings) == (outputs == "tied", bias and layers > 0, ())
    heads.attach(lm_head)
    names = {"own": prefix + "lm_heads.{h}.weight", "tied": lm_head.weight.detach()}
    out = names.get(outputs, f"{prefix}{outputs}.weight")
    hidden = torch.randn(4, H)
    want = loop(hidden, state, 3, layers, prefix + "blocks.{h}.layers.{l}.{leaf}", out)
    torch.testing.assert_close(heads.logits(hidden), want)


def test_reads_vllm_token_map(tmp_path):
    ids = torch.tensor([5, 39, 0, 7])
    state = vllm(rows=4) | {"token_map": ids}
    config = {"model_type": "medusa", "hidden_size": H, "vocab_size": V, "truncated_vocab_size": 4, "num_heads": 3}
    path = put(tmp_path / "x", state, "model.safetensors", config)
    heads, info = load(path)
    assert (info.token_map, info.vocab_size, info.warnings) == (4, V, ())
    assert inspect_heads(path).vocab_size == V
    assert heads.logits(torch.randn(2, H)).shape == (2, 3, 4)
    assert torch.equal(heads.token_map, ids)


@pytest.mark.parametrize(("prefix", "layout"), [("medusa_head.", "D"), ("medusa_heads.", "F")])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_full_models_are_told_apart(tmp_path, prefix, layout, suffix):
    state, stem = reference(prefix=prefix), "model" if suffix == ".safetensors" else "pytorch_model"
    shards = [f"{stem}-0000{i}-of-00002{suffix}" for i in (1, 2)]
    path = put(tmp_path / "x", BASE | {"medusa_head_scale": torch.ones(1)}, shards[0])
    put(path, state, shards[1], config={"medusa_num_heads": 3, "medusa_num_layers": 1, "vocab_size": V + 1})
    weight_map = dict.fromkeys(BASE, shards[0]) | dict.fromkeys(state, shards[1])
    (path / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    heads, base = split_full_model(path)
    assert set(heads) == set(state)
    assert set(base) == {*BASE, "medusa_head_scale"}
    for base_name in (None, "lmsys/vicuna-7b"):
        with pytest.raises(LoadError, match="complete model"):
            load(path, base_name=base_name)
    heads, info = load(path, base_name=str(path))
    assert (info.layout, info.num_heads, info.warnings) == (layout, 3, ())
    hidden = torch.randn(2, H)
    want = loop(hidden, state, 3, 1, prefix + "{h}.{l}.linear.{leaf}", prefix + "{h}.1.weight")
    torch.testing.assert_close(heads.logits(hidden), want)
    assert split_full_model(put(tmp_path / "y", reference()))[1] == []


@pytest.mark.parametrize(
    "scale", [torch.tensor(0.5), torch.rand(1), torch.rand(H), torch.rand(H, 1)], ids=lambda s: str(s.shape)
)
def test_fp8_is_dequantised(tmp_path, scale):
    state = reference(1, prefix="medusa_heads.")
    name = "medusa_heads.0.0.linear.weight"
    state[name] = state[name].to(torch.float8_e4m3fn)
    state |= {name + "_scale": scale, "medusa_heads.0.0.linear.input_scale": torch.tensor(1.0)}
    heads, info = load(put(tmp_path / "x", state))
    torch.testing.assert_close(heads.weight[0, 0], state[name].float() * scale.reshape(-1, 1))
    assert info.warnings == ()


@pytest.mark.parametrize(
    ("scale", "match"), [(None, "weight_scale is missing"), (torch.ones(2, 2), "one scale a tensor")]
)
def test_fp8_that_cannot_be_dequantised(tmp_path, scale, match):
    state = reference(1)
    state["0.0.linear.weight"] = state["0.0.linear.weight"].to(torch.float8_e4m3fn)
    if scale is not None:
        state["0.0.linear.weight_scale"] = scale
    with pytest.raises(LoadError, match=match):
        load(put(tmp_path / "x", state))


def test_one_block_used_twice(tmp_path):
    """[ResBlock] * 2 is one module twice: pickles repeat it, safetensors cannot."""
    block = torch.nn.Module()
    block.linear = torch.nn.Linear(H, H)
    modules = torch.nn.ModuleList(
        torch.nn.Sequential(block, block, torch.nn.Linear(H, V, bias=False)) for _ in range(1)
    )
    hidden = torch.randn(2, H)
    want = loop(hidden, modules.state_dict(), 1, 2, "{h}.{l}.linear.{leaf}", "{h}.2.weight").detach()
    (tmp_path / "s").mkdir()
    save_model(modules, str(tmp_path / "s" / "medusa_lm_head.safetensors"))
    shared = reference(2, 2)
    without = {name: t for name, t in shared.items() if ".1." not in name}
    for path in (put(tmp_path / "p", modules.state_dict(), "medusa_lm_head.pt"), tmp_path / "s"):
        heads, info = load(path)
        assert (info.num_layers, info.warnings) == (2, ())
        torch.testing.assert_close(heads.logits(hidden), want)
        save_heads(heads, info, tmp_path / f"out{path.name}", layout="B")  # views of shared storage can be saved
    heads, info = load(put(tmp_path / "w", without))
    assert torch.equal(heads.weight[1], heads.weight[0])
    assert "Layer 1" in info.warnings[0]


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_reads_hydra(tmp_path, dropout, layers):
    state = hydra(layers=layers, dropout=dropout)
    config = {"hydra_num_heads": 2, "hydra_num_layers": layers, "hydra_head_arch": "mlp", "grounded_heads": True}
    extra = {"input_embed_fn.weight": torch.zeros(V, H)}  # the base's embedding is a submodule of Hydra's
    heads, info = load(put(tmp_path / "x", state | extra, "hydra_lm_head.pt", config))
    assert (info.family, info.layout, info.num_heads, info.num_layers) == ("hydra", "hydra", 2, layers)
    assert (info.vocab_size, info.tied, info.bias, info.warnings) == (V, False, True, ())
    embedding = torch.nn.Embedding(V, H)
    heads.attach(torch.zeros(V, H), embedding)
    hidden, tokens = torch.randn(3, H), torch.randint(V, (3, 2))
    got = heads.start(hidden, tokens[:, 0])
    step = 2 if dropout else 1
    for h in range(2):
        x = torch.cat([hidden, *(embedding(tokens[:, d]) for d in range(h + 1))], -1)
        for layer in range(layers):
            name = f"hydra_mlp.{h}.{layer * step + step - 1}"
            y = F.silu(x @ state[f"{name}.linear.weight"].T + state[f"{name}.linear.bias"])
            if layer == 0:
                x = x @ state[f"{name}.res_connection.weight"].T + state[f"{name}.res_connection.bias"]
            x = x + y
        out = f"hydra_lm_head.{h}.1" if dropout else f"hydra_lm_head.{h}"
        torch.testing.assert_close(heads.logits(got), x @ state[f"{out}.weight"].T + state[f"{out}.bias"])
        got = heads.advance(got, tokens[:, 1])


def test_ungrounded_hydra_heads_are_medusa_heads(tmp_path):
    state = hydra(grounded=False)
    heads, info = load(put(tmp_path / "x", state, "hydra_lm_head.pt", {"hidden_state_offset": 1}))
    assert (info.family, info.layout, info.num_layers, info.hidden_inputs) == ("medusa", "hydra", 2, (-2,))
    hidden = torch.randn(3, H)
    want = loop(hidden, state, 2, 2, "hydra_mlp.{h}.{l}.linear.{leaf}", "hydra_lm_head.{h}.weight")
    want = want + torch.stack([state[f"hydra_lm_head.{h}.bias"] for h in range(2)])
    torch.testing.assert_close(heads.logits(hidden), want)


def test_hydra_kinds_that_are_not_offered(tmp_path):
    state = hydra(dropout=True) | {"prefix_embeding_layer.layers.0.self_attn.q_proj.weight": torch.zeros(H, H)}
    with pytest.raises(LoadError, match="its own KV cache"):
        load(put(tmp_path / "x", state, "hydra_lm_head.pt"))
    state = {"decoder.0.weight": torch.zeros(H, H)}
    with pytest.raises(LoadError, match="eagle-attn"):
        load(put(tmp_path / "y", state, "hydra_lm_head.pt", {"hydra_head_arch": "eagle-attn"}))


# --- reading: config and file disagree ---


def test_two_heads_in_the_config_five_in_the_file(tmp_path):
    config = {"base_model_name_or_path": "lmsys/vicuna-7b-v1.3", "medusa_num_heads": 2, "medusa_num_layers": 1}
    path = put(tmp_path / "x", reference(5), "medusa_lm_head.pt", config)
    heads, info = load(path, base_name="/models/vicuna-7b-v1.3")
    assert (info.num_heads, heads.max_depth) == (5, 5)
    assert len(info.warnings) == 1
    assert "heads 2" in info.warnings[0]
    assert "5" in info.warnings[0]
    assert "smollm" in load(path, base_name="smollm")[1].warnings[-1]


@pytest.mark.parametrize(
    ("state", "name", "config", "match"),
    [
        (reference(), "medusa_lm_head.pt", {"medusa_num_layers": 2}, "layers 2.*say 1"),
        (reference(), "medusa_lm_head.pt", {"version": "2"}, "version 2"),
        (reference(tied=True), "medusa_lm_head.pt", {"medusa_num_heads": 3}, "no version 2"),
        (reference(prefix="medusa_heads."), "model.safetensors", {"medusa": {"num_medusa_heads": 4}}, "heads 4.*say 3"),
        (vllm(), "model.safetensors", {"num_heads": 5}, "heads 5.*say 3"),
        (vllm(bias=True), "model.safetensors", {"num_heads": 3}, "medusa_fc_bias False.*a bias"),
        (vllm(), "model.safetensors", {"medusa_fc_bias": True}, "medusa_fc_bias True.*no bias"),
        (hydra(), "hydra_lm_head.pt", {"hydra_num_heads": 4}, "heads 4.*say 2"),
        (reference(), "medusa_lm_head.pt", {"hidden_size": 32, "vocab_size": V}, "hidden size 32.*say 16"),
        (reference(), "medusa_lm_head.pt", {"vocab_size": 41}, "vocabulary 41.*say 40"),
        (reference(), "medusa_lm_head.pt", ["no", "object"], "not a JSON object"),
    ],
)
def test_disagreements_are_warnings_with_both_numbers(tmp_path, state, name, config, match):
    path = put(tmp_path / "x", state, name, config)
    for info in (load(path)[1], inspect_heads(path)):
        assert len(info.warnings) == 1
        assert re.search(match, info.warnings[0])


def test_extra_keys_are_named(tmp_path):
    info = load(put(tmp_path / "x", reference() | {"foo.bar": torch.zeros(1), "medusa_extra": torch.zeros(1)}))[1]
    assert info.num_heads == 3
    assert "2 tensors" in info.warnings[0]


def test_padded_and_smaller_vocabularies(tmp_path):
    state = reference(rows=V + 24)
    heads, info = load(put(tmp_path / "x", state))
    assert heads.logits(torch.randn(2, H)).shape == (2, 3, V)
    assert torch.equal(heads.output.weight[1], state["1.1.weight"][:V])
    assert "64 rows" in info.warnings[0]
    assert "40" in info.warnings[0]
    assert inspect_heads(tmp_path / "x").vocab_size == V + 24
    heads, info = load(put(tmp_path / "y", reference(rows=V - 8)))
    assert heads.logits(torch.randn(2, H)).shape == (2, 3, V - 8)
    assert "32 rows" in info.warnings[0]
    assert "vocabulary 40" in info.warnings[0]


def heads_of_vocabulary(folder, kind, size):
    """Heads for a base of this vocabulary; the output layer says which it is, or where that does not, the config."""
    if kind == "own output":
        return put(folder, reference(1, rows=size))
    if kind == "tied":
        return put(folder, reference(tied=True), config={"version": "2", "vocab_size": size})
    if kind == "token map":
        config = {"vocab_size": size, "truncated_vocab_size": 4}
        return put(folder, vllm(rows=4) | {"token_map": MAP}, "model.safetensors", config)
    heads = SequentialHeads(H, inner=12, readout=6, token_map=MAP if kind == "native token map" else None)
    return save_heads(heads, info_of(heads, vocab_size=size), folder).parent


@pytest.mark.parametrize("kind", ["own output", "tied", "token map", "native tied", "native token map"])
@pytest.mark.parametrize(("trained", "base"), [(V + 1024, V), (V, V + 1024)])
def test_padding_is_told_and_another_vocabulary_refused(tmp_path, kind, trained, base):
    path = heads_of_vocabulary(tmp_path / "padded", kind, trained)
    assert load(path, vocab_size=trained)[1].warnings == ()
    (warning,) = load(path, vocab_size=base)[1].warnings
    assert {str(trained), str(base)} <= set(re.findall(r"\d+", warning))
    trained, base = (size + (size > V) for size in (trained, base))
    path = heads_of_vocabulary(tmp_path / "other", kind, trained)
    with pytest.raises(LoadError, match=f"vocabulary of {trained}, the base vocabulary has {base}"):
        load(path, vocab_size=base)


# --- reading: wrong files ---


@pytest.mark.parametrize(
    ("state", "missing"),
    [
        (reference(), "1.0.linear.weight"),
        (reference(), "1.0.linear.bias"),
        (reference(), "1.1.weight"),
        (reference(3, 2), "2.1.linear.weight"),
        (reference(tied=True), "0.0.linear.weight"),
        (reference(prefix="medusa_heads."), "medusa_heads.0.1.weight"),
        (vllm(), "lm_heads.1.weight"),
        (vllm(), "blocks.2.layers.0.weight"),
        (vllm(bias=True), "blocks.0.layers.0.bias"),
        (hydra(), "hydra_mlp.1.0.res_connection.weight"),
        (hydra(), "hydra_mlp.0.1.linear.bias"),
        (hydra(), "hydra_lm_head.1.bias"),
    ],
)
def test_a_partial_file_names_the_tensor(tmp_path, state, missing):
    path = put(tmp_path / "x", {name: tensor for name, tensor in state.items() if name != missing})
    for read in (load, inspect_heads):
        with pytest.raises(LoadError, match=missing.replace(".", r"\.") + " is missing"):
            read(path)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("1.0.linear.bias", torch.full((H,), float("nan")), "NaN or infinite"),
        ("1.1.weight", torch.full((V, H), float("inf")), "NaN or infinite"),
        ("1.0.linear.weight", torch.zeros(H, H).to_sparse(), "not a dense tensor"),
        ("1.0.linear.weight", torch.zeros(1).expand(H, H), "claims more values"),
        ("1.0.linear.weight", torch.zeros(H, H, dtype=torch.int8), "int8"),
        ("1.0.linear.weight", torch.zeros(H, H + 1), r"shape \[16, 17\], expected \[16, 16\]"),
        ("1.0.linear.bias", torch.zeros(H, 1), r"shape \[16, 1\]"),
        ("1.1.weight", torch.zeros(V + 1, H), r"\[41, 16\]"),
        ("1.0.linear.bias", "text", "is a str, not a tensor"),
        ("9.1.weight", torch.zeros(V, H), "3.0.linear.weight is missing"),
        ("0.4.linear.weight", torch.zeros(H, H), "after the output layer"),
        ("0.3.weight", torch.zeros(V, H), "different numbers"),
        ("medusa_head.0.0.linear.weight", torch.zeros(H, H), "twice"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, name, value, match):
    path = put(tmp_path / "x", reference() | {name: value}, "medusa_lm_head.pt")
    with pytest.raises(LoadError, match=match) as error:
        load(path)
    if "missing" not in match:
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (torch.tensor([0, 1, 1, 2]), "repeated"),
        (torch.tensor([0, 1, -1, 2]), "negative"),
        (torch.tensor([0.0, 1.0]), "token ids"),
        (torch.tensor([0, 1, 2, V]), "token 40"),
        (torch.tensor([0, 1, 2, 3, 4]), "4 rows"),
    ],
)
def test_wrong_token_maps(tmp_path, ids, match):
    with pytest.raises(LoadError, match=match):
        load(put(tmp_path / "x", vllm(rows=4) | {"token_map": ids}, "model.safetensors"))


def test_heads_of_another_base(tmp_path):
    path = put(tmp_path / "x", reference())
    with pytest.raises(LoadError, match=r"hidden size 16.*32"):
        load(path, hidden_size=32)


def test_values_that_overflow_the_dtype(tmp_path):
    path = put(tmp_path / "x", reference() | {"0.0.linear.bias": torch.full((H,), 1e6)})
    load(path)
    with pytest.raises(LoadError, match="float16"):
        load(path, dtype=torch.float16)


class Evil:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused(tmp_path, zipped):
    sentinel = tmp_path / "ran"
    (tmp_path / "x").mkdir()
    state = reference() | {"0.0.linear.bias": Evil(sentinel)}
    torch.save(state, tmp_path / "x" / "medusa_lm_head.pt", _use_new_zipfile_serialization=zipped)
    for read in (load, inspect_heads, split_full_model):
        with pytest.raises(LoadError, match="not loaded"):
            read(tmp_path / "x")
    assert not sentinel.exists()


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(LoadError, match="no file or folder"):
        load(tmp_path / "absent")
    with pytest.raises(LoadError, match="holds no heads"):
        load(tmp_path)
    whole = put(tmp_path / "x", reference()) / "medusa_lm_head.safetensors"
    whole.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(LoadError, match="not a complete safetensors"):
        load(tmp_path / "x")
    for content in (b"", b"garbage", b"\x80\x02}q\x00."):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(LoadError, match="bad.pt"):
            load(tmp_path / "bad.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(LoadError, match="list"):
        load(tmp_path / "list.pt")
    with pytest.raises(LoadError, match=r"no draft heads.*foo"):
        load(put(tmp_path / "y", {"foo": torch.zeros(1)}))
    for index in ('{"weight_map": {"a": "../secret.safetensors"}}', '{"weight_map": {"a": "no.safetensors"}}', "[]"):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(LoadError, match="index"):
            load(tmp_path)


def test_a_single_file_and_preference_for_safetensors(tmp_path):
    path = put(tmp_path / "x", reference(2))
    put(path, reference(4), "medusa_lm_head.pt")
    assert load(path)[1].num_heads == 2
    assert load(path / "medusa_lm_head.pt")[1].num_heads == 4


# --- writing ---


def random_medusa(**kwargs):
    heads = MedusaHeads(H, 3, **kwargs)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return heads


def info_of(heads, **kwargs):
    layers = len(heads.cell) if isinstance(heads, SequentialHeads) else heads.weight.shape[0]
    fixed = {"family": heads.family, "num_heads": heads.max_depth, "num_layers": layers, "hidden_size": H}
    fixed |= {"vocab_size": V, "tied": heads.output.tied, "bias": True}
    return HeadsInfo(**fixed | kwargs)


MAP = torch.tensor([5, 39, 0, 7])


@pytest.mark.parametrize(
    ("layout", "kwargs"),
    [
        *((layout, {"num_layers": layers, "vocab_size": V}) for layout in "ABE" for layers in (0, 1, 2)),
        *((layout, {"vocab_size": V, "bias": False}) for layout in "ABE"),
        *((layout, {}) for layout in "ABCE"),
        ("C", {"bias": False}),
        ("E", {"token_map": MAP}),
        ("E", {"token_map": MAP, "vocab_size": 4}),
        ("E", {"vocab_size": V, "shared_output": True}),
        ("native", {}),
        ("native", {"num_layers": 0, "vocab_size": V}),
        ("native", {"num_layers": 2, "bias": False, "token_map": MAP}),
        ("native", {"vocab_size": 4, "token_map": MAP, "output_bias": True}),
        ("native", {"vocab_size": V, "shared_output": True}),
    ],
    ids=str,
)
def test_medusa_round_trip(tmp_path, lm_head, layout, kwargs):
    heads = random_medusa(**kwargs)
    heads.attach(lm_head)
    info = info_of(heads, ranks=[[0.5, 0.25]], tau=[1.5], noise_tau=[0.75], provenance={"base_model": "x/y"})
    file = save_heads(heads, info, tmp_path / "out", layout=layout, dtype=torch.float32)
    assert file.parent == tmp_path / "out"
    again, read = load(tmp_path / "out")
    assert (read.layout, read.warnings) == (layout, ())
    assert (read.num_heads, read.num_layers) == (3, heads.weight.shape[0])
    assert (read.ranks, read.tau, read.noise_tau, read.provenance) == ([[0.5, 0.25]], [1.5], [0.75], info.provenance)
    assert read.token_map == (4 if "token_map" in kwargs else 0)
    again.attach(lm_head)
    hidden = torch.randn(4, H)
    torch.testing.assert_close(again.logits(hidden), heads.logits(hidden))
    if heads.token_map is not None:
        assert torch.equal(again.token_map, MAP)
    with pytest.raises(LoadError, match="already holds"):
        save_heads(heads, info, tmp_path / "out", layout=layout)
    save_heads(heads, info, tmp_path / "out", layout=layout, overwrite=True)


@pytest.mark.parametrize(
    ("layout", "kwargs", "match"),
    [
        ("B", {}, "attach"),
        ("B", {"token_map": MAP}, "draft vocabulary"),
        ("C", {"vocab_size": V}, "tied heads"),
        ("C", {"num_layers": 2}, "one layer"),
        ("E", {"vocab_size": V, "output_bias": True}, "bias of the output layer"),
        ("Z", {}, "'Z'"),
    ],
)
def test_what_a_layout_cannot_hold(tmp_path, layout, kwargs, match):
    heads = random_medusa(**kwargs)
    with pytest.raises(LoadError, match=match):
        save_heads(heads, info_of(heads), tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"token_map": MAP, "max_depth": 7},
        {"width": 24, "layers": 2, "hidden_inputs": 2, "embed_size": 8},
        {"vocab_size": V},
        {"vocab_size": 4, "token_map": MAP},
    ],
    ids=str,
)
def test_sequential_round_trip(tmp_path, lm_head, kwargs):
    heads = SequentialHeads(H, inner=12, readout=6, **kwargs)
    inputs = (-1, -3)[: heads.hidden_inputs]
    info = info_of(heads, hidden_inputs=inputs, ranks=[[0.7, 0.1], [0.5, 0.2]], tau=[1.0, 2.0], noise_tau=[0.5, 0.25])
    save_heads(heads, info, tmp_path / "out", dtype=torch.float32)
    again, read = load(tmp_path / "out")
    assert (read.family, read.num_heads, read.hidden_inputs) == ("sequential", heads.max_depth, inputs)
    assert (read.ranks, read.tau, read.noise_tau) == (info.ranks, info.tau, info.noise_tau)
    assert read.warnings == ()
    embedding = torch.nn.Embedding(V, heads.embed_size)
    hidden, tokens = torch.randn(2, H * heads.hidden_inputs), torch.randint(V, (2, 3))
    for each in (heads, again):
        each.attach(lm_head, embedding)
    torch.testing.assert_close(again.unroll(hidden, tokens), heads.unroll(hidden, tokens))
    torch.testing.assert_close(again.project(torch.ones(1, H)), heads.project(torch.ones(1, H)))
    assert inspect_heads(tmp_path / "out").num_parameters == read.num_parameters
    with pytest.raises(LoadError, match="Medusa heads only"):
        save_heads(heads, info, tmp_path / "b", layout="B")


def test_hydra_round_trip(tmp_path):
    heads = HydraHeads(H, 2, 3, vocab_size=V)
    save_heads(heads, info_of(heads), tmp_path / "out", dtype=torch.float32)
    again, info = load(tmp_path / "out")
    assert (info.family, info.num_heads, info.num_layers) == ("hydra", 2, 3)
    for name, tensor in heads.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_native_files_that_are_wrong(tmp_path):
    heads = SequentialHeads(H, inner=12, readout=6)
    state = {f"sequential.{name}": tensor for name, tensor in heads.state_dict().items()}
    name = "heads.safetensors"
    for missing in ("sequential.norm", "sequential.readout.norm", "sequential.start_proj.bias"):
        partial = {key: tensor for key, tensor in state.items() if key != missing}
        with pytest.raises(LoadError, match=missing.replace(".", r"\.") + " is missing"):
            load(put(tmp_path / "x", partial, name))
    with pytest.raises(LoadError, match=r"readout\.norm.*\[17\], expected \[16\]"):
        load(put(tmp_path / "x", state | {"sequential.readout.norm": torch.ones(17)}, name))
    with pytest.raises(LoadError, match="too few dimensions"):
        load(put(tmp_path / "x", state | {"sequential.start_proj.weight": torch.ones(17)}, name))
    with pytest.raises(LoadError, match="several families"):
        load(put(tmp_path / "x", state | {"medusa.weight": torch.ones(1)}, name))
    with pytest.raises(LoadError, match="reads? .*hidden states"):
        load(put(tmp_path / "x", state, name, {"hidden_inputs": [-1, -2]}))
    info = load(put(tmp_path / "x", state | {"sequential.more": torch.ones(1)}, name, {}))[1]
    assert "sequential.more" in info.warnings[0]


def test_a_file_from_before_noise_tau_has_the_rest(tmp_path):
    calibration = {"ranks": [[0.5]], "tau": [2.0]}
    info = load(put(tmp_path / "x", reference(), config={"calibration": calibration}))[1]
    assert (info.ranks, info.tau, info.noise_tau, info.warnings) == ([[0.5]], [2.0], None, ())


@pytest.mark.parametrize(
    "calibration",
    [{"ranks": [[0.5, "x"]]}, {"ranks": [[2.0]]}, {"tau": [0.0]}, {"tau": [True]}, {"noise_tau": 1.0}, "text",
     {"ranks": []}],
)  # fmt: skip
def test_a_wrong_calibration_is_left_out(tmp_path, calibration):
    info = load(put(tmp_path / "x", reference(), config={"calibration": calibration}))[1]
    assert (info.ranks, info.tau, info.noise_tau) == (None, None, None)
    assert "calibration" in info.warnings[0]


def test_default_heads_of_the_default_model_fit_into_20_mb(tmp_path):
    medusa, sequential = MedusaHeads(576, 5), SequentialHeads(576, token_map=torch.arange(16384))
    for name, heads in (("m", medusa), ("s", sequential)):
        save_heads(heads, info_of(heads), tmp_path / name)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.*")) <= 20_000_000


def test_attaches_to_a_base_model(tmp_path):
    class Base:
        output, embedding = torch.nn.Linear(H, V), torch.nn.Embedding(V, H)

        def get_output_embeddings(self):
            return self.output

        def get_input_embeddings(self):
            return self.embedding

    heads, _ = load(put(tmp_path / "x", reference(tied=True)), base_model=Base(), dtype=torch.float64)
    assert heads.weight.dtype == torch.float64
    assert heads.logits(torch.randn(2, H).double()).shape == (2, 3, V)

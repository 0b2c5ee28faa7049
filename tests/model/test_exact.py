"""The exact mode on a CPU: the same bits for any tree, batch and chunking, and what tells when that does not hold."""

import random

import pytest
import torch

from medusa_serve.config import EngineConfig
from medusa_serve.errors import LoadError
from medusa_serve.model import selftest
from medusa_serve.model.build import build_runner
from medusa_serve.model.cpu.attention import canonical_attention
from medusa_serve.model.drafting.tree import Tree
from medusa_serve.model.forward import attention
from medusa_serve.model.forward.attention import reference_attention
from medusa_serve.model.forward.tree_forward import TreeForward
from medusa_serve.model.forward.view import chain_view, tree_view
from medusa_serve.model.torch_kernels import TorchKernels
from medusa_serve.model.weights.int4 import use_few_bits
from medusa_serve.model.weights.int8 import quantize_linears
from tests.campaigns.families import tiny
from tests.tiny import VOCAB, tiny_model

SLOTS, COLUMNS, COUNT = 3, 128, 40


def random_tree(chance: random.Random, nodes: int) -> Tree:
    paths: list[tuple[int, ...]] = [()]
    while len(paths) < nodes:
        above = chance.choice(paths)
        paths.append((*above, sum(len(path) == len(above) + 1 and path[:-1] == above for path in paths)))
    return Tree(tuple(paths[1:]))


@pytest.mark.parametrize("window", [None, 1, 7, 30])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "value_dim"), [(9, 3, 64, 64), (4, 4, 24, 40), (6, 1, 16, 16)])
def test_canonical_attention_is_the_references(window, heads, kv_heads, dim, value_dim):
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(5, 96, kv_heads, size, generator=generator).bfloat16() for size in (dim, value_dim))
    tree = random_tree(random.Random(1), 13)
    slots, lengths = [3, 0, 4], [7, 50, 0]
    draft = tree.draft(torch.zeros(3, 13, dtype=torch.int64))
    views = [tree_view(torch.tensor(slots), torch.tensor(lengths), slots, lengths, draft)]
    views += [chain_view(slots, lengths, [5, 21, 3], torch.device("cpu"), scratch=95)]
    for view in views:
        query = torch.randn(3, view.num_new, heads, dim, generator=generator).bfloat16().transpose(1, 2)
        got = canonical_attention(query, keys, values, view, 0.2, window)
        want = reference_attention(query.double(), keys.double(), values.double(), view, 0.2, window)
        assert (got.double() - want).norm() < 0.003 * want.norm()  # bfloat16 itself is 0.0017 off


def test_canonical_attention_passes_bad_numbers_on():
    keys = torch.randn(1, 32, 2, 8).bfloat16()
    keys[0, 2, 1, 3] = torch.nan
    view = chain_view([0], [4], [3], torch.device("cpu"))
    query = torch.randn(1, 3, 4, 8).bfloat16().transpose(1, 2)
    out = canonical_attention(query, keys, keys, view, 0.2, None)
    assert out[:, :, :2].isfinite().all()
    assert out[:, :, 2:].isnan().all()


def on_steps(model):
    """The same model with weights on 16 steps a group, as a dequantised GGUF has them."""
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "embed" not in name:
            groups = weight.data.unflatten(1, (-1, 32))
            low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
            scale = (high - low) / 15
            weight.data = (((groups - low) / scale).round() * scale + low).flatten(1)
    return model


def forward_in(numbers: str, family: str) -> TreeForward:
    if numbers == "int4":
        model = on_steps(tiny_model(family, torch.float32, layers=2))
        assert use_few_bits(model) > 0.8  # the output layer has an odd number of rows
    else:
        model = tiny_model(family, torch.bfloat16, layers=2)
        if numbers == "int8":
            quantize_linears(model)
    return TreeForward(model, SLOTS, COLUMNS, None)


@torch.inference_mode()
def plain_logits(forward: TreeForward, ids: torch.Tensor) -> torch.Tensor:
    """(COUNT, V): token by token, as plain decoding."""
    device = torch.device("cpu")
    return torch.cat(
        [forward.run(ids[None, at : at + 1], chain_view([0], [at], [1], device))[0][0] for at in range(COUNT)]
    )


@pytest.mark.parametrize(
    ("numbers", "family"),
    [("bfloat16", "llama"), ("int8", "llama"), ("int4", "llama"), ("bfloat16", "mistral"), ("bfloat16", "gemma2")],
)
def test_the_same_bits_for_any_tree_batch_and_chunking(numbers, family):
    """Sequences of random lengths in random chunks and slots; random trees over them, one path of which is the
    sequence's own continuation. Mistral has windows, Gemma 2 soft caps as well."""
    chance, generator = random.Random(3), torch.Generator().manual_seed(3)
    forward = forward_in(numbers, family)
    forward.use(forward.active, exact=True)
    sequences = torch.randint(VOCAB, (4, COUNT), generator=generator)
    plain = [plain_logits(forward, ids) for ids in sequences]
    compared = 0
    for _ in range(12):
        rows = chance.sample(range(4), chance.randint(1, SLOTS))
        slots = chance.sample(range(SLOTS), len(rows))
        lengths = [chance.randint(1, COUNT - 8) for _ in rows]
        with torch.inference_mode():
            for row, slot, length in zip(rows, slots, lengths, strict=True):
                start = 0
                while start < length:
                    stop = min(length, start + chance.choice((1, 2, 5, 17, 30)))
                    view = chain_view([slot], [start], [stop - start], torch.device("cpu"))
                    logits = forward.run(sequences[row][None, start:stop], view)[0][0]
                    assert torch.equal(logits, plain[row][start:stop])
                    start = stop
            tree = random_tree(chance, chance.choice((1, 2, 4, 8, 19)))
            tokens = torch.randint(VOCAB, (len(rows), tree.num_nodes), generator=generator)
            paths = []
            for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                end, path = chance.randrange(tree.num_nodes), []
                while end:
                    path.insert(0, end)
                    end = tree.parents[end]
                paths.append([0, *path][: COUNT - length])
                tokens[place, paths[-1]] = sequences[row][length : length + len(paths[-1])]
            draft = tree.draft(tokens)
            view = tree_view(torch.tensor(slots), torch.tensor(lengths), slots, lengths, draft)
            logits, _ = forward.run(tokens, view)
        for place, (row, length, path) in enumerate(zip(rows, lengths, paths, strict=True)):
            assert torch.equal(logits[place, path], plain[row][length : length + len(path)])
            compared += len(path)
    assert compared > 30


def test_it_is_on_where_it_holds_and_refused_where_it_cannot_be():
    forward = forward_in("int8", "llama")
    assert selftest.make_exact(forward, False, SLOTS) is None
    assert not forward.exact
    note = selftest.make_exact(forward, None, SLOTS)
    assert note is not None
    assert note.startswith("exact:")
    assert forward.exact
    assert not forward.cache.keys.any()
    forward.close()
    assert all("forward" not in vars(module) for module in forward.model.modules())
    wide = TreeForward(tiny_model("llama", torch.float32), 1, COLUMNS, None)
    assert selftest.make_exact(wide, None, 1) is None
    with pytest.raises(LoadError, match="bfloat16"):
        selftest.make_exact(wide, True, 1)


def test_attention_in_another_order_is_seen(monkeypatch):
    forward = forward_in("bfloat16", "llama")
    forward.kernels = TorchKernels()
    monkeypatch.setattr(attention, "reference_attention", lambda *given: attention._by_row(*given[:6]))
    forward.use(forward.active, exact=True)
    assert "changes the logits' last bits" in (selftest.difference(forward, SLOTS) or "")


def test_without_numba_it_says_what_is_missing():
    forward = forward_in("bfloat16", "llama")
    forward.kernels = TorchKernels()
    assert "Numba" in (selftest.make_exact(forward, None, SLOTS) or "")
    assert not forward.exact


def test_a_model_that_decodes_plainly_has_no_exact_mode():
    config = EngineConfig(slots=2, max_context=64, exact=True)
    with pytest.raises(
        LoadError, match=r"cannot be had: this model decodes plainly, because some layers keep a recurr"
    ):
        build_runner(tiny("mamba"), config, eos_ids=[], max_positions=256)

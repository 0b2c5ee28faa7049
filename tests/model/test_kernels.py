"""Every operation of Kernels, each implementation that is here against torch's, on the same tables."""

import pytest
import torch

from medusa_serve.model.drafting.tree import HeadNodes, Tree, most_probable
from medusa_serve.model.kernels import choose
from medusa_serve.model.sampling.filters import Sampling
from medusa_serve.model.shapes import Shape
from medusa_serve.model.tables import SlotTables
from medusa_serve.model.torch_kernels import TorchKernels
from tests.model.rows import sampling
from tests.oracles import DEFAULT_RANKS

SLOTS, COLUMNS, VOCAB = 9, 200, 11
SHAPES = [Shape(1, 0, 0), Shape(4, 1, 3), Shape(8, 2, 4), Shape(24, 6, 7), Shape(64, 16, 16), Shape(5, 4, 4)]


def filled(shape: Shape, seed: int) -> tuple[SlotTables, torch.Tensor, torch.Tensor]:
    """Tables of sequences that repeat themselves, with drafts of random trees: (tables, slots, active)."""
    random = torch.Generator().manual_seed(seed)

    def ints(low, high, *size):
        return torch.randint(low, high, size, generator=random)

    width = max(1, shape.num_nodes - 1 - shape.num_lookup)
    tables = SlotTables(SLOTS, COLUMNS, [3, 7], width, shape.num_lookup, torch.device("cpu"))
    tables.history[:] = ints(0, VOCAB, SLOTS, COLUMNS)
    tables.history[1::3, 20:] = tables.history[1::3, 10:-10]
    tables.length[:] = ints(0, COLUMNS - 70, SLOTS)
    tables.total[:] = tables.length + ints(1, 12, SLOTS)
    tables.node_limit[:] = torch.where(ints(0, 4, SLOTS) == 0, 1, 2**62)
    tables.eos[:] = torch.where(ints(0, 2, SLOTS, 1) == 0, torch.tensor([3, 7]), -1)
    for slot in range(SLOTS):
        paths = most_probable(DEFAULT_RANKS, width + 1)
        tree = Tree(paths)
        assert tree.num_nodes == width + 1
        tables.heads.tokens[slot] = ints(-1, VOCAB, width)
        tables.heads.parents[slot] = torch.tensor(tree.parents[1:])
        tables.heads.depths[slot] = torch.tensor(tree.depths[1:])
    tables.lookup[:] = ints(-1, VOCAB, SLOTS, shape.num_lookup)
    return tables, torch.tensor([4, 0, 8, 2, 7, 1]), ints(0, 4, 6) > 0


def moved(tables: SlotTables, device: torch.device) -> SlotTables:
    """A copy on the device of the kernels."""
    copy = SlotTables(SLOTS, COLUMNS, [3, 7], tables.heads.tokens.shape[1], tables.lookup.shape[1], device)
    for name in ("history", "length", "total", "node_limit", "eos", "lookup"):
        getattr(copy, name).copy_(getattr(tables, name))
    for mine, theirs in zip(copy.heads, tables.heads, strict=True):
        mine.copy_(theirs)
    return copy


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert torch.equal(got.cpu(), want)


def depth_of(shape: Shape) -> int:
    return max(shape.max_depth, 8) if shape.num_nodes > 1 else 0


DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
TORCH = TorchKernels()


@DEVICES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rest", [False, True])
def test_open_and_walk(device, shape, seed, rest):
    kernels = choose(torch.device(device))
    assert kernels.name == {"cpu": "numba", "cuda": "triton"}[device]
    tables, slots, active = filled(shape, seed)
    shape = shape._replace(max_depth=depth_of(shape))
    mine = moved(tables, torch.device(device))
    opened = TORCH.open_step(tables, slots, active, shape)
    got = kernels.open_step(mine, slots.to(device), active.to(device), shape)
    for name in opened._fields:
        same(getattr(got, name), getattr(opened, name))
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(slots), shape.num_nodes, VOCAB, generator=random)
    for row, tokens in enumerate(opened.tokens):  # half of the nodes choose what one of their children holds
        for node in range(1, shape.num_nodes):
            if tokens[node] >= 0 and torch.rand((), generator=random) < 0.7:
                logits[row, opened.parents[row, node], tokens[node]] += 9.0
    logits[2, 0, 5] = torch.nan
    logits[3, -1, 2] = torch.inf
    greedy = Sampling(*([torch.zeros(len(slots))] * 4), torch.zeros(len(slots)), sampled=False, filtered=False)
    want = TORCH.walk(tables, slots, opened, logits, shape.max_depth, greedy, rest=rest)
    closed = kernels.walk(mine, slots.to(device), got, logits.to(device), shape.max_depth, greedy, rest=rest)
    facts, depths = closed.facts.cpu(), (want.facts.shape[1] - 5) // 2
    same(facts[:, :5], want.facts[:, :5])
    for row, line in enumerate(want.facts):
        emitted = int((line[5 : 5 + depths] >= 0).sum())
        same(facts[row, 5 : 5 + emitted], line[5 : 5 + emitted])
        same(closed.nodes[row, :emitted], want.nodes[row, :emitted])
    for name in ("last", "length", "pending"):
        same(getattr(closed, name), getattr(want, name))
    for name in ("history", "length", "lookup"):
        same(getattr(mine, name), getattr(tables, name))
    same(mine.heads.tokens, tables.heads.tokens)


@DEVICES
def test_keep_drafts(device):
    kernels = choose(torch.device(device))
    tables, slots, active = filled(Shape(24, 6, 7), 0)
    mine = moved(tables, torch.device(device))
    heads = HeadNodes(*(torch.randint(-1, 9, (len(slots), 11)) for _ in range(3)))
    heads.tokens[1] = -1
    want = torch.arange(6 * 21).view(6, 21) % 40
    facts = want.clone().to(device)
    TORCH.keep_drafts(tables, slots, active, heads, want, 23)
    there = HeadNodes(*(part.to(device) for part in heads))
    kernels.keep_drafts(mine, slots.to(device), active.to(device), there, facts, 23)
    same(facts, want)
    for got, wanted in zip(mine.heads, tables.heads, strict=True):
        same(got, wanted)


@DEVICES
def test_lookup(device):
    kernels, generator = choose(torch.device(device)), torch.Generator().manual_seed(1)
    for high in (2, 3, 6, 50):
        history = torch.randint(high, (64, 90), generator=generator)
        length = torch.randint(90, (64,), generator=generator)
        for count in (1, 4, 15):
            got = kernels.lookup(history.to(device), length.to(device), count)
            same(got, TORCH.lookup(history, length, count))


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_written_and_committed(device, dtype):
    kernels, generator = choose(torch.device(device)), torch.Generator().manual_seed(2)
    slab = torch.randn(2, 5, 24, 2, 8, generator=generator).to(dtype)
    slots, columns = torch.tensor([3, 0]), torch.tensor([[4, 5, 6], [9, 10, 11]])
    keys, values = (torch.randn(2, 3, 2, 8, generator=generator).to(dtype).transpose(1, 2) for _ in range(2))
    mine = slab.clone().to(device)
    TORCH.write_rows(slab[0], slab[1], slots, columns, keys, values)
    there = (part.to(device) for part in (slots, columns, keys, values))
    kernels.write_rows(mine[0], mine[1], *there)
    same(mine, slab)
    length, nodes = torch.tensor([4, 9]), torch.tensor([[0, 2], [0, 1]])  # a path ascends
    TORCH.commit_rows(slab, slots, length, nodes)
    kernels.commit_rows(mine, slots.to(device), length.to(device), nodes.to(device))
    same(mine, slab)


@DEVICES
@pytest.mark.parametrize("vocab", [9, 1024, 2500])
@pytest.mark.parametrize("depth", [None, 1])
def test_top_children(device, vocab, depth):
    logits = (torch.randn(3, 2, vocab, generator=torch.Generator().manual_seed(2)) * 4).bfloat16()
    tau, rows = torch.tensor([[0.7, 2.5], [1.0, 1.0]]), sampling(3)
    there = rows._replace(temperature=rows.temperature.to(device), seed=rows.seed.to(device))
    length = torch.tensor([7, 0, 30])
    kernels = choose(torch.device(device))
    got = kernels.top_children(logits.to(device), depth, length.to(device), tau.to(device), None, there, 8)
    every = TORCH.top_children(logits, depth, length, tau, None, rows, vocab)
    torch.testing.assert_close(got.logp.cpu(), every.logp[..., :8], atol=1e-4, rtol=1e-4)
    known = torch.empty_like(every.logp).scatter_(2, every.tokens, every.logp)
    torch.testing.assert_close(known.gather(2, got.tokens.cpu()), got.logp.cpu(), atol=1e-4, rtol=1e-4)
    assert all(len(set(place)) == 8 for place in got.tokens.flatten(0, 1).tolist())


@pytest.mark.parametrize("kernels", [TORCH, choose(torch.device("cpu"))], ids=lambda kernels: kernels.name)
def test_a_mask_before_the_walk_is_obeyed(kernels):
    """One line between the pass and the walk forbids tokens, whatever the machine."""
    shape = Shape(8, 2, 4)
    tables, slots, active = filled(shape, 1)
    opened = kernels.open_step(tables, slots, active, shape)
    logits = torch.randn(len(slots), shape.num_nodes, VOCAB, generator=torch.Generator().manual_seed(3))
    logits[..., : VOCAB // 2] = -torch.inf  # the mask
    walked = kernels.walk(tables, slots, opened, logits, shape.max_depth, sampling(len(slots)), rest=False)
    emitted = walked.facts[:, 5 : 5 + walked.nodes.shape[1]]
    assert bool(((emitted == -1) | (emitted >= VOCAB // 2)).all())

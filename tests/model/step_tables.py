"""Tables of sequences in the middle of their steps, and what the kernels around a step must make of them."""

from typing import Any

import torch

from medusa_serve.model.drafting.lookup import reference_lookup
from medusa_serve.model.drafting.tree import HeadNodes, Tree, assemble, most_probable
from medusa_serve.model.forward.view import tree_view
from medusa_serve.model.gpu.attention import ancestor_bits
from medusa_serve.model.sampling.accept import Walk, accept, ended
from medusa_serve.model.sampling.filters import Sampling
from medusa_serve.model.shapes import Shape
from medusa_serve.model.tables import SlotTables
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


def check_open_and_close(kernels: Any, device: torch.device, shape: Shape, seed: int, rest: bool) -> None:
    tables, slots, active = filled(shape, seed)
    shape = shape._replace(max_depth=depth_of(shape))
    mine = moved(tables, device)
    limits = tables.limits(slots)
    on = active & ~ended(tables.pending(slots), limits)
    draft = assemble(
        tables.pending(slots), tables.head_nodes(slots), tables.lookup[slots], tables.node_limit[slots], *shape
    )
    view = tree_view(slots, limits.length, slots.tolist(), limits.length.tolist(), draft)
    opened = kernels.open_step(mine, slots.to(device), active.to(device), shape)
    for got, want in (
        (opened.tokens, draft.tokens), (opened.parents, draft.parents), (opened.positions, view.positions),
        (opened.columns, view.columns), (opened.bits, ancestor_bits(draft.mask)), (opened.length, limits.length),
        (opened.active, on), (opened.drafted, (draft.tokens[:, 1:] >= 0).sum(dim=1)),
    ):  # fmt: skip
        same(got, want)

    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(slots), shape.num_nodes, VOCAB, generator=random)
    for row, tokens in enumerate(draft.tokens):  # half of the nodes choose what one of their children holds
        for node in range(1, shape.num_nodes):
            if tokens[node] >= 0 and torch.rand((), generator=random) < 0.7:
                logits[row, draft.parents[row, node], tokens[node]] += 9.0
    logits[2, 0, 5] = torch.nan
    logits[3, -1, 2] = torch.inf
    greedy = Sampling(*([torch.zeros(len(slots))] * 4), torch.zeros(len(slots)), sampled=False, filtered=False)
    walk = accept(logits, draft, shape.max_depth, greedy, limits)
    walk = Walk(*(padded(part, shape.max_depth + 1) for part in walk[:2]), *walk[2:])
    count = tables.advance(slots, on, walk)
    length = tables.length[slots]
    found = reference_lookup(tables.history[slots], length, shape.num_lookup)
    if rest:
        found = torch.full_like(found, -1)
        tables.heads.tokens[slots] = torch.where(on[:, None], -1, tables.heads.tokens[slots])
    tables.keep_draft(slots, on, None, found)
    best = logits.max(dim=-1)
    closed = kernels.close_step(
        mine, slots.to(device), opened, best.indices.to(device), best.values.to(device), shape.max_depth, rest=rest
    )
    facts = closed.facts.cpu()
    same(facts[:, 0], count)
    same(facts[:, 1], walk.finished.long())
    same(facts[:, 2], walk.finite.long())
    same(facts[:, 4], (found >= 0).sum(dim=1))
    for row, emitted in enumerate(walk.num_emitted):
        same(facts[row, 5 : 5 + emitted], walk.tokens[row, :emitted])
        same(closed.nodes[row, :emitted], walk.nodes[row, :emitted])
    same(closed.last, walk.nodes.gather(1, (walk.num_emitted - 1).clamp(min=0)[:, None])[:, 0])
    same(closed.length, length)
    same(closed.pending, tables.pending(slots))
    for name in ("history", "length", "lookup"):
        same(getattr(mine, name), getattr(tables, name))
    same(mine.heads.tokens, tables.heads.tokens)


def padded(part: torch.Tensor, width: int) -> torch.Tensor:
    """A walk on a CPU ends when all rows have; on a GPU every depth runs."""
    return torch.nn.functional.pad(part, (0, width - part.shape[1]), value=-1)


def check_keep_heads(kernels: Any, device: torch.device) -> None:
    tables, slots, active = filled(Shape(24, 6, 7), 0)
    mine = moved(tables, device)
    heads = HeadNodes(*(torch.randint(-1, 9, (len(slots), 11)) for _ in range(3)))
    heads.tokens[1] = -1
    tables.keep_draft(slots, active, heads, tables.lookup[slots])
    facts = torch.arange(6 * 21).view(6, 21) % 40
    want = facts.clone()
    want[:, 4] = torch.maximum(facts[:, 4], (heads.tokens >= 0).any(dim=1) * 23)
    facts = facts.to(device)
    kernels.keep_heads(
        mine, slots.to(device), active.to(device), HeadNodes(*(part.to(device) for part in heads)), facts, 23
    )
    same(facts, want)
    for got, wanted in zip(mine.heads, tables.heads, strict=True):
        same(got, wanted)

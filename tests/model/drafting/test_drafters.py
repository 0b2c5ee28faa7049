"""Per-context trees of both families against slow searches."""

import itertools

import pytest
import torch

from medusa_serve.errors import LoadError
from medusa_serve.model.drafting.drafters import ParallelDrafter, SequentialDrafter
from medusa_serve.model.drafting.heads import HydraHeads, MedusaHeads, SequentialHeads
from medusa_serve.model.drafting.tree import ancestors, most_probable
from medusa_serve.model.sampling.noise import gumbel
from tests.model.rows import sampling

VOCAB, HIDDEN, DEPTH = 6, 16, 3
TAU, NOISE_TAU = (0.4, 1.5, 0.6), (0.9, 0.3, 2.0)


def fresh(made, vocab=VOCAB):
    """Random and attached."""
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    made.attach(torch.randn(vocab, HIDDEN), torch.randn(vocab, HIDDEN))
    return made.eval().requires_grad_(False)


def heads(token_map=None) -> SequentialHeads:
    torch.manual_seed(0)
    return fresh(SequentialHeads(HIDDEN, inner=24, readout=16, max_depth=DEPTH, token_map=token_map))


def medusa(num_heads=DEPTH, token_map=None, vocab=VOCAB) -> MedusaHeads:
    torch.manual_seed(0)
    return fresh(MedusaHeads(HIDDEN, num_heads, token_map=token_map), vocab)


def mixed(temperatures, seeds=(5, 6, 7)):
    """Rows of these temperatures in one batch."""
    rows = sampling(len(temperatures), seeds=torch.tensor(seeds[: len(temperatures)]))
    return rows._replace(temperature=torch.tensor(temperatures), sampled=max(temperatures) > 0)


def logp(logits, depth, token_map, temperature, seed, length) -> tuple[list[int], list[float]]:
    """Base ids, and the log-probabilities of the module's docstring; logits (V')."""
    ids = torch.arange(len(logits)) if token_map is None else token_map
    if not temperature:
        return ids.tolist(), (logits.float() / TAU[depth]).log_softmax(-1).tolist()
    drawn = logits.float() / temperature + gumbel(torch.tensor(seed), torch.tensor(length + 1 + depth), ids)
    return ids.tolist(), (drawn / NOISE_TAU[depth]).log_softmax(-1).tolist()


def exhaustive(made, hidden, pending, temperature, seed, length) -> dict[tuple[int, ...], float]:
    """The log-probability of every path of tokens up to DEPTH, node by node."""
    found: dict[tuple[int, ...], float] = {}
    states = {(): made.start(hidden[None], torch.tensor([pending]))}
    for depth in range(DEPTH):
        for path in [p for p in states if len(p) == depth]:
            logits = made.logits(states[path])[0]
            for token, share in zip(*logp(logits, depth, made.token_map, temperature, seed, length), strict=True):
                found[(*path, token)] = found.get(path, 0.0) + share
                states[(*path, token)] = made.advance(states[path], torch.tensor([token]))
    return found


@pytest.mark.parametrize("token_map", [None, torch.tensor([5, 0, 3, 2])])
@pytest.mark.parametrize("temperatures", [(0.0, 0.0, 0.0), (0.8, 0.8, 0.8), (0.7, 0.0, 1.2)])
def test_the_most_probable_nodes_are_found_and_form_a_tree(temperatures, token_map):
    """Each row by the tau of its own kind, though both kinds stand in one batch."""
    made = heads(token_map)
    drafter = SequentialDrafter(made, TAU, NOISE_TAU)
    drafter.beams = lambda max_nodes: 64  # so wide that no node is lost: the search is exhaustive, too
    drafter.size(40, None)
    hidden, pending, length = torch.randn(3, HIDDEN), torch.tensor([1, 4, 2]), torch.tensor([7, 0, 30])
    got = drafter.draft(torch.arange(3), hidden, pending, length, mixed(temperatures))
    for row in range(3):
        truth = exhaustive(made, hidden[row], int(pending[row]), temperatures[row], 5 + row, int(length[row]))
        assert paths(got, row) == sorted(truth, key=lambda path: -truth[path])[: drafter.max_nodes]
    assert_prefixes_are_trees(got, drafter)


def products(made, hidden, count, num_ranks, temperature, seed, length) -> list[tuple[int, ...]]:
    """The `count` most probable paths, with a heap over the products of each depth's best probabilities."""
    ids, shares = [], []
    for depth, logits in enumerate(made.logits(hidden[None])[0]):
        tokens, values = logp(logits, depth, made.token_map, temperature, seed, length)
        best = sorted(zip(values, tokens, strict=True), reverse=True)[:num_ranks]
        ids.append([token for _, token in best])
        shares.append(torch.tensor([value for value, _ in best], dtype=torch.float64).exp().tolist())
    return [tuple(ids[d][rank] for d, rank in enumerate(path)) for path in most_probable(shares, count + 1)]


@pytest.mark.parametrize("token_map", [None, torch.randperm(70, generator=torch.Generator().manual_seed(1))[:29]])
@pytest.mark.parametrize("temperatures", [(0.0, 0.0, 0.0), (0.8, 0.8, 0.8), (0.7, 0.0, 1.2)])
@pytest.mark.parametrize("num_ranks", [None, 29])
def test_parallel_heads_draft_the_largest_products(temperatures, token_map, num_ranks):
    made = medusa(token_map=token_map, vocab=70)
    drafter = ParallelDrafter(made, TAU, NOISE_TAU, num_ranks)
    hidden, pending, length = torch.randn(3, HIDDEN), torch.tensor([1, 4, 2]), torch.tensor([7, 0, 30])
    wanted = [
        products(made, hidden[row], 63, num_ranks or 10, temperatures[row], 5 + row, int(length[row]))
        for row in range(3)
    ]
    for size in range(1, 64):
        drafter.size(size, None)
        got = drafter.draft(torch.arange(3), hidden, pending, length, mixed(temperatures))
        assert drafter.max_nodes == size
        assert [paths(got, row) for row in range(3)] == [want[:size] for want in wanted]
        assert_prefixes_are_trees(got, drafter)


def test_tau_decides_between_depths():
    """A depth that is surer than its q says gets the nodes."""
    made = medusa()
    hidden, zeros = torch.randn(1, HIDDEN), torch.zeros(1, dtype=torch.int64)

    def depths(tau, noise_tau, temperature):
        drafter = ParallelDrafter(made, tau, noise_tau)
        drafter.size(5, None)
        return drafter.draft(zeros, hidden, zeros, zeros, mixed((temperature,))).depths[0].tolist()

    sharp, flat = [0.05, 0.05, 0.05], [50.0, 50.0, 50.0]
    assert max(depths(sharp, flat, 0.0)) == max(depths(flat, sharp, 0.7)) == DEPTH
    assert max(depths(flat, sharp, 0.0)) == max(depths(sharp, flat, 0.7)) == 1


def assert_prefixes_are_trees(nodes, drafter):
    """Parents come first, depths count the ancestors, and no path occurs twice."""
    rows, count = nodes.tokens.shape
    assert count == drafter.max_nodes
    assert bool((nodes.parents <= torch.arange(count)).all())
    mask = ancestors(torch.cat([torch.zeros(rows, 1, dtype=torch.int64), nodes.parents], dim=1), drafter.max_depth)
    assert torch.equal(mask.sum(2)[:, 1:], nodes.depths + 1)
    for row in range(rows):
        found = paths(nodes, row)
        assert len(set(found)) == len(found)


def paths(nodes, row: int) -> list[tuple[int, ...]]:
    out: list[tuple[int, ...]] = []
    for token, parent, depth in zip(*(part[row].tolist() for part in nodes), strict=True):
        out.append((*(out[parent - 1] if parent else ()), token))
        assert len(out[-1]) == depth
    return out


@pytest.mark.parametrize("made", [heads(), medusa(), medusa(1)], ids=["sequential", "medusa", "one"])
def test_a_narrow_search_still_gives_trees(made):
    kind = ParallelDrafter if made.family == "medusa" else SequentialDrafter
    drafter = kind(made, num_ranks=3)
    for size in (1, 2, 3, 7, 15, 63):
        drafter.size(size, None)
        got = drafter.draft(
            torch.arange(2), torch.randn(2, HIDDEN), torch.tensor([1, 2]), torch.tensor([3, 4]), sampling(2)
        )
        assert_prefixes_are_trees(got, drafter)


@pytest.mark.parametrize("temperature", [0.0, 0.01])
def test_logits_of_any_kind_give_trees(temperature):
    """Sure beyond rounding, all equal, infinite, not a number: a draft may be worthless, but never malformed."""
    made = medusa()
    rows = torch.zeros(6, DEPTH, VOCAB)
    rows[1, :, 2], rows[2, 0, 4], rows[3] = 1e30, -torch.inf, torch.nan
    rows[4, :, :3], rows[5] = torch.inf, torch.tensor([-3e4, 0, 3e4, 2e4, -1e4, 5.0])
    made.logits = lambda hidden: rows
    drafter = ParallelDrafter(made)
    zeros = torch.zeros(6, dtype=torch.int64)
    got = drafter.draft(zeros, torch.zeros(6, HIDDEN), zeros, zeros, sampling(6, temperature=temperature))
    assert_prefixes_are_trees(got, drafter)
    assert paths(got, 1)[:3] == [(2,), (2, 2), (2, 2, 2)]


@pytest.mark.parametrize("family", ["medusa", "sequential", "hydra"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_nothing_looks_at_values(family, temperature):
    """A tensor on the meta device has none: whatever asked for one would fail, as it would in a CUDA graph."""
    token_map = torch.tensor([5, 0, 3, 2])
    made = {
        "medusa": lambda: medusa(token_map=token_map),
        "sequential": lambda: heads(token_map),
        "hydra": lambda: fresh(HydraHeads(HIDDEN, DEPTH, 1, vocab_size=VOCAB)),
    }[family]().to("meta")
    made._embedding = (torch.empty(VOCAB, HIDDEN, device="meta"),)
    drafter = (ParallelDrafter if family == "medusa" else SequentialDrafter)(made, TAU, NOISE_TAU)
    zeros = torch.zeros(2, dtype=torch.int64, device="meta")
    rows = sampling(2, temperature=temperature)
    rows = rows._replace(**{name: getattr(rows, name).to("meta") for name in ("temperature", "seed")})
    got = drafter.draft(zeros, torch.empty(2, HIDDEN, device="meta"), zeros, zeros, rows)
    assert [part.shape for part in got] == [(2, drafter.max_nodes)] * 3


@pytest.mark.parametrize("drafter", [SequentialDrafter(heads()), ParallelDrafter(medusa())])
def test_a_tree_file_is_refused(drafter):
    with pytest.raises(LoadError, match="parallel heads"):
        drafter.size(3, ((0,), (1,)))


@pytest.mark.parametrize("drafter", [SequentialDrafter(heads(), num_ranks=4), ParallelDrafter(medusa())])
def test_rows_do_not_depend_on_each_other(drafter):
    hidden, pending, length = torch.randn(4, HIDDEN), torch.arange(4), torch.arange(4) * 3
    rows = sampling(4, temperature=0.7)
    together = drafter.draft(torch.arange(4), hidden, pending, length, rows)
    for row, part in itertools.product(range(4), range(3)):
        one = slice(row, row + 1)
        alone = drafter.draft(
            torch.arange(1), hidden[one], pending[one], length[one], sampling(1, temperature=0.7, seeds=rows.seed[one])
        )
        assert torch.equal(alone[part], together[part][one])

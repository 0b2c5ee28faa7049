"""The load-time self-test: on the actual model, the plugged pass must give what the plain forward gives."""

from __future__ import annotations

from typing import Any

import torch

from .drafting.tree import Tree
from .forward.tree_forward import PlugInError, TreeForward
from .forward.view import chain_view, tree_view

# Relative error ‖got - want‖ / ‖want‖ of one node's logits. A wrong mask bit or position gives errors near 1; models
# that compute their softmax in float32 whatever their dtype are 1e-7 off.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}
TREE = Tree(paths=((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)))
PATH = (0, 1, 3, 6)  # the nodes that the test commits: the root and (0,) (0,0) (0,0,0)
LEAVES = ((0, 1, 4), (0, 2, 5))  # the paths to the others: (0,1) and (1,0)


@torch.no_grad()
def references(model: Any, device: torch.device) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Prompts and, for each, the plain forward's logits of every node of TREE after its own path, and one step past
    PATH: a token's are the same whatever follows it, so that one pass gives those of all nodes of a path.

    Must run before the attention is replaced.
    """
    vocab = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(1)
    count = TREE.num_nodes + 1
    prompts = [torch.randint(vocab, (length + count,), generator=generator).to(device) for length in (3, 6)]
    wanted = []
    for ids in prompts:
        prompt, nodes = ids[:-count], ids[-count:]
        found: dict[int, torch.Tensor] = {}
        for path in (*LEAVES, (*PATH, TREE.num_nodes)):
            row = torch.cat([prompt, nodes[torch.tensor(path)]])
            logits = model(input_ids=row[None], use_cache=False).logits[0, len(prompt) :]
            found |= dict(zip(path, logits, strict=True))
        wanted.append([found[node] for node in range(count)])
    return prompts, wanted


def check(
    forward: TreeForward,
    prompts: list[torch.Tensor],
    wanted: list[list[torch.Tensor]],
    slots: int,
    *,
    packed: bool = False,
) -> float:
    """The largest relative error of prefill in two chunks, a tree pass, a commit and the pass after it. Raises
    PlugInError above the dtype's tolerance. Uses the first slots and wipes them. packed: tree passes see all rows as
    one, and the pass after the commit is one of a single token for each row."""
    prompts, wanted = prompts[:slots], wanted[:slots]
    count = TREE.num_nodes + 1
    device = prompts[0].device
    host_length = [len(ids) - count for ids in prompts]
    host_slots = list(range(len(prompts)))[::-1]  # not in order: a pass must not depend on it
    for slot, ids, length in zip(host_slots, prompts, host_length, strict=True):
        for start, end in ((0, 2), (2, length)):
            forward.run(ids[None, start:end], chain_view([slot], [start], [end - start], device), last_only=True)
    nodes = torch.stack([ids[-count:] for ids in prompts])
    slot_ids, lengths = torch.tensor(host_slots, device=device), torch.tensor(host_length, device=device)
    view = tree_view(slot_ids, lengths, host_slots, host_length, TREE.draft(nodes[:, :-1]), packed=packed)
    logits, _ = forward.run(nodes[:, :-1], view)
    forward.commit(view, torch.tensor([PATH] * len(prompts), device=device))
    ends = [length + len(PATH) for length in host_length]
    if packed:
        root = Tree().draft(nodes[:1, -1:])
        final = torch.cat([
            forward.run(nodes[row : row + 1, -1:], tree_view(
                slot_ids[row : row + 1], lengths[row : row + 1] + len(PATH), [slot], [end], root, packed=True
            ))[0]
            for row, (slot, end) in enumerate(zip(host_slots, ends, strict=True))
        ])  # fmt: skip
    else:
        final, _ = forward.run(nodes[:, -1:], chain_view(host_slots, ends, [1] * len(prompts), device))
    error = 0.0
    for row, want in enumerate(wanted):
        got = [*logits[row], final[row, 0]]
        for one, other in zip(got, want, strict=True):
            error = max(error, float((one - other).double().norm() / other.double().norm().clamp(min=1e-30)))
    for slot in host_slots:
        forward.zero(slot)
    if not error <= TOLERANCE.get(forward.model.dtype, 0.1):
        raise PlugInError(f"its logits differ from a plain forward (relative error {error:.1g})")
    return error

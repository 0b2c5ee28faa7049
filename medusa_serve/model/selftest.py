"""The tests at load, on the actual model: does its plugged-in pass give the logits of the plain forward, and are passes
exact?

The exact mode of a CPU: in bfloat16, int8 and int4 too, a token's logits are the same bits for every tree, batch and
chunking of the prompt. So a text equals that of plain decoding alone, token for token. Products give each row the same
bits for any number of rows (weights/int8.py, weights/int4.py; bfloat16 needs a few rows, so fewer are padded), and so
do norms and all element-wise operations. Torch's attention does not, hence cpu/attention.py. The self-test assumes
none of this: it compares passes of the model itself.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import LoadError
from .drafting.tree import Tree
from .forward.tree_forward import PlugInError, TreeForward
from .forward.view import chain_view, tree_view

# Relative error ‖got - want‖ / ‖want‖ of one node's logits. A wrong mask bit or position gives errors near 1; models
# with a softmax that is always in float32 have an error of 1e-7.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}
TREE = Tree(paths=((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)))
PATH = (0, 1, 3, 6)  # the nodes that the test commits: the root and (0,) (0,0) (0,0,0)
LEAVES = ((0, 1, 4), (0, 2, 5))  # the paths to the others: (0,1) and (1,0)
PROMPT, TOKENS = 21, 4  # lengths in the exactness test: its prompt, and the tokens decoded after it
EXACT_TREE = Tree(((0,), (1,), (1, 0), (0, 0), (1, 0, 0), (0, 0, 0), (1, 1)))
EXACT_PATH = (0, 2, 3, 5)  # the nodes that hold the sequence; the others hold other tokens


@torch.no_grad()
def references(model: Any, device: torch.device) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Prompts and, for each, the plain forward's logits of every node of TREE after its own path, and one step past
    PATH. A token's logits do not depend on later tokens, so one pass gives the logits of all nodes of a path.

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
    one, and after the commit each row has a pass with a single token."""
    prompts, wanted = prompts[:slots], wanted[:slots]
    count = TREE.num_nodes + 1
    device = prompts[0].device
    host_length = [len(ids) - count for ids in prompts]
    host_slots = list(range(len(prompts)))[::-1]  # not in order: a pass must not depend on the order
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


def make_exact(forward: TreeForward, wanted: bool | None, slots: int) -> str | None:
    """Make the forward's passes exact if the test passes; → a note, or None if exactness is not for this model. Raises
    LoadError if it is `wanted` and cannot be had. The first two slots must be free."""
    if wanted is False or (wanted is None and not _is_for(forward)):
        return None
    why = None if _is_for(forward) else "it is for a CPU in bfloat16, int8 or int4"
    why = why or (None if forward.kernels.name == "numba" else "it needs Numba (pip install numba)")
    if why is None:
        forward.use(forward.active, exact=True)
        why = difference(forward, slots)
    if why is None:
        return "exact: the same bits whatever the tree, the batch and a prompt's chunks"
    forward.use(forward.active)
    if wanted:
        raise LoadError(f"The exact mode cannot be had: {why}.")
    return f"not exact, near-ties may fall either way, because {why}"


def _is_for(forward: TreeForward) -> bool:
    model = forward.model
    return model.device.type == "cpu" and model.dtype == torch.bfloat16 and not forward.is_split


@torch.inference_mode()
def difference(forward: TreeForward, slots: int) -> str | None:
    """What changes the bits of a token's logits: the chunks of a prompt, a tree, or a batch; None if none of them does.
    Wipes the first two slots."""
    vocab = forward.model.get_input_embeddings().num_embeddings
    count = PROMPT + TOKENS
    ids = torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(2))
    other = (ids + 1) % vocab
    end = PROMPT - 1

    def chain(slot: int, start: int, stop: int) -> torch.Tensor:
        view = chain_view([slot], [start], [stop - start], ids.device)
        return forward.run(ids[None, start:stop], view)[0][0]

    first = chain(0, 0, PROMPT)
    plain = torch.stack([first[end], *(chain(0, at, at + 1)[0] for at in range(PROMPT, count))])
    chain(0, 0, 5)
    if not torch.equal(torch.cat([chain(0, 5, end), chain(0, end, count)]), torch.cat([first[5:end], plain])):
        return _wiped("the chunks of a prompt", forward, slots)
    rows = list(range(min(2, slots)))
    if len(rows) > 1:
        chain(1, 0, end)
    nodes = other[: EXACT_TREE.num_nodes].clone()
    nodes[list(EXACT_PATH)] = ids[end : end + len(EXACT_PATH)]
    for some in (rows[:1], rows):
        tokens = nodes.expand(len(some), -1)
        slot_ids, lengths = torch.tensor(some), torch.tensor([end] * len(some))
        view = tree_view(slot_ids, lengths, some, [end] * len(some), EXACT_TREE.draft(tokens))
        logits = forward.run(tokens, view)[0][:, list(EXACT_PATH)]
        if not torch.equal(logits, plain[: len(EXACT_PATH)].expand_as(logits)):
            return _wiped("a tree" if len(some) == 1 else "a batch", forward, slots)
    return _wiped(None, forward, slots)


def _wiped(what: str | None, forward: TreeForward, slots: int) -> str | None:
    for slot in range(min(2, slots)):
        forward.zero(slot)
    return what and f"{what} changes the logits' last bits here"

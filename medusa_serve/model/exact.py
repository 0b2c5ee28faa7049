"""The exact mode of a CPU: in bfloat16, int8 and int4 too, a token's logits are the same bits whatever the tree, the
batch and the chunks of a prompt. So a text is what plain decoding alone would have given, token for token.

Products give each row the same bits for any number of rows (int8.py, int4.py; bfloat16's from a few rows on, so fewer
are padded), and so do norms and all that works element by element; what differs is attention, hence canonical.py.
Nothing of this is taken on trust: passes of the model itself are compared at load.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import LoadError
from .drafting.tree import Tree
from .forward.tree_forward import TreeForward
from .forward.view import chain_view, tree_view

SMALL = 4096  # multiplications up to which torch takes another kernel for a product
PROMPT, TOKENS = 21, 4  # of the test's sequence: a prompt, and tokens decoded behind it
TREE = Tree(((0,), (1,), (1, 0), (0, 0), (1, 0, 0), (0, 0, 0), (1, 1)))
PATH = (0, 2, 3, 5)  # its nodes that hold the sequence; the others hold something else


def make_exact(forward: TreeForward, wanted: bool | None, slots: int) -> str | None:
    """Set `forward.exact` where it holds; → a note, None where it is not for this model. Raises LoadError where it is
    `wanted` and does not hold. The first two slots must be free."""
    if wanted is False or (wanted is None and not _is_for(forward)):
        return None
    why = None if _is_for(forward) else "it is for a CPU in bfloat16, int8 or int4"
    why = why or (None if forward.kernels.name == "numba" else "it needs Numba (pip install numba)")
    if why is None:
        forward.exact = True
        pad_rows(forward.model)
        why = difference(forward, slots)
    if why is None:
        return "exact: the same bits whatever the tree, the batch and a prompt's chunks"
    forward.exact = False
    leave_rows(forward.model)
    if wanted:
        raise LoadError(f"The exact mode cannot be had: {why}.")
    return f"not exact, near-ties may fall either way, because {why}"


def pad_rows(model: Any) -> None:
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__dict__["forward"] = _Padded(module)


def leave_rows(model: Any) -> None:
    """The modules as they were."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _Padded):
            del module.forward


class _Padded:
    """In the place of a linear layer's forward: a product of few rows takes the kernel of many."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer
        self._least = max(2, SMALL // layer.weight.numel() + 1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        layer, rows = self._layer, x.numel() // x.shape[-1]
        if rows >= self._least:
            return F.linear(x, layer.weight, layer.bias)
        padded = F.pad(x.reshape(rows, -1), (0, 0, 0, self._least - rows))
        return F.linear(padded, layer.weight, layer.bias)[:rows].view(*x.shape[:-1], -1)


def _is_for(forward: TreeForward) -> bool:
    model = forward.model
    return model.device.type == "cpu" and model.dtype == torch.bfloat16 and not forward.is_split


@torch.inference_mode()
def difference(forward: TreeForward, slots: int) -> str | None:
    """What changes the bits of a token's logits; None: neither chunks of a prompt, nor a tree, nor a batch. Wipes the
    first two slots."""
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
        return _told("the chunks of a prompt", forward, slots)
    rows = list(range(min(2, slots)))
    if len(rows) > 1:
        chain(1, 0, end)
    nodes = other[: TREE.num_nodes].clone()
    nodes[list(PATH)] = ids[end : end + len(PATH)]
    for some in (rows[:1], rows):
        tokens = nodes.expand(len(some), -1)
        slot_ids, lengths = torch.tensor(some), torch.tensor([end] * len(some))
        view = tree_view(slot_ids, lengths, some, [end] * len(some), TREE.draft(tokens))
        logits = forward.run(tokens, view)[0][:, list(PATH)]
        if not torch.equal(logits, plain[: len(PATH)].expand_as(logits)):
            return _told("a tree" if len(some) == 1 else "a batch", forward, slots)
    return _told(None, forward, slots)


def _told(what: str | None, forward: TreeForward, slots: int) -> str | None:
    for slot in range(min(2, slots)):
        forward.zero(slot)
    return what and f"{what} changes the logits' last bits here"

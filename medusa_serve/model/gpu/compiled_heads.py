"""The cell of sequential heads compiled by Inductor: on a GPU a depth of the tree search launches thirty small kernels
around its four products; once compiled, it launches eight."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

from ...errors import reason_of
from ..forward.replaced import replace_attributes

STEPS = ("advance", "features", "_begin")  # some heads lack the last one
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.05}  # of the features' norm
ROWS = (1, 5)  # of the check: one row and several rows are compiled separately


class Compiled:
    """A function of tensors (R, …), for any R."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.plain = function
        self._compiled = torch.compile(function, fullgraph=True, dynamic=False)

    def __call__(self, *tensors: Tensor) -> Tensor:
        for tensor in tensors:
            if tensor.shape[0] > 1:
                torch._dynamo.mark_dynamic(tensor, 0)
        return self._compiled(*tensors)


def fuse_heads(heads: Any, hidden_width: int, changed: Callable[[], None]) -> Generator[None, None, str]:
    """Compile the heads' steps, part by part, unless that is done or gives other numbers; → a note.

    hidden_width: of `start`'s input · changed: called when captured passes are out of date
    """
    steps = [name for name in STEPS if hasattr(heads, name)]
    if steps[:2] != list(STEPS[:2]):
        return "heads are not compiled (they draft all depths at once)"
    if STEPS[0] in vars(heads):
        return "heads are compiled"
    errors: list[float] = []
    try:
        wanted = [_features(heads, hidden_width, rows) for rows in ROWS]
        steps_of = [(heads, name, Compiled(getattr(heads, name))) for name in steps]
        for rows, want in zip(ROWS, wanted, strict=True):
            undo = replace_attributes(steps_of)
            try:
                got = _features(heads, hidden_width, rows)
            finally:
                undo()
            errors.append(float((got - want).norm() / want.norm()))
            yield
        allowed = TOLERANCE.get(heads.output.weight.dtype, 0.05)
        why = next((f"their features differ by {error:.1%}" for error in errors if not error <= allowed), "")
    except Exception as reason:  # two compilers run, which may raise anything
        why = reason_of(reason)
    if why:
        return f"heads are not compiled ({why})"
    replace_attributes(steps_of)
    changed()
    return "heads are compiled"


@torch.inference_mode()
def _features(heads: Any, hidden_width: int, rows: int) -> Tensor:
    """The features two depths after random hidden states."""
    weight = heads.output.weight
    random = torch.Generator(weight.device).manual_seed(rows)
    hidden = torch.randn(rows, hidden_width, generator=random, device=weight.device).to(weight.dtype)
    tokens = torch.arange(2 * rows, device=weight.device).view(2, rows)
    return heads.features(heads.advance(heads.start(hidden, tokens[0]), tokens[1])).float()

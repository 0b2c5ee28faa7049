"""The hidden states that the heads read of a pass, and the decoder layers between which they are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ...errors import LoadError


class HiddenTap:
    """Keeps the hidden states of a pass that the heads read. The model itself still post-processes its logits (soft
    caps, scales).

    indexes, as in transformers' `hidden_states`: 0 and up the input of the decoder layer with this number, -1 the input
    of the output layer, after the final norm. Raises LoadError if the model has no such layer.
    """

    def __init__(self, model: Any, indexes: Sequence[int] = (-1,)) -> None:
        self._kept: dict[int, torch.Tensor] = {}
        self.layers: tuple[int, ...] = ()  # numbers of the layers with a kept input
        self._handles: list[Any] = []
        output = model.get_output_embeddings()
        if output is None:
            return
        wanted: dict[int, torch.nn.Module] = {-1: output}
        if any(index != -1 for index in indexes):
            layers = decoder_layers(model)
            indexes = [_normal(index, len(layers)) for index in indexes]
            wanted |= {index: layers[index] for index in indexes if index >= 0}
        self._indexes = tuple(indexes)
        self.layers = tuple(index for index in wanted if index >= 0)
        for index, module in wanted.items():
            self._handles.append(module.register_forward_pre_hook(partial(self._note, index), with_kwargs=True))

    def _note(self, index: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.keep(index, args[0] if args else kwargs["hidden_states"])

    def keep(self, index: int, hidden: torch.Tensor) -> None:
        """For code that runs the layers without their modules."""
        self._kept[index] = hidden

    def take(self, at: torch.Tensor | None = None) -> torch.Tensor | None:
        """The hidden states of the last pass, side by side in the order of the indexes: (B, N, M·H). N: the positions
        that the output layer saw, `at` or the last ones."""
        kept, self._kept = self._kept, {}
        if -1 not in kept:
            return None
        last = kept[-1]
        if at is not None and last.shape[1] != len(at):
            last = last[:, at]
        chosen = slice(-last.shape[1], None) if at is None else at
        parts = [last if index == -1 else kept[index][:, chosen] for index in self._indexes]
        if any(part.shape != last.shape for part in parts):
            raise LoadError("The heads read hidden states that this model's layers do not pass on one by one.")
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def _normal(index: int, layers: int) -> int:
    """An index of `hidden_states` as one of HiddenTap: -1, or the number of a layer."""
    if not -layers - 1 <= index <= layers:
        raise LoadError(f"The heads read hidden state {index}, the model has only {layers} layers.")
    return -1 if index in (-1, layers) else index % (layers + 1)


def decoder_layers(model: Any) -> torch.nn.ModuleList:
    """The model's list of decoder layers, under any name: the outermost list with as many layers as the config says.
    Raises LoadError if there is none."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise LoadError("The heads read hidden states between layers, and no list of decoder layers is found in the model.")

"""The frozen base: hidden states of complete sequences in one pass, and fresh heads that read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LoadError
from ..model.drafting.heads import Heads, MedusaHeads, SequentialHeads
from ..model.forward.hidden_tap import HiddenTap
from .batches import Batch
from .loss import Output
from .shards import Answers
from .train_config import TrainConfig


class Teacher:
    """A base model that is only read. `hidden_inputs`: hidden states that the heads read, as indexes of transformers'
    `hidden_states`, the last one (-1, after the final norm) first."""

    def __init__(self, model: Any, hidden_inputs: Sequence[int] = (-1,)) -> None:
        layer = model.get_output_embeddings()
        if layer is None or not isinstance(getattr(layer, "weight", None), Tensor):
            raise LoadError("The base model has no plain output layer for heads to share.")
        if tuple(hidden_inputs[:1]) != (-1,):
            raise LoadError("hidden_inputs must begin with -1, the base's last hidden state.")
        self.model, self.output_layer, self.hidden_inputs = model, layer, tuple(hidden_inputs)
        self.device, self.dtype = model.device, layer.weight.dtype
        text = model.config.get_text_config()
        self.hidden_size, self.vocab_size = layer.weight.shape[1], model.get_input_embeddings().num_embeddings
        self.embed_size = model.get_input_embeddings().embedding_dim
        self.softcap: float | None = getattr(text, "final_logit_softcapping", None)

    @torch.no_grad()
    def hidden(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, S), padded on the right → what the heads read (B·S, M·H), and the last hidden state (B·S, H), which
        is the first part of it.

        No mask: attention is causal, so padding after a sequence changes nothing in it.
        """

        def first(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0][:, :1], *args[1:])  # so that logits are computed for one position only

        tap = HiddenTap(self.model, self.hidden_inputs)  # as when the heads serve; it reads the input before `first`
        handle = self.output_layer.register_forward_pre_hook(first)
        try:
            self.model(input_ids=ids, use_cache=False)
            states = tap.take()
        finally:
            handle.remove()
            tap.close()
        assert states is not None
        states = states.flatten(0, 1)
        return states, states[:, : self.hidden_size]

    def output(self, token_map: Tensor | None) -> Output:
        """The output layer's rows of the draft vocabulary."""
        weight, bias = self.output_layer.weight.detach(), getattr(self.output_layer, "bias", None)
        if token_map is not None:
            weight, bias = weight[token_map], None if bias is None else bias[token_map]
        return Output(weight, None if bias is None else bias.detach(), self.softcap)

    def attach(self, heads: Heads) -> None:
        heads.attach(self.output_layer, self.model.get_input_embeddings())


def head_features(heads: Heads, hidden: Tensor, batch: Batch) -> Tensor:
    """hidden (R, M·H) at the batch's rows → (R, D, H), the inputs of the output layer at each depth.

    Sequential heads read the pending token and then the true ones (teacher forcing): a node of the tree only counts if
    its ancestors are the true tokens.
    """
    if isinstance(heads, MedusaHeads):
        return heads.features(hidden)
    assert isinstance(heads, SequentialHeads)
    return heads.unroll(hidden, batch.tokens(heads.max_depth))


def new_heads(config: TrainConfig, teacher: Teacher, token_map: Tensor | None) -> Heads:
    """Fresh fp32 heads on the base's device, the same for the same seed; the global random state is not changed."""
    size = teacher.hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        heads: Heads
        if config.family == "medusa":
            heads = MedusaHeads(size, config.num_heads, config.num_layers, token_map=token_map)
        else:
            heads = SequentialHeads(
                size, width=config.width, inner=config.inner, readout=config.readout, layers=config.num_layers,
                hidden_inputs=len(config.hidden_inputs), embed_size=teacher.embed_size, max_depth=config.num_heads,
                token_map=token_map,
            )  # fmt: skip
            heads.hidden_indexes = teacher.hidden_inputs
    heads = heads.to(teacher.device, torch.float32)
    teacher.attach(heads)
    return heads


def draft_vocabulary(answers: Answers, size: int) -> Tensor | None:
    """The `size` most frequent tokens of the answers, most frequent first (ties by id); None: the whole vocabulary."""
    if not 0 < size < answers.vocab_size:
        return None
    counts = answers.answer_counts()
    return torch.from_numpy(np.argsort(-counts, kind="stable")[:size].copy())

"""The output layer of draft heads: features to logits of the (draft) vocabulary.

Letters as in heads.py: R rows, K heads, H hidden size, V vocabulary, V' draft vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import LoadError
from ..weights.int4 import Int4Linear
from ..weights.int8 import WIDTH, Int8Linear, int8_product, quantized


class OutputLayer(nn.Module):
    """Features to logits of the (draft) vocabulary: the base's output layer (tied), or the heads' own.

    A tied weight is no parameter and in no state_dict: `attach` borrows the base's rows. With a token map it copies the
    map's rows once, contiguous, so that each step reads V' rows instead of gathering among V.
    """

    weight: Tensor | None  # float, or int8 with a scale for each row
    scale: Tensor | None
    bias: Tensor | None
    token_map: Tensor | None
    small: Int4Linear | None  # replaces the weight

    def __init__(
        self,
        hidden_size: int,
        *,
        vocab_size: int | None = None,
        num_heads: int | None = None,
        bias: bool = False,
        token_map: Tensor | None = None,
    ) -> None:
        """vocab_size None: tied. num_heads None: one weight [V', H] for all heads, else [K, V', H]."""
        super().__init__()
        self.hidden_size = hidden_size
        self.tied = vocab_size is None
        self.register_buffer("token_map", None if token_map is None else token_map.long())
        self.register_buffer("scale", None, persistent=False)
        self.small = None
        if vocab_size is None:
            self.register_buffer("weight", None, persistent=False)
            self.register_buffer("bias", None, persistent=False)
            return
        shape = (vocab_size,) if num_heads is None else (num_heads, vocab_size)
        self.weight = nn.Parameter(torch.empty(*shape, hidden_size).normal_(std=hidden_size**-0.5))
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None

    @property
    def vocab_size(self) -> int:
        """V', the width of the logits; 0 while tied and not attached."""
        if self.small is not None:
            return self.small.out_features
        return 0 if self.weight is None else self.weight.shape[-2]

    @property
    def device(self) -> torch.device:
        held = self.weight if self.small is None else self.small.packed
        assert held is not None
        return held.device

    def attach(self, base_output: nn.Module | Tensor, token_map: Tensor | None = None) -> None:
        """Borrow the base's output layer ([V, H], maybe a bias). `token_map` replaces the heads' own (tied only)."""
        weight = base_output if isinstance(base_output, Tensor) else getattr(base_output, "weight", None)
        if isinstance(base_output, Int4Linear):
            weight = base_output.dense()
        bias = None if isinstance(base_output, Tensor) else getattr(base_output, "bias", None)
        scale = base_output.scale if isinstance(base_output, Int8Linear) else None
        if not isinstance(weight, Tensor) or weight.dim() != 2 or not (scale is not None or weight.is_floating_point()):
            raise LoadError("The base model's output layer has no plain floating-point weight to share with the heads.")
        vocab, hidden = weight.shape
        if hidden != self.hidden_size:
            raise LoadError(f"The heads have hidden size {self.hidden_size}, the base model's output layer {hidden}.")
        if token_map is not None:
            if not self.tied:
                raise LoadError("Heads with their own output layer keep their own token map.")
            self.token_map = token_map.to(weight.device, torch.long)
        top = -1 if self.token_map is None else int(self.token_map.max())
        if top >= vocab:
            raise LoadError(f"token_map names token {top}, the base vocabulary ends at {vocab - 1}.")
        if self.tied:
            rows = slice(None) if self.token_map is None else self.token_map.to(weight.device)
            self.weight, self.bias = weight.detach()[rows], None if bias is None else bias.detach()[rows]
            self.scale = None if scale is None else scale[rows]

    def keep_first(self, count: int) -> None:
        """Keep only the first `count` tokens of the draft vocabulary. The layer must be tied and attached."""
        assert self.weight is not None
        self.token_map = (
            torch.arange(count, device=self.weight.device) if self.token_map is None else self.token_map[:count]
        )
        self.weight = self.weight[:count]
        self.bias = None if self.bias is None else self.bias[:count]
        self.scale = None if self.scale is None else self.scale[:count]

    def to_int8(self) -> None:
        """Round a weight that serves all heads to int8; the base's output layer stays as it is."""
        assert self.weight is not None
        if self.scale is None and self.weight.dim() == 2 and self.hidden_size % WIDTH == 0:
            weight, scale = quantized(self.weight.detach())
            del self.weight
            self.register_buffer("weight", weight, persistent=False)
            self.scale = scale

    def to_int4(self, kind: type[Int4Linear] = Int4Linear) -> None:
        """The same in int4: for drafts only."""
        assert self.weight is not None
        if self.scale is None and self.weight.dim() == 2:
            self.small = kind.rounded(self.weight.detach())
            del self.weight
            self.register_buffer("weight", None, persistent=False)

    def forward(self, x: Tensor, head: int | None = None) -> Tensor:
        """[R, H] → [R, V'] (`head` picks the weight where each head has its own), or [R, K, H] → [R, K, V']."""
        weight, bias = self.weight, self.bias
        if self.small is not None:
            out = self.small(x)
            return out if bias is None else out + bias
        if weight is None:
            raise RuntimeError("tied heads must be attached to a base model first")
        if self.scale is not None:
            out = int8_product(x, weight, self.scale)
            return out if bias is None else out + bias
        x = x.to(weight.dtype)
        if weight.dim() == 2:
            return F.linear(x, weight, bias)
        if head is not None:
            return F.linear(x, weight[head], None if bias is None else bias[head])
        out = torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
        return out if bias is None else out + bias

"""Draft heads: from the base model's last hidden state to logits of the tokens after the pending one.

Three modules, two ways of use. Parallel (MedusaHeads): `logits(hidden)` gives all depths at once. Step by step
(SequentialHeads, HydraHeads): `start(hidden, pending) → state`, `logits(state)`, `advance(state, drafted) → state`.
`features` and `project` are the two halves of `logits`, so that training can run the output layer in chunks.

The input is what the base's output layer gets (after the final norm). All shapes are static and nothing looks at
values, so that every call can be captured in a CUDA graph. Nothing here knows the engine.

Letters: B rows, R rows of any count (B × nodes of a depth), K heads, L layers, D depths, H hidden size,
E embedding size, M hidden inputs, V vocabulary, V' draft vocabulary (V without a token map), W width, I inner size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import LoadError
from .output_layer import OutputLayer

Family = Literal["medusa", "sequential", "hydra"]
Norm = Callable[[Tensor], Tensor]  # x (…, H) / rms(x)


@dataclass(frozen=True, kw_only=True)
class HeadsInfo:
    """What a file of heads holds, in plain data; all numbers come from its tensors, not from its config.

    layout      A … H and "hydra" as in layouts.py, or "native"
    num_heads   medusa, hydra: K; sequential: the deepest depth it was trained for
    num_layers, bias  residual blocks per head (sequential: per cell), and whether they have a bias
    vocab_size  rows of the heads' own output layer, the base vocabulary when tied (0: not known from the file)
    token_map   size of the draft vocabulary, 0 without one
    hidden_inputs  hidden states the heads read, as indexes of transformers' `hidden_states` (-1: after the final norm)
    ranks       per depth, P(rank r is right | path right so far), from calibration
    tau, noise_tau  per depth: softmax(log q / tau), and softmax((log q / T + G) / noise_tau) under noise, are P(token)
    """

    family: Family
    num_heads: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    tied: bool
    bias: bool
    token_map: int = 0
    path: str = ""
    layout: str = "native"
    num_parameters: int = 0
    hidden_inputs: tuple[int, ...] = (-1,)
    ranks: list[list[float]] | None = None
    tau: list[float] | None = None
    noise_tau: list[float] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class MedusaHeads(nn.Module):
    """K parallel heads of L residual blocks x + SiLU(W x + b) (Medusa, Cai et al. 2024); head h: token t + 2 + h.

    The blocks of a layer are stacked, so that one batched product serves all heads. L may be 0; layers are distinct.
    Blocks start at zero: a fresh tied head repeats the base's own distribution.
    """

    family: Family = "medusa"
    token_map = property(lambda self: self.output.token_map, doc="[V'] base ids of the draft vocabulary, or None")

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_layers: int = 1,
        *,
        bias: bool = True,
        vocab_size: int | None = None,
        shared_output: bool = False,
        output_bias: bool = False,
        token_map: Tensor | None = None,
    ) -> None:
        """vocab_size: rows V' of the heads' own output layer, None when tied. shared_output: one for all heads."""
        super().__init__()
        self.hidden_size, self.max_depth = hidden_size, num_heads
        self.weight = nn.Parameter(torch.zeros(num_layers, num_heads, hidden_size, hidden_size))  # [L, K, H out, H in]
        self.bias = nn.Parameter(torch.zeros(num_layers, num_heads, hidden_size)) if bias and num_layers else None
        rows = None if shared_output else num_heads
        self.output = OutputLayer(
            hidden_size, vocab_size=vocab_size, num_heads=rows, bias=output_bias, token_map=token_map
        )

    def attach(self, base_output: nn.Module | Tensor, base_embedding: Any = None) -> None:
        """Borrow the base's output layer (when tied). The embedding is for the sequential families only."""
        self.output.attach(base_output)

    def features(self, hidden: Tensor) -> Tensor:
        """hidden [B, H] → [B, K, H], the inputs of the output layer."""
        x = hidden.to(self.weight.dtype).expand(self.max_depth, *hidden.shape)  # [K, B, H]
        for layer in range(self.weight.shape[0]):
            weight = self.weight[layer].transpose(1, 2)
            if self.bias is None:
                x = x + F.silu(torch.bmm(x, weight))
            else:
                x = x + F.silu(torch.baddbmm(self.bias[layer].unsqueeze(1), x, weight))
        return x.transpose(0, 1)

    def project(self, features: Tensor, head: int | None = None) -> Tensor:
        """[B, K, H] → [B, K, V']; with `head`, the features [B, H] of that one head → [B, V']."""
        return self.output(features, head)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [B, H] → [B, K, V']."""
        return self.project(self.features(hidden))


class GatedBlock(nn.Module):
    """x → W_out(SiLU(a) ⊙ b) with [a, b] = W_in RMSNorm(x) + constant: the gated linear unit of Llama's MLP."""

    def __init__(self, width_in: int, inner: int, width_out: int) -> None:
        super().__init__()
        self.rms_norm: Norm = rms_norm
        self.norm = nn.Parameter(torch.ones(width_in))
        self.w_in = nn.Linear(width_in, 2 * inner, bias=False)
        self.w_out = nn.Linear(inner, width_out, bias=False)
        nn.init.normal_(self.w_in.weight, std=width_in**-0.5)
        nn.init.normal_(self.w_out.weight, std=0.3 * inner**-0.5)  # small: the residual stream dominates at first

    def forward(self, parts: list[Tensor], constant: Tensor) -> Tensor:
        """parts: tensors [R, w] with Σ w = width_in, normalised one by one, or the larger would drown the other;
        constant [R, 2 I] → [R, width_out]."""
        x = torch.cat([self.rms_norm(part) for part in parts], dim=-1) * self.norm
        a, b = (self.w_in(x) + constant).chunk(2, dim=-1)
        return self.w_out(F.silu(a) * b)


def rms_norm(x: Tensor) -> Tensor:
    """x / rms(x) over the last dimension; torch computes it in fp32 for half types."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def check_embedding(embedding: Any, size: int) -> Any:
    """The embedding itself (a module, or a weight [V, E]); LoadError unless E is `size`."""
    rows = embedding if isinstance(embedding, Tensor) else getattr(embedding, "weight", None)
    if isinstance(rows, Tensor) and rows.shape[-1] != size:
        raise LoadError(f"The heads expect embeddings of size {size}, the base model has {rows.shape[-1]}.")
    return embedding


def embed(embedding: Any, token: Tensor, dtype: torch.dtype) -> Tensor:
    """token [R] → [R, E] by the base's embedding: the module itself (some scale their rows) or a weight [V, E]."""
    if embedding is None:
        raise RuntimeError("sequential heads must be attached to a base model's embedding first")
    rows = F.embedding(token, embedding) if isinstance(embedding, Tensor) else embedding(token)
    return rows.to(dtype)


class SequentialHeads(nn.Module):
    """One shared recurrent cell that sees the tokens drafted so far (ReDrafter's idea, Zhang et al. 2024).

        s_0 = P mix(hidden)                              start: the base's last hidden state, or M states mixed
        s_d = s_{d-1} + cell([s_{d-1}, E(token_d)])      token_1 is the pending token, then the drafted ones
        logits_d = out(RMSNorm(s_d + readout(s_d)))      of token_{d+1}

    The hidden state also enters every block as a constant. Its products with the blocks' weights do not depend on the
    depth, so `start` computes them once and the state carries them: [s | one constant per cell block | readout's].
    s begins as the normalised last hidden state (P and mix as identities): a fresh head is close to the base's
    distribution. 5.9 M parameters for H = 576 by default.
    """

    family: Family = "sequential"
    token_map = property(lambda self: self.output.token_map, doc="[V'] base ids of the draft vocabulary, or None")
    state_sizes = property(lambda self: (sum(self._splits),) * self.max_depth, doc="Width of the state at each depth")

    def __init__(
        self,
        hidden_size: int,
        *,
        width: int | None = None,
        inner: int = 1024,
        readout: int = 512,
        layers: int = 1,
        hidden_inputs: int = 1,
        embed_size: int | None = None,
        max_depth: int = 5,
        vocab_size: int | None = None,
        token_map: Tensor | None = None,
    ) -> None:
        """vocab_size: rows V' of the heads' own output layer, None when tied. embed_size: E where it is not H."""
        super().__init__()
        width, embed_size = width or hidden_size, embed_size or hidden_size
        self.hidden_size, self.width, self.embed_size = hidden_size, width, embed_size
        self.hidden_inputs, self.max_depth = hidden_inputs, max_depth
        self.hidden_indexes: tuple[int, ...] = (-1,)  # HeadsInfo's hidden_inputs, for the runner; the loader sets it
        self._splits = [width, *[2 * inner] * layers, 2 * readout]
        self.mix = nn.Linear(hidden_inputs * hidden_size, hidden_size) if hidden_inputs > 1 else None
        self.start_proj = nn.Linear(hidden_size, sum(self._splits))
        self.cell = nn.ModuleList(GatedBlock(w, inner, width) for w in (width + embed_size, *[width] * (layers - 1)))
        self.rms_norm: Norm = rms_norm
        self.readout = GatedBlock(width, readout, width)
        self.to_hidden = None if width == hidden_size else nn.Linear(width, hidden_size, bias=False)
        self.norm = nn.Parameter(torch.ones(hidden_size))
        self.output = OutputLayer(hidden_size, vocab_size=vocab_size, token_map=token_map)
        self._embedding: tuple[Any, ...] = (None,)  # a tuple hides it from torch: never saved or moved with the heads
        for linear, rows, std in ((self.start_proj, width, 0.5), (self.mix, hidden_size, 0.1)):
            if linear is not None:
                nn.init.normal_(linear.weight, std=std * hidden_size**-0.5)
                nn.init.zeros_(linear.bias)
                nn.init.eye_(linear.weight[:rows, :hidden_size])

    def attach(self, base_output: nn.Module | Tensor, base_embedding: Any) -> None:
        """Borrow the base's output layer (when tied) and its input embedding (a module, or a weight [V, E])."""
        self.output.attach(base_output)
        self._embedding = (check_embedding(base_embedding, self.embed_size),)

    def use_norm(self, norm: Norm) -> None:
        """Compute the norms with a machine's kernel from now on."""
        for module in (self, *self.cell, self.readout):
            module.rms_norm = norm

    def match_scale(self, hidden: Tensor) -> None:
        """Before training: norm gain = rms of the base's hidden states [R, H], for logits as sharp as the base's."""
        nn.init.constant_(self.norm, float(hidden.float().square().mean().sqrt()))

    def start(self, hidden: Tensor, token: Tensor) -> Tensor:
        """hidden [B, M·H] (M hidden inputs side by side, the model's last one first), pending token [B] → state."""
        return self.advance(self._begin(hidden), token)

    def _begin(self, hidden: Tensor) -> Tensor:
        parts = self.rms_norm(hidden.to(self.norm.dtype).unflatten(-1, (-1, self.hidden_size))).flatten(-2)
        return self.start_proj(parts if self.mix is None else self.mix(parts))

    def advance(self, state: Tensor, token: Tensor) -> Tensor:
        """state [R, S], the token drafted from it [R] → state one depth further [R, S]."""
        s, *constants, last = state.split(self._splits, dim=-1)
        return torch.cat([self._next(s, constants, token), *constants, last], dim=-1)

    def _next(self, s: Tensor, constants: list[Tensor], token: Tensor) -> Tensor:
        extra = [embed(self._embedding[0], token, s.dtype)]
        for block, constant in zip(self.cell, constants, strict=True):
            s, extra = s + block([s, *extra], constant), []
        return s

    def features(self, state: Tensor) -> Tensor:
        """state [R, S] → [R, H], the inputs of the output layer."""
        s, *_, constant = state.split(self._splits, dim=-1)
        return self._read(s, constant)

    def _read(self, s: Tensor, constant: Tensor) -> Tensor:
        x = s + self.readout([s], constant)
        return self.rms_norm(x if self.to_hidden is None else self.to_hidden(x)) * self.norm

    def project(self, features: Tensor) -> Tensor:
        """[R, H] → [R, V']."""
        return self.output(features)

    def logits(self, state: Tensor) -> Tensor:
        """state [R, S] → [R, V'], the token after the last one the state has seen."""
        return self.project(self.features(state))

    def unroll(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Training: hidden [B, M·H], tokens [B, D] (the pending token, then the true ones) → features [B, D, H]."""
        s, *constants, last = self._begin(hidden).split(self._splits, dim=-1)
        states = []
        for token in tokens.unbind(1):
            states.append(s := self._next(s, constants, token))
        return self._read(torch.stack(states, dim=1), last[:, None])


class HydraHeads(nn.Module):
    """Hydra's MLP heads (Ankner et al. 2024): head h sees the hidden state and h + 1 tokens, pending first.

    First block: C x + SiLU(W x + b) from (h + 2)·H to H (C: "res_connection"); then L - 1 residual blocks; own output
    layer with bias. The state is the head's input itself and grows by H a depth; its width says which head reads it.
    """

    family: Family = "hydra"
    token_map = property(lambda self: self.output.token_map, doc="[V'] base ids of the draft vocabulary, or None")

    def __init__(self, hidden_size: int, num_heads: int, num_layers: int, *, vocab_size: int) -> None:
        super().__init__()
        self.hidden_size, self.max_depth = hidden_size, num_heads
        # W and C in one product: rows [W; C]
        self.first = nn.ModuleList(nn.Linear((h + 2) * hidden_size, 2 * hidden_size) for h in range(num_heads))
        self.weight = nn.Parameter(torch.zeros(num_layers - 1, num_heads, hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_layers - 1, num_heads, hidden_size))
        self.output = OutputLayer(hidden_size, vocab_size=vocab_size, num_heads=num_heads, bias=True)
        self._embedding: tuple[Any, ...] = (None,)

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Width of the state at each depth."""
        return tuple((h + 2) * self.hidden_size for h in range(self.max_depth))

    def attach(self, base_output: nn.Module | Tensor, base_embedding: Any) -> None:
        """Borrow the base's input embedding (the output layer is the heads' own)."""
        self.output.attach(base_output)
        self._embedding = (check_embedding(base_embedding, self.hidden_size),)

    def start(self, hidden: Tensor, token: Tensor) -> Tensor:
        """hidden [B, H], pending token [B] → state [B, 2 H]."""
        return self.advance(hidden.to(self.weight.dtype), token)

    def advance(self, state: Tensor, token: Tensor) -> Tensor:
        """state [R, n·H], the token drafted from it [R] → [R, (n + 1)·H]."""
        return torch.cat([state, embed(self._embedding[0], token, state.dtype)], dim=-1)

    def head_of(self, state: Tensor) -> int:
        """Which head reads a state of this width: 0 for the state of `start`."""
        return self.state_sizes.index(state.shape[-1])

    def features(self, state: Tensor) -> Tensor:
        """state [R, (h + 2)·H] → [R, H]."""
        head = self.head_of(state)
        x, kept = self.first[head](state).chunk(2, dim=-1)
        x = kept + F.silu(x)
        for layer in range(self.weight.shape[0]):
            x = x + F.silu(F.linear(x, self.weight[layer, head], self.bias[layer, head]))
        return x

    def logits(self, state: Tensor) -> Tensor:
        """state [R, (h + 2)·H] → [R, V'], the token after the last one the state has seen."""
        return self.output(self.features(state), self.head_of(state))


Heads = MedusaHeads | SequentialHeads | HydraHeads


def num_parameters(heads: nn.Module) -> int:
    """How many numbers the heads store, without the borrowed output layer and embedding."""
    return sum(parameter.numel() for parameter in heads.parameters())

"""NF4 weights on a GPU through bitsandbytes (extra `quant`): four bits a weight in the decoder layers (Dettmers et al.
2023). The embedding, the output layer and the heads stay in half precision.

From 0.50 on bitsandbytes multiplies several rows by four-bit weights in one kernel, on a T4 too; before, it made
half-precision weights of them first, which is slower than not quantising at all.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch
from torch import nn

from ...errors import LoadError
from ..forward.hidden_tap import decoder_layers

LEAST = (0, 50)
BLOCK = 64  # weights of one scale


def require_nf4(device: torch.device) -> None:
    """Raises LoadError where NF4 weights cannot be had: no GPU, no bitsandbytes, an old one."""
    if device.type != "cuda":
        raise LoadError("nf4 weights are for a GPU; on a CPU quantize is auto, none, int8 or int4.")
    for package, least, text in (("bitsandbytes", LEAST, "0.50"), ("accelerate", (1, 1), "1.1")):
        try:
            have = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise LoadError(f"nf4 weights need {package}: pip install 'bitsandbytes>=0.50' accelerate.") from None
        numbers = tuple(int(part) for part in have.split(".")[:2] if part.isdigit())
        if numbers < least:
            raise LoadError(f"nf4 weights need {package} {text} or newer, and {have} is installed.")


def loading_options(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """For from_pretrained: each weight is quantised as it is read, and the whole is never in half precision."""
    from transformers import BitsAndBytesConfig

    chosen = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=False
    )
    return {"quantization_config": chosen, "device_map": {"": device}}


def quantize_nf4(model: Any) -> None:
    """The linear layers of a model on a GPU, in place, one by one."""
    import bitsandbytes as bnb

    for parent in decoder_layers(model).modules():
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear:
                continue
            size, dtype = (child.in_features, child.out_features), child.weight.dtype
            kind: dict[str, Any] = {"compress_statistics": False, "quant_type": "nf4"}
            with torch.device("meta"):
                made = bnb.nn.Linear4bit(*size, bias=child.bias is not None, compute_dtype=dtype, **kind)
            weight: Any = bnb.nn.Params4bit(child.weight.data, requires_grad=False, blocksize=BLOCK, **kind)
            made.weight = weight.to(child.weight.device)
            made.bias = child.bias
            setattr(parent, name, made)


def scales_of(parameter: Any) -> list[torch.Tensor]:
    """What bitsandbytes keeps beside a four-bit weight; nothing for another."""
    state = getattr(parameter, "quant_state", None)
    return [] if state is None else [state.absmax, state.code]

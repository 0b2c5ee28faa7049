"""NF4 weights on a GPU through bitsandbytes (extra `quant`): four bits a weight in the decoder layers (Dettmers et al.
2023). The embedding, the output layer and the heads stay in half precision.

Since 0.50 bitsandbytes multiplies several rows by four-bit weights in one kernel, on a T4 too. Older versions first
convert the weights to half precision, which is slower than not quantising at all.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch

from ...errors import LoadError

LEAST = (0, 50)


def require_nf4(device: torch.device) -> None:
    """Raise LoadError where NF4 weights cannot work: no GPU, no bitsandbytes, or an old one."""
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
    """Options for from_pretrained: weights are quantised as they are read; the half-precision model never exists."""
    from transformers import BitsAndBytesConfig

    chosen = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=False
    )
    return {"quantization_config": chosen, "device_map": {"": device}}


def scales_of(parameter: Any) -> list[torch.Tensor]:
    """The tensors that bitsandbytes keeps beside a four-bit weight; none for other weights."""
    state = getattr(parameter, "quant_state", None)
    return [] if state is None else [state.absmax, state.code]

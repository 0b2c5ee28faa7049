"""Where a model keeps what the engine looks for."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import LoadError


def decoder_layers(model: Any) -> torch.nn.ModuleList:
    """The list of the model's decoder layers, whatever it is called: the outermost one that is as long as the config
    says. Raises LoadError where there is none."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise LoadError("The heads read hidden states between layers, and no list of decoder layers is found in the model.")

"""Build compiled passes and drafts, as model/compiled.py asks on standard input: `python -m
medusa_serve.build_compiled`, in a process of its own, so that no compiler runs beside a request."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .config import EngineConfig


def main() -> None:
    from .model.build import hidden_inputs
    from .model.compiled import build_draft, build_pass
    from .model.drafting.choose import choose_drafter
    from .model.forward.tree_forward import PlugInError, TreeForward
    from .model.loading.load import load_model
    from .model.shapes import plan_shapes

    order = json.load(sys.stdin)
    config = EngineConfig(**order["config"])
    loaded = load_model(config, progress=False)
    drafter, *_ = choose_drafter(config, loaded)
    plan_shapes(config, drafter, loaded.device)  # sizes the drafter
    indexes = hidden_inputs(drafter)
    try:
        forward = TreeForward(loaded.model, 1, order["columns"], loaded.max_positions, indexes)
        for nodes, path in order["passes"].items():
            build_pass(forward, int(nodes), Path(path))
    except PlugInError as reason:
        sys.exit(str(reason))
    size = len(indexes) * loaded.model.config.get_text_config().hidden_size
    for nodes, path in order["drafts"].items():
        build_draft(drafter, int(nodes), size, loaded.dtype, Path(path))


if __name__ == "__main__":
    main()

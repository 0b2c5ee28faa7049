"""OpenMP's threads: when kernels may use them."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch
torch.set_num_threads(2)
from medusa_serve.model.cpu.threads import threads
print(threads().count())
"""


@pytest.mark.parametrize(("set_to", "threads"), [({}, 2), ({"OMP_DYNAMIC": "true"}, 1), ({"OMP_THREAD_LIMIT": "1"}, 1)])
def test_openmp_that_may_start_fewer_threads_is_not_used(set_to, threads):
    """Each thread computes its own part: fewer threads would leave some of it undone."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=kept | set_to, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == threads

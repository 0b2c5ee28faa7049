"""Teams of OpenMP's threads: what they may be relied on for."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch
torch.set_num_threads(2)
from medusa_serve.model.native_team import team
print(team().threads())
"""


@pytest.mark.parametrize(("set_to", "threads"), [({}, 2), ({"OMP_DYNAMIC": "true"}, 1), ({"OMP_THREAD_LIMIT": "1"}, 1)])
def test_a_team_that_may_be_smaller_than_asked_for_is_not_used(set_to, threads):
    """Each thread has a share of its own: a team of fewer would leave some undone."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=kept | set_to, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == threads

from pathlib import Path

import pytest

from tests.tiny import save_tiny_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_folder(tmp_path_factory.mktemp("cli") / "tiny-llama")

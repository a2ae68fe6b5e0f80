"""One Clarity engine for all tests that do not change it."""

from pathlib import Path

import pytest

from tests import tiny
from worker.upscaler.engines import Config, clarity
from worker.upscaler.engines.clarity import Clarity


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.save(folder)
    return folder


@pytest.fixture(scope="session")
def engine(models: Path) -> Clarity:
    return clarity.load(Config(models_dir=models, device="cpu"))

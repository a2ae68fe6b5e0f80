"""One Clarity engine for all tests that do not change it, and small networks."""

from collections.abc import Generator
from pathlib import Path

import pytest

from tests import tiny
from tests.networks import save_own
from worker.upscaler import checkpoints
from worker.upscaler.engines import Config, clarity
from worker.upscaler.engines.clarity import Clarity


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.save(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _small_networks(tmp_path_factory: pytest.TempPathFactory) -> Generator[None]:  # pyright: ignore[reportUnusedFunction]
    """Let small networks stand in for our own: no test but that of the files is about what these have learnt."""
    folder = tmp_path_factory.mktemp("networks")
    save_own(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "OWN_DIR", folder)
        yield


@pytest.fixture(scope="session")
def engine(models: Path) -> Clarity:
    return clarity.load(Config(models_dir=models, device="cpu"))

"""What must never be loaded, or installed."""

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "numpy", "PIL", "diffusers", "transformers"}


def _loaded_by(module: str) -> set[str]:
    code = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["api.app", "worker.dispatcher", "cli.main", "cli.stack"])
def test_nothing_but_a_worker_loads_the_heavy_parts(module: str) -> None:
    assert _loaded_by(module) & HEAVY == set()


def test_importing_the_worker_loads_no_model() -> None:
    assert "torch" not in _loaded_by("worker.app")


def test_torchvision_is_not_installed_because_its_cuda_build_breaks_transformers_on_this_torch() -> None:
    assert importlib.metadata.version("torch").partition("+")[0] == "2.13.0"
    assert importlib.util.find_spec("torchvision") is None


def test_only_what_is_installed_without_its_dependencies_asks_for_torchvision() -> None:
    asking = {
        distribution.name
        for distribution in importlib.metadata.distributions()
        for requirement in distribution.requires or []
        if requirement.startswith("torchvision") and "extra ==" not in requirement
    }
    assert asking == {"piq", "spandrel"}

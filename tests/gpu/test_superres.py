"""What of superres only a GPU can show: `.venv/bin/pytest tests/gpu` on a machine that has one."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

from core.options import UpscaleOptions
from tests.networks import architecture
from worker.upscaler import checkpoints, compact
from worker.upscaler.engines import Config, superres
from worker.upscaler.picture import Levels, Picture
from worker.upscaler.plan import Size
from worker.upscaler.strips import Rows
from worker.upscaler.superres import Network

CUDA = torch.device("cuda")
CPU = torch.device("cpu")


def _picture(width: int, height: int) -> Levels:
    """Make waves with some noise: smooth enough to show bands, busy enough to show seams."""
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    waves = [128 + 90 * np.sin(rows / (9 + 5 * channel) + columns / 17) for channel in range(3)]
    noise = np.random.default_rng(0).normal(0, 6, (height, width, 3))
    return np.clip(np.stack(waves, axis=-1) + noise, 0, 255).astype(np.uint8)


def _enlarged(network: Network, rgb: Levels, *, small: bool = False) -> Levels:
    rows = Rows([rgb], Size(width=rgb.shape[1], height=rgb.shape[0]))
    return np.concatenate(list(network.enlarge(rows, lambda: None, lambda _: None, small=small)))


def _apart(one: Levels, other: Levels) -> npt.NDArray[np.int_]:
    assert one.shape == other.shape
    return np.abs(one.astype(np.int_) - other)


@pytest.mark.parametrize("variant", ["fidelity", "restore"])
def test_half_precision_on_the_gpu_gives_what_single_gives_on_the_cpu(variant: checkpoints.Variant) -> None:
    rgb = _picture(203, 117)
    exact = checkpoints.load_own(variant, CPU, "fp32")
    for network, reference in zip(checkpoints.load_own(variant, CUDA), exact, strict=True):
        assert isinstance(network, compact.Compact)
        assert network.dtype is torch.float16
        apart = _apart(_enlarged(network, rgb), _enlarged(reference, rgb))
        assert apart.max() <= 2
        assert apart.mean() < 0.2


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # of spandrel's copies of the authors' code
@pytest.mark.parametrize("name", ["SPAN", "SwinIR"])
def test_tiles_of_other_networks_give_on_the_gpu_what_they_give_on_the_cpu(tmp_path: Path, name: str) -> None:
    save_file(architecture(name), tmp_path / "network.safetensors")
    rgb = _picture(300, 70)
    on_gpu, on_cpu = (
        _enlarged(checkpoints.load(tmp_path / "network.safetensors", device, "fp32"), rgb) for device in (CUDA, CPU)
    )
    assert _apart(on_gpu, on_cpu).max() <= 2


def test_strips_give_on_the_gpu_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    rgb = _picture(640, 480)
    network, _ = checkpoints.load_own("fidelity", CUDA)
    whole = _enlarged(network, rgb)
    monkeypatch.setattr(compact, "GPU_STRIP_PIXELS", 640 * 32)
    # What cuDNN chooses for another shape may add up in another order.
    assert _apart(_enlarged(network, rgb), whole).max() <= 1
    assert _apart(_enlarged(network, rgb, small=True), whole).max() <= 1


def test_memory_of_the_gpu_does_not_grow_with_the_height_and_keeps_to_what_was_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compact, "GPU_STRIP_PIXELS", 1 << 16)
    engine = superres.load(Config(device="cuda"))
    options = UpscaleOptions(scale_factor=2)
    peaks: list[int] = []
    for height in (512, 512, 2048):  # the first one warms up
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in engine.upscale(Picture(_picture(512, height)), options, lambda _: None, lambda: False):
            pass
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[2] < 1.1 * peaks[1]
    assert peaks[2] < engine.peak_bytes(Size(width=512, height=2048), options, alpha=False)

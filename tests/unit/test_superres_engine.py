"""The superres engine: alpha apart, bounded memory, the operator's choice of a network."""

import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

from core.errors import DeploymentError, Stopped
from core.options import UpscaleOptions
from tests.networks import architecture, rrdb, save_own
from tests.superres import furthest, go_on, noise
from worker.upscaler import checkpoints
from worker.upscaler import compact as compact_module
from worker.upscaler.canvas import to_levels, to_tensor
from worker.upscaler.colour import sharpen
from worker.upscaler.engines import Config
from worker.upscaler.engines.superres import Superres, load
from worker.upscaler.picture import Picture, join
from worker.upscaler.plan import Size, output_size
from worker.upscaler.resampling import resample_alpha

CPU = torch.device("cpu")


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Superres:
    save_own(tmp_path)
    monkeypatch.setattr(checkpoints, "OWN_DIR", tmp_path)
    return load(Config(device="cpu", superres_variant="restore"))


def _upscaled(engine: Superres, picture: Picture, **options: Any) -> Picture:
    return join(engine.upscale(picture, UpscaleOptions(**options), lambda _: None, lambda: False))


@pytest.mark.parametrize("factor", [1, 2.5, 8])
def test_alpha_is_enlarged_apart_and_lies_beside_its_colours(
    engine: Superres, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact_module, "STRIP_PIXELS", 1)
    rgb, alpha = noise(30, 70), noise(30, 70)[:, :, 0].copy()
    pieces = list(
        engine.upscale(Picture(rgb, alpha), UpscaleOptions(scale_factor=factor), lambda _: None, lambda: False)
    )
    upscaled, size = join(pieces), output_size(30, 70, factor)
    assert upscaled.alpha is not None
    assert np.array_equal(upscaled.alpha, resample_alpha(alpha, size, go_on))
    assert np.array_equal(upscaled.rgb, _upscaled(engine, Picture(rgb), scale_factor=factor).rgb)


def test_progress_never_falls_and_ends_with_1(engine: Superres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact_module, "STRIP_PIXELS", 1)
    seen: list[float] = []
    list(engine.upscale(Picture(noise(30, 70)), UpscaleOptions(scale_factor=6), seen.append, lambda: False))
    assert seen == sorted(seen)
    assert len(set(seen)) > 10
    assert (seen[0] < 0.1, seen[-1]) == (True, 1.0)


def test_small_tiles_make_more_strips(engine: Superres) -> None:
    picture = Picture(noise(1024, 129))
    options = (UpscaleOptions(small_tiles=small) for small in (False, True))
    few, many = (len(list(engine.upscale(picture, one, lambda _: None, lambda: False))) for one in options)
    assert few < many


def test_a_job_that_is_to_stop_stops(engine: Superres) -> None:
    with pytest.raises(Stopped):
        list(engine.upscale(Picture(noise(3, 7)), UpscaleOptions(), lambda _: None, lambda: True))


def test_sharpening_in_strips_is_that_of_the_whole(engine: Superres) -> None:
    picture = Picture(noise(30, 70))
    whole = to_levels(sharpen(to_tensor(_upscaled(engine, picture).rgb, CPU), 3))
    assert np.array_equal(_upscaled(engine, picture, sharpen=3).rgb, whole)


def test_the_variant_is_the_operator_s_choice(engine: Superres) -> None:
    rgb = noise(9, 7)
    fidelity = load(Config(device="cpu", superres_variant="fidelity"))
    assert np.array_equal(_upscaled(fidelity, Picture(rgb)).rgb, rgb.repeat(2, 0).repeat(2, 1))
    assert furthest(_upscaled(engine, Picture(rgb)).rgb, _upscaled(fidelity, Picture(rgb)).rgb) > 10


def test_another_network_takes_the_place_of_both(tmp_path: Path) -> None:
    save_file(rrdb(2, unshuffle=2), tmp_path / "other.safetensors")
    other = load(Config(device="cpu", superres_weights=str(tmp_path / "other.safetensors")))
    assert _upscaled(other, Picture(noise(9, 7)), scale_factor=2.5).rgb.shape == (18, 23, 3)


def test_a_network_that_is_not_there_is_refused_by_the_name_of_its_setting() -> None:
    with pytest.raises(DeploymentError, match=r"^UPSCALED_SUPERRES_WEIGHTS .*: gone\.pth does not exist"):
        load(Config(device="cpu", superres_weights="gone.pth"))


_MEASURED = """
import resource, sys
from pathlib import Path
import numpy as np
from core.options import UpscaleOptions
from worker.upscaler import checkpoints
from worker.upscaler.engines import Config, superres
from worker.upscaler.picture import Picture

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

def run(height, width):
    rgb = np.zeros((height, width, 3), np.uint8)
    return sum(len(strip.rgb) for strip in engine.upscale(Picture(rgb), options, lambda _: None, lambda: False))

checkpoints.OWN_DIR = Path(sys.argv[1])
engine, options = superres.load(Config(device="cpu")), UpscaleOptions(scale_factor=4)
run(300, 600)
before = peak()
assert run(2000, 600) == 8000
print(peak() - before)
"""


def test_memory_is_that_of_a_strip(tmp_path: Path) -> None:
    save_own(tmp_path)
    done = subprocess.run([sys.executable, "-c", _MEASURED, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 24 << 20  # where the output has 58 MB


def test_what_is_needed_counts_the_picture_and_each_run(engine: Superres) -> None:
    size, options = Size(width=4096, height=4096), UpscaleOptions(scale_factor=4)
    needed = engine.peak_bytes(size, options, alpha=False)
    assert 3 * 4096**2 < needed < 512 << 20
    assert engine.peak_bytes(size, options, alpha=True) > needed + 4096**2


def test_alpha_of_a_picture_that_keeps_its_size_is_not_gathered_beside_its_colours(engine: Superres) -> None:
    rgb, alpha = noise(500, 2000), noise(500, 2000)[:, :, 0].copy()
    tracemalloc.start()
    try:
        (strip,) = engine.upscale(Picture(rgb, alpha), UpscaleOptions(scale_factor=1), lambda _: None, lambda: False)
        assert tracemalloc.get_traced_memory()[1] < alpha.size / 4
    finally:
        tracemalloc.stop()
    assert np.array_equal(np.asarray(strip.alpha), alpha)


def test_what_is_needed_where_the_size_stays_is_what_the_picture_itself_has(engine: Superres) -> None:
    size, options = Size(width=20_000, height=4000), UpscaleOptions(scale_factor=1)
    measured = 305 << 20
    assert measured < engine.peak_bytes(size, options, alpha=True) < 1.3 * measured


@pytest.mark.parametrize("sharpened", [0, 4])
@pytest.mark.parametrize("other", [None, "SPAN"])
def test_a_grey_picture_comes_out_grey(engine: Superres, tmp_path: Path, other: str | None, sharpened: float) -> None:
    if other:
        save_file(architecture(other), tmp_path / "other.safetensors")
        engine = load(Config(device="cpu", superres_weights=str(tmp_path / "other.safetensors")))
    rgb = noise(40, 50)[:, :, :1].repeat(3, axis=2)
    upscaled = _upscaled(engine, Picture(rgb), scale_factor=3, sharpen=sharpened).rgb
    assert (upscaled == upscaled[:, :, :1]).all()
    assert len(np.unique(upscaled)) > 10
    rgb[0, 0, 0] ^= 1
    upscaled = _upscaled(engine, Picture(rgb), scale_factor=3, sharpen=sharpened).rgb
    assert (upscaled != upscaled[:, :, :1]).any()

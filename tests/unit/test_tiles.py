"""Networks of any architecture in tiles: no seams, and the size rules of each."""

from collections.abc import Callable
from math import ceil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor
from torch.nn import functional

from core.errors import Stopped
from tests.networks import Weights, architecture
from tests.superres import furthest, gradient, noise, ran
from worker.upscaler import checkpoints, tiles
from worker.upscaler.canvas import to_levels, to_tensor
from worker.upscaler.picture import Levels
from worker.upscaler.tiles import SizeRequirements, Tiled

CPU = torch.device("cpu")


def _load(weights: Weights, folder: Path) -> Tiled:
    save_file(weights, folder / "network.safetensors")
    network = checkpoints.load(folder / "network.safetensors", CPU, "fp32")
    assert isinstance(network, Tiled)
    return network


class _Requirements:
    def __init__(self) -> None:
        self.minimum, self.multiple_of, self.square = 0, 1, False


class _Soft:
    """A network that looks 12 pixels far, as a blur, then enlarges by 2."""

    dtype = torch.float32

    def __init__(self) -> None:
        self.device = CPU
        self.scale = 2
        self.size_requirements: SizeRequirements = _Requirements()
        self.given: list[tuple[int, int]] = []

    def __call__(self, image: Tensor) -> Tensor:
        self.given.append((image.shape[3], image.shape[2]))
        blurred = functional.avg_pool2d(image, 25, stride=1, padding=12, count_include_pad=False)
        return functional.interpolate(image / 2 + blurred / 2, scale_factor=2.0, mode="nearest")


def _whole(model: Callable[[Tensor], Tensor], rgb: Levels) -> Levels:
    with torch.inference_mode():
        return to_levels(model(to_tensor(rgb, CPU)))


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_PIXELS", 96)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize(("width", "height"), [(96, 96), (97, 64), (144, 145), (70, 200), (333, 70)])
@pytest.mark.parametrize("draw", [noise, gradient])
def test_tiles_of_a_network_that_looks_no_further_than_their_rim_are_what_it_gives_as_a_whole(
    draw: Callable[[int, int], Levels], width: int, height: int
) -> None:
    model, rgb = _Soft(), draw(width, height)
    output = ran(Tiled(model), rgb)
    assert len(model.given) == max(1, ceil((width - 48) / 48)) * max(1, ceil((height - 48) / 48))
    whole = _whole(model, rgb)
    assert furthest(output, whole) <= 1
    assert (output != whole).mean() < 1e-3


@pytest.mark.usefixtures("_small_tiles")
def test_tiles_of_a_network_that_looks_further_fade_into_each_other(tmp_path: Path) -> None:
    weights, rgb = {k: v * 0.7 for k, v in architecture("SPAN").items()}, gradient(150, 150)
    network = _load(weights, tmp_path)
    whole = _whole(checkpoints.import_spandrel().ModelLoader(CPU).load_from_state_dict(weights), rgb)
    assert whole.std() > 1
    assert furthest(ran(network, rgb), whole) <= 1


@pytest.mark.parametrize(
    ("size", "minimum", "multiple_of", "square", "given"),
    [
        ((10, 20), 0, 1, False, (64, 64)),
        ((100, 20), 0, 1, False, (100, 64)),
        ((100, 20), 0, 16, False, (112, 64)),
        ((100, 20), 0, 16, True, (112, 112)),
        ((100, 20), 128, 1, False, (128, 128)),
        ((1, 1), 0, 7, False, (70, 70)),
    ],
)
def test_a_tile_is_cut_to_the_picture_as_far_as_the_network_allows(
    size: tuple[int, int], minimum: int, multiple_of: int, square: bool, given: tuple[int, int]
) -> None:
    model = _Soft()
    needs = model.size_requirements
    needs.minimum, needs.multiple_of, needs.square = minimum, multiple_of, square
    assert ran(Tiled(model), noise(*size)).shape == (2 * size[1], 2 * size[0], 3)
    assert model.given == [given]


def test_a_picture_smaller_than_a_tile_is_enlarged_as_if_mirrored_at_its_right_and_lower_edge() -> None:
    rgb, model = noise(40, 50), _Soft()
    mirrored = np.pad(rgb, [(0, 14), (0, 24), (0, 0)], "reflect")
    assert np.array_equal(ran(Tiled(model), rgb), _whole(model, mirrored)[:100, :80])


def test_small_tiles_have_half_the_side() -> None:
    model = _Soft()
    ran(Tiled(model), noise(300, 130), small=True)
    assert set(model.given) == {(128, 128)}


@pytest.mark.usefixtures("_small_tiles")
def test_check_is_called_before_each_tile_and_may_stop_the_work() -> None:
    model, calls = _Soft(), 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Stopped("Enough.")

    with pytest.raises(Stopped):
        ran(Tiled(model), noise(150, 150), check)
    assert len(model.given) == 4


def test_of_a_network_on_a_gpu_the_strips_alone_are_the_computer_s() -> None:
    model = _Soft()
    whole = Tiled(model).peak_bytes(4000)
    model.device = torch.device("cuda")
    assert Tiled(model).peak_bytes(4000) == 4000 * tiles.TILE_PIXELS * 2**2 * 3
    assert whole > 10 * Tiled(model).peak_bytes(4000)

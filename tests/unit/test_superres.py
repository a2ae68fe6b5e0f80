"""Super-resolution: real checkpoints through the real loader, exact sizes, no seams, no trace of torchvision."""

import importlib
import importlib.util
import pickle
import sys
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor
from torch.nn import functional
from transformers.utils.import_utils import is_torchvision_available

from core.errors import DeploymentError, OutOfMemory, Stopped
from worker.upscaler import superres
from worker.upscaler.picture import Levels, Picture
from worker.upscaler.plan import Size, Tiling, output_size, tiling
from worker.upscaler.resampling import resample
from worker.upscaler.superres import Network, enlarge

CPU = torch.device("cpu")

Weights = dict[str, Tensor]

Mask = npt.NDArray[np.bool_]

Array = TypeVar("Array", Levels, Mask)

REACH = 3
"""How far a pixel of `_compact` looks: its three convolutions by one pixel each."""


def _go_on() -> None:
    pass


def _compact(scale: int, channels: int = 3, *, random: bool = False) -> Weights:
    """Weights of a small SRVGGNetCompact; when they are all 0 it repeats pixels."""
    draw = torch.Generator().manual_seed(scale)

    def weigh(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw) * 0.1 if random else torch.zeros(shape)

    convolutions = [(6, channels), (6, 6), (channels * scale**2, 6)]
    weights: Weights = {}
    for index, (into, of) in enumerate(convolutions):
        weights[f"body.{2 * index}.weight"] = weigh(into, of, 3, 3)
        weights[f"body.{2 * index}.bias"] = weigh(into)
        weights[f"body.{2 * index + 1}.weight"] = torch.full((into,), 0.25)
    del weights["body.5.weight"]
    return weights


def _computed(rgb: Levels, weights: Weights) -> Levels:
    """What SRVGGNetCompact makes of a picture as a whole, by its formula."""
    image = torch.tensor(rgb).permute(2, 0, 1)[None].float() / 255
    scale = round((weights["body.4.bias"].numel() / 3) ** 0.5)
    features = image
    for index in (0, 2, 4):
        features = functional.conv2d(
            features, weights[f"body.{index}.weight"], weights[f"body.{index}.bias"], padding=1
        )
        if index < 4:
            features = functional.prelu(features, weights[f"body.{index + 1}.weight"])
    repeated = functional.interpolate(image, scale_factor=scale, mode="nearest")
    enlarged = (functional.pixel_shuffle(features, scale) + repeated).clamp(0, 1)[0]
    return (enlarged * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def _rrdb(scale: int, *, unshuffle: int = 1) -> Weights:
    """Weights of a small Real-ESRGAN network: one residual block, four features."""
    draw = torch.Generator().manual_seed(scale)
    shapes = {"conv_first": (4, 3 * unshuffle**2), "conv_body": (4, 4), "conv_hr": (4, 4), "conv_last": (3, 4)}
    for index in range(1, round(np.log2(scale * unshuffle)) + 1):
        shapes[f"conv_up{index}"] = (4, 4)
    for dense in (1, 2, 3):
        for index in range(5):
            shapes[f"body.0.rdb{dense}.conv{index + 1}"] = (4 if index == 4 else 32, 4 + 32 * index)
    weights: Weights = {}
    for name, (into, of) in shapes.items():
        weights[f"{name}.weight"] = torch.randn((into, of, 3, 3), generator=draw) * 0.2
        weights[f"{name}.bias"] = torch.randn((into,), generator=draw) * 0.1
    return weights


@pytest.fixture
def load(tmp_path: Path) -> Callable[[Weights], Network]:
    """Save weights as a checkpoint, and load it."""

    def load(weights: Weights) -> Network:
        save_file(weights, tmp_path / "network.safetensors")
        return superres.load(tmp_path / "network.safetensors", CPU)

    return load


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superres, "TILE_PIXELS", 32)
    monkeypatch.setattr(superres, "OVERLAP_PIXELS", 8)


def _noise(width: int, height: int) -> Levels:
    return np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _repeated(picture: Array, scale: int) -> Array:
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)


def _furthest(left: Levels, right: Levels) -> int:
    return int(np.abs(left.astype(int) - right.astype(int)).max())


# Tiles ----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("scale", [2, 3])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 300), (300, 1), (32, 32), (33, 31), (70, 47)])
def test_a_network_that_repeats_pixels_does_so_in_tiles_at_any_size(
    load: Callable[[Weights], Network], scale: int, width: int, height: int
) -> None:
    network, rgb = load(_compact(scale)), _noise(width, height)
    assert network.scale == scale
    assert np.array_equal(network.enlarge(rgb, _go_on), _repeated(rgb, scale))


def _inside(tiles: Tiling, size: Size) -> Mask:
    """Where no cut is within reach; the picture's own edges are no cuts."""

    def along(spans: tuple[tuple[int, int], ...], length: int) -> Mask:
        places = np.arange(length)
        near = [abs(places - cut + 0.5) < REACH for span in spans for cut in span if 0 < cut < length]
        return ~np.any(near, axis=0)

    return along(tiles.rows, size.height)[:, None] & along(tiles.columns, size.width)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("scale", [2, 4])
def test_out_of_reach_of_the_cuts_tiles_give_what_the_picture_as_a_whole_gives(
    load: Callable[[Weights], Network], scale: int
) -> None:
    weights, size = _compact(scale, random=True), Size(width=75, height=90)
    rgb = _noise(*size)
    inside = _inside(tiling(size, Size(width=32, height=32), 8, feathered=True), size)
    assert 0.3 < inside.mean() < 0.9
    output, whole = load(weights).enlarge(rgb, _go_on), _computed(rgb, weights)
    differences = np.abs(output.astype(int) - whole)[_repeated(inside, scale)]
    assert differences.max() <= 1
    assert (differences > 0).mean() < 0.001
    assert _furthest(whole, _repeated(rgb, scale)) > 50


@pytest.mark.usefixtures("_small_tiles")
def test_cuts_do_not_show_on_a_flat_picture(load: Callable[[Weights], Network]) -> None:
    weights, rgb = _compact(2, random=True), np.full((90, 75, 3), 128, np.uint8)
    whole = _computed(rgb, weights)
    # Beyond an edge the network sees black. Away from the corners:
    at_an_edge = _furthest(whole[90, :4], whole[90, 70:74])
    middle = slice(2 * REACH, -2 * REACH), slice(2 * REACH, -2 * REACH)
    assert at_an_edge > 12
    assert _furthest(load(weights).enlarge(rgb, _go_on)[middle], whole[middle]) < at_an_edge / 3


def test_a_picture_smaller_than_a_tile_is_enlarged_as_if_mirrored_at_its_right_and_lower_edge(
    load: Callable[[Weights], Network],
) -> None:
    weights, rgb = _compact(2, random=True), _noise(21, 13)
    mirrored = np.pad(rgb, [(0, 10), (0, 10), (0, 0)], "reflect")
    expected = _computed(mirrored, weights)[: 2 * 13, : 2 * 21]
    assert _furthest(load(weights).enlarge(rgb, _go_on), expected) <= 1


@pytest.mark.usefixtures("_small_tiles")
def test_check_is_called_before_each_tile_and_may_stop_the_work(load: Callable[[Weights], Network]) -> None:
    network, calls = load(_compact(2)), 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Stopped("Enough.")

    with pytest.raises(Stopped):
        network.enlarge(_noise(80, 80), check)
    calls = 10
    network.enlarge(_noise(80, 80), check)
    assert calls == 10 + 3 * 3


def test_tiles_are_as_large_as_the_network_asks(
    load: Callable[[Weights], Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superres, "OVERLAP_PIXELS", 8)
    monkeypatch.setattr(superres, "TILE_PIXELS", 30)
    calls: list[None] = []
    # It takes 2 by 2 pixels together at first, and asks for multiples of 4: 32 here, of which two cover the width.
    network = load(_rrdb(2, unshuffle=2))
    assert network.scale == 2
    assert network.enlarge(_noise(56, 10), lambda: calls.append(None)).shape == (20, 112, 3)
    assert len(calls) == 2


@pytest.mark.usefixtures("_small_tiles")
def test_a_residual_network_enlarges_too(load: Callable[[Weights], Network]) -> None:
    network = load(_rrdb(4))
    assert network.scale == 4
    output = network.enlarge(_noise(33, 9), _go_on)
    assert output.shape == (36, 132, 3)
    assert output.std() > 10


@pytest.mark.usefixtures("_small_tiles")
def test_memory_for_floats_is_that_of_one_row_of_tiles(
    load: Callable[[Weights], Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    zeros, cat = torch.zeros, torch.cat

    def watched(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make_and_note(*arguments: object, **named: object) -> Tensor:
            made.append((tensor := make(*arguments, **named)).numel())
            return tensor

        return make_and_note

    monkeypatch.setattr(torch, "zeros", watched(zeros))
    monkeypatch.setattr(torch, "cat", watched(cat))
    load(_compact(2)).enlarge(_noise(40, 200), _go_on)
    assert max(made) == 3 * (2 * 32) * (2 * 40)


# Exact sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("factor", [1, 1.5, 2, 3, 4, 7.3])
@pytest.mark.parametrize("weights", [None, _compact(2), _compact(4)], ids=["lanczos", "2x", "4x"])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 19), (17, 6)])
def test_the_output_has_exactly_the_size(
    load: Callable[[Weights], Network], factor: float, weights: Weights | None, width: int, height: int
) -> None:
    size = output_size(width, height, factor)
    output = enlarge(_noise(width, height), size, load(weights) if weights else None, _go_on)
    assert output.shape == (size.height, size.width, 3)
    assert output.dtype == np.uint8


class _Noted(Network):
    """A network that repeats pixels, and notes what it is given."""

    def __init__(self, scale: int) -> None:
        self.scale = scale
        self.given: list[Levels] = []

    def enlarge(self, rgb: Levels, check: Callable[[], None]) -> Levels:
        self.given.append(rgb)
        return _repeated(rgb, self.scale)


@pytest.mark.parametrize("network", [None, _Noted(4)])
def test_a_picture_that_has_its_size_comes_back_as_it_is(network: Network | None) -> None:
    rgb = _noise(9, 5)
    assert enlarge(rgb, Size(width=9, height=5), network, _go_on) is rgb


def test_without_a_network_light_is_resampled_by_lanczos() -> None:
    rgb, size = _noise(30, 20), Size(width=47, height=33)
    assert np.array_equal(enlarge(rgb, size, None, _go_on), resample(Picture(rgb), size, _go_on).rgb)


def test_what_a_network_makes_too_large_is_brought_down_by_lanczos() -> None:
    rgb, size = _noise(24, 16), Size(width=48, height=32)
    expected = Image.fromarray(_repeated(rgb, 4)).resize((48, 32), Image.Resampling.LANCZOS)
    assert np.array_equal(enlarge(rgb, size, _Noted(4), _go_on), np.asarray(expected))


@pytest.mark.parametrize(
    ("scale", "factor", "runs"), [(2, 2, 1), (2, 2.1, 2), (2, 4, 2), (2, 8, 3), (4, 1.1, 1), (4, 5, 2)]
)
def test_a_network_is_run_as_often_as_the_size_takes(scale: int, factor: float, runs: int) -> None:
    network, rgb = _Noted(scale), _noise(20, 10)
    size = output_size(20, 10, factor)
    assert enlarge(rgb, size, network, _go_on).shape == (size.height, size.width, 3)
    assert len(network.given) == runs
    assert network.given[0] is rgb
    if runs > 1:
        assert network.given[-1].shape == (ceil(size.height / scale), ceil(size.width / scale), 3)


def test_a_network_is_run_three_times_at_most_and_the_rest_is_resampled() -> None:
    network = _Noted(2)
    assert enlarge(_noise(3, 2), Size(width=60, height=40), network, _go_on).shape == (40, 60, 3)
    assert len(network.given) == 3


@pytest.mark.parametrize("failure", [MemoryError, torch.OutOfMemoryError])
def test_what_memory_cannot_hold_is_out_of_memory(failure: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Levels:
        raise failure

    monkeypatch.setattr(_Noted, "enlarge", full)
    with pytest.raises(OutOfMemory, match="40 x 20 pixels") as kept:
        enlarge(_noise(20, 10), Size(width=40, height=20), _Noted(2), _go_on)
    assert kept.value.__context__ is None  # who keeps the error does not keep what filled the memory


# Loading --------------------------------------------------------------------------------------------------------------


def test_no_trace_of_torchvision_is_left_behind(load: Callable[[Weights], Network]) -> None:
    load(_compact(2))
    assert "spandrel" in sys.modules
    assert [name for name in sys.modules if name.partition(".")[0] == "torchvision"] == []
    assert importlib.util.find_spec("torchvision") is None
    assert not is_torchvision_available()


_ASKING = """
import torchvision
from torchvision.transforms.functional import InterpolationMode, normalize, rotate
raise ImportError(f"{normalize} saw {getattr(torchvision, '__file__', 'a stand-in')}")
"""


def _put_spandrel(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let another module be found under the name of spandrel."""
    (folder / "spandrel.py").write_text(code)
    monkeypatch.delitem(sys.modules, "spandrel", raising=False)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    importlib.invalidate_caches()


def test_the_stand_in_for_torchvision_goes_even_when_the_import_fails(
    load: Callable[[Weights], Network], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put_spandrel(_ASKING, tmp_path, monkeypatch)
    with pytest.raises(DeploymentError, match="saw a stand-in"):
        load(_compact(2))
    assert "torchvision" not in sys.modules


def test_a_torchvision_that_is_installed_is_used(
    load: Callable[[Weights], Network], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transforms = tmp_path / "torchvision" / "transforms"
    transforms.mkdir(parents=True)
    (tmp_path / "torchvision" / "__init__.py").touch()
    (transforms / "__init__.py").touch()
    (transforms / "functional.py").write_text("InterpolationMode = normalize = rotate = 'the real one'")
    _put_spandrel(_ASKING, tmp_path, monkeypatch)
    try:
        with pytest.raises(DeploymentError, match=r"the real one saw .*__init__\.py"):
            load(_compact(2))
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


def test_without_spandrel_the_command_that_installs_it_is_named(
    load: Callable[[Weights], Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(DeploymentError, match="`pip install --no-deps spandrel`"):
        load(_compact(2))


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ({"something": torch.zeros(3)}, "no network that spandrel knows"),
        (_compact(2) | {"body.2.weight": torch.zeros(5, 6, 3, 3)}, "damaged"),
        (_compact(1), "its purpose is Restoration, its scale 1"),
        (_compact(2, channels=1), "channels are 1 to 1"),
    ],
    ids=["unknown", "misshapen", "1x", "grey"],
)
def test_a_file_with_something_else_is_refused_by_name(
    load: Callable[[Weights], Network], weights: Weights, complaint: str
) -> None:
    with pytest.raises(DeploymentError, match=rf"network\.safetensors .*{complaint}"):
        load(weights)


def test_a_damaged_a_missing_and_a_pickled_file_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "damaged.safetensors").write_bytes(b"no tensors" * 10)
    (tmp_path / "pickled.pth").write_bytes(pickle.dumps({}))
    for name in ("damaged.safetensors", "missing.safetensors", "pickled.pth"):
        with pytest.raises(DeploymentError, match=name):
            superres.load(tmp_path / name, CPU)

"""Super-resolution: no seams, exact sizes, alpha apart, bounded memory."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor
from torch.nn import functional

from core.errors import DeploymentError, OutOfMemory, Stopped
from core.options import UpscaleOptions
from tests.networks import Weights, architecture, compact, rrdb, save_own
from worker.upscaler import checkpoints, strips, superres, tiles
from worker.upscaler import compact as compact_module
from worker.upscaler.canvas import to_levels, to_tensor
from worker.upscaler.colour import sharpen
from worker.upscaler.compact import Compact
from worker.upscaler.engines import Config
from worker.upscaler.engines.superres import Superres, load
from worker.upscaler.picture import Levels, Picture, join
from worker.upscaler.plan import Size, Span, output_size
from worker.upscaler.resampling import resample, resample_alpha
from worker.upscaler.strips import Rows, fitted
from worker.upscaler.superres import Network, enlarge, enlarge_strips
from worker.upscaler.tiles import SizeRequirements, Tiled

CPU = torch.device("cpu")

Floats = npt.NDArray[np.float32]


def _go_on() -> None:
    pass


def _noise(width: int, height: int) -> Levels:
    return np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _gradient(width: int, height: int) -> Levels:
    down, across = np.mgrid[0:height, 0:width]
    return np.stack([across * 255 // width, down * 255 // height, (across + down) % 256], axis=2).astype(np.uint8)


def _size(rgb: Levels) -> Size:
    return Size(width=rgb.shape[1], height=rgb.shape[0])


def _ran(network: Network, rgb: Levels, check: Callable[[], None] = _go_on, *, small: bool = False) -> Levels:
    return np.concatenate(list(network.enlarge(Rows([rgb], _size(rgb)), check, lambda _: None, small=small)))


def _furthest(left: Levels, right: Levels) -> int:
    return int(np.abs(left.astype(int) - right.astype(int)).max())


# Strips ---------------------------------------------------------------------------------------------------------------


def _cut(rgb: Levels, rows: int) -> Iterator[Levels]:
    return (rgb[top : top + rows] for top in range(0, len(rgb), rows))


def test_rows_are_read_in_windows_from_strips_of_any_height() -> None:
    rgb = _noise(3, 40)
    rows = Rows(_cut(rgb, 7), _size(rgb))
    for window in (Span(0, 3), Span(0, 18), Span(2, 18), Span(17, 40), Span(39, 40)):
        assert np.array_equal(rows.read(window), rgb[slice(*window)])


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((75, 90), (41, 57)), ((30, 500), (77, 1100)), ((33, 17), (32, 16)), ((64, 200), (64, 97)), ((1, 1), (3, 5))],
)
def test_what_is_resampled_in_strips_is_what_it_is_as_a_whole(
    size: tuple[int, int], wanted: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strips, "FITTED_PIXELS", wanted[0] * 7)
    rgb = _noise(*size)
    across = Image.fromarray(rgb).resize((wanted[0], size[1]), Image.Resampling.LANCZOS)
    whole = np.asarray(across.resize(wanted, Image.Resampling.LANCZOS))
    cut = list(fitted(_cut(rgb, 13), Size(*size), Size(*wanted)))
    assert max(map(len, cut)) <= 7 or size[1] == wanted[1]
    assert _furthest(np.concatenate(cut), whole) <= 1
    assert (np.concatenate(cut) != whole).mean() < 1e-3


# Compact --------------------------------------------------------------------------------------------------------------


def _compact_as_a_whole(rgb: Levels, weights: Weights) -> Levels:
    """What SRVGGNetCompact makes of a picture, by its formula."""
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


@pytest.mark.parametrize(("width", "height"), [(7, 5), (1, 1), (1, 60), (60, 1), (75, 90), (333, 17)])
@pytest.mark.parametrize(("scale", "slope"), [(2, 0.25), (3, 1.5), (4, -0.1)])
@pytest.mark.parametrize("rows", [2, 11])
def test_strips_of_a_compact_network_are_what_it_gives_as_a_whole(
    width: int, height: int, scale: int, slope: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact_module, "MIN_STRIP_ROWS", rows)
    monkeypatch.setattr(compact_module, "STRIP_PIXELS", 1)
    weights = compact(scale, random=True, slope=slope)
    network = Compact(weights, CPU, torch.float32)
    for rgb in (_noise(width, height), _gradient(width, height)):
        output, whole = _ran(network, rgb), _compact_as_a_whole(rgb, weights)
        assert _furthest(output, whole) <= 1
        assert (output != whole).mean() < 0.003  # where float32 rounds another way
    assert width * height == 1 or _furthest(whole, rgb.repeat(scale, 0).repeat(scale, 1)) > 10


def test_in_bfloat16_the_sum_keeps_all_levels() -> None:
    rgb = _gradient(256, 40)
    weights = compact(2)
    assert np.array_equal(_ran(Compact(weights, CPU, torch.bfloat16), rgb), rgb.repeat(2, 0).repeat(2, 1))


def test_small_strips_of_a_compact_network_have_half_the_rows() -> None:
    network, heights = Compact(compact(2), CPU, torch.float32), dict[bool, int]()
    for small in (False, True):
        rows = Rows([_noise(1024, 129)], Size(width=1024, height=129))
        heights[small] = max(map(len, network.enlarge(rows, _go_on, lambda _: None, small=small)))
    assert heights == {False: 2 * 44, True: 2 * 27}


# Tiles ----------------------------------------------------------------------------------------------------------------


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

    dtype, device = torch.float32, CPU

    def __init__(self) -> None:
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
@pytest.mark.parametrize("draw", [_noise, _gradient])
def test_tiles_of_a_network_that_looks_no_further_than_their_rim_are_what_it_gives_as_a_whole(
    draw: Callable[[int, int], Levels], width: int, height: int
) -> None:
    model, rgb = _Soft(), draw(width, height)
    output = _ran(Tiled(model), rgb)
    assert len(model.given) == max(1, ceil((width - 48) / 48)) * max(1, ceil((height - 48) / 48))
    whole = _whole(model, rgb)
    assert _furthest(output, whole) <= 1
    assert (output != whole).mean() < 1e-3


@pytest.mark.usefixtures("_small_tiles")
def test_tiles_of_a_network_that_looks_further_fade_into_each_other(tmp_path: Path) -> None:
    network, rgb = _load({k: v * 0.7 for k, v in architecture("SPAN").items()}, tmp_path), _gradient(150, 150)
    whole = _whole(cast("Any", network)._model, rgb)  # noqa: SLF001
    assert whole.std() > 1
    assert _furthest(_ran(network, rgb), whole) <= 1


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
    assert _ran(Tiled(model), _noise(*size)).shape == (2 * size[1], 2 * size[0], 3)
    assert model.given == [given]


def test_a_picture_smaller_than_a_tile_is_enlarged_as_if_mirrored_at_its_right_and_lower_edge() -> None:
    rgb, model = _noise(40, 50), _Soft()
    mirrored = np.pad(rgb, [(0, 14), (0, 24), (0, 0)], "reflect")
    assert np.array_equal(_ran(Tiled(model), rgb), _whole(model, mirrored)[:100, :80])


def test_small_tiles_have_half_the_side() -> None:
    model = _Soft()
    _ran(Tiled(model), _noise(300, 130), small=True)
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
        _ran(Tiled(model), _noise(150, 150), check)
    assert len(model.given) == 4


# Exact sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 1.37, 2, 3.3, 4, 5, 8])
@pytest.mark.parametrize("scales", [(2, 4), (2,), (3,), (1,), ()])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 5), (333, 17)])
def test_the_output_has_exactly_the_size(factor: float, scales: Sequence[int], width: int, height: int) -> None:
    networks = [Compact(compact(scale), CPU, torch.float32) for scale in scales]
    size = output_size(width, height, factor)
    output = enlarge(_noise(width, height), size, networks, _go_on)
    assert output.shape == (size.height, size.width, 3)
    assert output.dtype == np.uint8


class _Noted:
    """A network that repeats pixels, and notes what it is given."""

    def __init__(self, scale: int) -> None:
        self.scale = scale
        self.given: list[Size] = []

    def enlarge(
        self, rows: Rows, check: Callable[[], None], on_progress: Callable[[float], None], *, small: bool = False
    ) -> Iterator[Levels]:
        self.given.append(rows.size)
        for top in range(rows.size.height):
            check()
            yield rows.read(Span(top, top + 1)).repeat(self.scale, axis=0).repeat(self.scale, axis=1)
            on_progress((top + 1) / rows.size.height)

    def peak_bytes(self, width: int, *, small: bool = False) -> int:
        return 1000 * width


def test_a_picture_that_has_its_size_comes_back_as_it_is() -> None:
    rgb = _noise(9, 5)
    assert enlarge(rgb, Size(width=9, height=5), [_Noted(4)], _go_on) is rgb


def test_without_a_network_light_is_resampled_by_lanczos() -> None:
    rgb, size = _noise(30, 20), Size(width=47, height=33)
    assert np.array_equal(enlarge(rgb, size, [], _go_on), resample(Picture(rgb), size, _go_on).rgb)


@pytest.mark.parametrize(
    ("factor", "runs"),
    [
        (1, []),
        (1.5, [(2, 1)]),
        (2, [(2, 1)]),
        (2.1, [(4, 1)]),
        (4, [(4, 1)]),
        (5, [(4, 1), (2, 2.5)]),
        (8, [(4, 1), (2, 4)]),
    ],
)
def test_the_smallest_network_that_suffices_is_run_and_a_second_one_on_no_more_than_it_needs(
    factor: float, runs: list[tuple[int, float]]
) -> None:
    networks = [_Noted(4), _Noted(2)]
    enlarge(_noise(40, 20), output_size(40, 20, factor), networks, _go_on)
    given = [(network.scale, size.width / 40) for network in networks for size in network.given]
    assert given == runs


@pytest.mark.parametrize(
    ("scale", "factor", "runs"),
    [(2, 2, 1), (2, 2.1, 2), (2, 4, 2), (2, 8, 3), (4, 1.1, 1), (4, 5, 2), (1, 1, 1), (1, 3, 1)],
)
def test_a_network_alone_is_run_as_often_as_the_size_takes(scale: int, factor: float, runs: int) -> None:
    network = _Noted(scale)
    size = output_size(20, 10, factor)
    assert enlarge(_noise(20, 10), size, [network], _go_on).shape == (size.height, size.width, 3)
    assert len(network.given) == runs
    # The last run is the first to be asked for rows.
    assert network.given[-1:] == [(20, 10)]
    if runs > 1:
        assert network.given[0] == (ceil(size.width / scale), ceil(size.height / scale))


def test_a_network_is_run_three_times_at_most_and_the_rest_is_resampled() -> None:
    network = _Noted(2)
    assert enlarge(_noise(3, 2), Size(width=60, height=40), [network], _go_on).shape == (40, 60, 3)
    assert len(network.given) == 3


@pytest.mark.parametrize("failure", [MemoryError(), torch.OutOfMemoryError(), RuntimeError("can't allocate memory")])
def test_what_memory_cannot_hold_is_out_of_memory(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Iterator[Levels]:
        raise failure

    monkeypatch.setattr(_Noted, "enlarge", full)
    with pytest.raises(OutOfMemory, match="40 x 20 pixels") as kept:
        enlarge(_noise(20, 10), Size(width=40, height=20), [_Noted(2)], _go_on)
    assert kept.value.__context__ is None  # who keeps the error does not keep what filled the memory


def test_another_failure_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Iterator[Levels]:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(_Noted, "enlarge", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        enlarge(_noise(20, 10), Size(width=40, height=20), [_Noted(2)], _go_on)


def test_work_is_done_as_strips_are_asked_for() -> None:
    seen: list[float] = []
    output = enlarge_strips(_noise(20, 30), Size(width=40, height=60), [_Noted(2)], _go_on, seen.append)
    assert (len(next(output)), seen) == (2, [])
    next(output)
    assert seen == [pytest.approx(1 / 30)]


# The engine -----------------------------------------------------------------------------------------------------------


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
    rgb, alpha = _noise(30, 70), _noise(30, 70)[:, :, 0].copy()
    pieces = list(
        engine.upscale(Picture(rgb, alpha), UpscaleOptions(scale_factor=factor), lambda _: None, lambda: False)
    )
    upscaled, size = join(pieces), output_size(30, 70, factor)
    assert upscaled.alpha is not None
    assert np.array_equal(upscaled.alpha, resample_alpha(alpha, size, _go_on))
    assert np.array_equal(upscaled.rgb, _upscaled(engine, Picture(rgb), scale_factor=factor).rgb)


def test_progress_never_falls_and_ends_with_1(engine: Superres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact_module, "STRIP_PIXELS", 1)
    seen: list[float] = []
    list(engine.upscale(Picture(_noise(30, 70)), UpscaleOptions(scale_factor=6), seen.append, lambda: False))
    assert seen == sorted(seen)
    assert len(set(seen)) > 10
    assert (seen[0] < 0.1, seen[-1]) == (True, 1.0)


def test_small_tiles_make_more_strips(engine: Superres) -> None:
    picture = Picture(_noise(1024, 129))
    options = (UpscaleOptions(small_tiles=small) for small in (False, True))
    few, many = (len(list(engine.upscale(picture, one, lambda _: None, lambda: False))) for one in options)
    assert few < many


def test_a_job_that_is_to_stop_stops(engine: Superres) -> None:
    with pytest.raises(Stopped):
        list(engine.upscale(Picture(_noise(3, 7)), UpscaleOptions(), lambda _: None, lambda: True))


def test_sharpening_in_strips_is_that_of_the_whole(engine: Superres) -> None:
    picture = Picture(_noise(30, 70))
    whole = to_levels(sharpen(to_tensor(_upscaled(engine, picture).rgb, CPU), 3))
    assert np.array_equal(_upscaled(engine, picture, sharpen=3).rgb, whole)


def test_the_variant_is_the_operator_s_choice(engine: Superres) -> None:
    rgb = _noise(9, 7)
    fidelity = load(Config(device="cpu", superres_variant="fidelity"))
    assert np.array_equal(_upscaled(fidelity, Picture(rgb)).rgb, rgb.repeat(2, 0).repeat(2, 1))
    assert _furthest(_upscaled(engine, Picture(rgb)).rgb, _upscaled(fidelity, Picture(rgb)).rgb) > 10


def test_another_network_takes_the_place_of_both(tmp_path: Path) -> None:
    save_file(rrdb(2, unshuffle=2), tmp_path / "other.safetensors")
    other = load(Config(device="cpu", superres_weights=str(tmp_path / "other.safetensors")))
    assert _upscaled(other, Picture(_noise(9, 7)), scale_factor=2.5).rgb.shape == (18, 23, 3)


def test_a_network_that_is_not_there_is_refused_by_the_name_of_its_setting() -> None:
    with pytest.raises(DeploymentError, match=r"^UPSCALED_SUPERRES_WEIGHTS is gone\.pth, and there is no such file"):
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
    run = superres.peak_bytes(size, Size(width=8 * 4096, height=8 * 4096), [_Noted(4), _Noted(2)])
    alone = superres.peak_bytes(size, Size(width=4 * 4096, height=4 * 4096), [_Noted(4), _Noted(2)])
    assert run - alone == 1000 * 4 * 4096

"""Super-resolution to a size: exact, by which networks, and grey where the picture is."""

from collections.abc import Callable, Iterator, Sequence
from math import ceil

import numpy as np
import pytest
import torch

from core.errors import OutOfMemory
from tests.networks import compact
from tests.superres import go_on, noise
from worker.upscaler import superres
from worker.upscaler.compact import Compact
from worker.upscaler.picture import Levels, Picture
from worker.upscaler.plan import Size, Span, output_size
from worker.upscaler.resampling import resample
from worker.upscaler.strips import Rows
from worker.upscaler.superres import enlarge, enlarge_strips, peak_bytes

CPU = torch.device("cpu")


@pytest.mark.parametrize("factor", [1, 1.37, 2, 3.3, 4, 5, 8])
@pytest.mark.parametrize("scales", [(2, 4), (2,), (3,), (1,), ()])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 5), (333, 17)])
def test_the_output_has_exactly_the_size(factor: float, scales: Sequence[int], width: int, height: int) -> None:
    networks = [Compact(compact(scale), CPU, torch.float32) for scale in scales]
    size = output_size(width, height, factor)
    output = enlarge(noise(width, height), size, networks, go_on)
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
    rgb = noise(9, 5)
    assert enlarge(rgb, Size(width=9, height=5), [_Noted(4)], go_on) is rgb


def test_without_a_network_light_is_resampled_by_lanczos() -> None:
    rgb, size = noise(30, 20), Size(width=47, height=33)
    assert np.array_equal(enlarge(rgb, size, [], go_on), resample(Picture(rgb), size, go_on).rgb)


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
    enlarge(noise(40, 20), output_size(40, 20, factor), networks, go_on)
    given = [(network.scale, size.width / 40) for network in networks for size in network.given]
    assert given == runs


@pytest.mark.parametrize(
    ("scale", "factor", "runs"),
    [(2, 2, 1), (2, 2.1, 2), (2, 4, 2), (2, 8, 3), (4, 1.1, 1), (4, 5, 2), (1, 1, 1), (1, 3, 1)],
)
def test_a_network_alone_is_run_as_often_as_the_size_takes(scale: int, factor: float, runs: int) -> None:
    network = _Noted(scale)
    size = output_size(20, 10, factor)
    assert enlarge(noise(20, 10), size, [network], go_on).shape == (size.height, size.width, 3)
    assert len(network.given) == runs
    # The last run is the first to be asked for rows.
    assert network.given[-1:] == [(20, 10)]
    if runs > 1:
        assert network.given[0] == (ceil(size.width / scale), ceil(size.height / scale))


def test_a_network_is_run_three_times_at_most_and_the_rest_is_resampled() -> None:
    network = _Noted(2)
    assert enlarge(noise(3, 2), Size(width=60, height=40), [network], go_on).shape == (40, 60, 3)
    assert len(network.given) == 3


@pytest.mark.parametrize("failure", [MemoryError(), torch.OutOfMemoryError(), RuntimeError("can't allocate memory")])
def test_what_memory_cannot_hold_is_out_of_memory(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Iterator[Levels]:
        raise failure

    monkeypatch.setattr(_Noted, "enlarge", full)
    with pytest.raises(OutOfMemory, match="40 x 20 pixels") as kept:
        enlarge(noise(20, 10), Size(width=40, height=20), [_Noted(2)], go_on)
    assert kept.value.__context__ is None  # who keeps the error does not keep what filled the memory


def test_another_failure_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Iterator[Levels]:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(_Noted, "enlarge", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        enlarge(noise(20, 10), Size(width=40, height=20), [_Noted(2)], go_on)


def test_work_is_done_as_strips_are_asked_for() -> None:
    seen: list[float] = []
    output = enlarge_strips(noise(20, 30), Size(width=40, height=60), [_Noted(2)], go_on, seen.append)
    assert (len(next(output)), seen) == (2, [])
    next(output)
    assert seen == [pytest.approx(1 / 30)]


def test_what_is_needed_is_the_sum_of_all_runs() -> None:
    size = Size(width=4096, height=4096)
    run = peak_bytes(size, Size(width=8 * 4096, height=8 * 4096), [_Noted(4), _Noted(2)])
    alone = peak_bytes(size, Size(width=4 * 4096, height=4 * 4096), [_Noted(4), _Noted(2)])
    assert run - alone == 1000 * 4 * 4096


class _Tinting(_Noted):
    """One that makes everything a little red and less blue."""

    def enlarge(
        self, rows: Rows, check: Callable[[], None], on_progress: Callable[[float], None], *, small: bool = False
    ) -> Iterator[Levels]:
        tint = np.array([20, 0, -20])
        for strip in super().enlarge(rows, check, on_progress, small=small):
            yield np.clip(strip.astype(int) + tint, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("factor", [1, 2.5, 5])
def test_what_is_grey_throughout_stays_grey(scale: int, factor: float) -> None:
    grey = noise(20, 40)[:, :, :1].repeat(3, axis=2)
    size = output_size(20, 40, factor)
    output = enlarge(grey, size, [_Tinting(scale)], go_on)
    assert _is_grey(output)
    assert output.std() > 30


@pytest.mark.parametrize(("row", "channel"), [(0, 0), (39, 0), (39, 2)])
def test_one_pixel_that_is_not_grey_makes_a_picture_in_colours(
    row: int, channel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superres, "FITTED_PIXELS", 20 * 7)
    rgb = noise(20, 40)[:, :, :1].repeat(3, axis=2)
    rgb[row, 11, channel] ^= 1
    assert not _is_grey(enlarge(rgb, Size(width=40, height=80), [_Tinting(2)], go_on))


def _is_grey(rgb: Levels) -> bool:
    return bool((rgb == rgb[:, :, :1]).all())

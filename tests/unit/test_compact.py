"""Compact networks in strips: the same as at once, and in how much memory."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.networks import Weights, compact
from tests.superres import furthest, go_on, gradient, noise, ran
from worker.upscaler import compact as compact_module
from worker.upscaler import superres
from worker.upscaler.compact import Compact
from worker.upscaler.picture import Levels
from worker.upscaler.plan import Size
from worker.upscaler.strips import Rows

CPU = torch.device("cpu")


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
    for rgb in (noise(width, height), gradient(width, height)):
        output, whole = ran(network, rgb), _compact_as_a_whole(rgb, weights)
        assert furthest(output, whole) <= 1
        assert (output != whole).mean() < 0.003  # where float32 rounds another way
    assert width * height == 1 or furthest(whole, rgb.repeat(scale, 0).repeat(scale, 1)) > 10


def test_in_bfloat16_the_sum_keeps_all_levels() -> None:
    rgb = gradient(256, 40)
    weights = compact(2)
    assert np.array_equal(ran(Compact(weights, CPU, torch.bfloat16), rgb), rgb.repeat(2, 0).repeat(2, 1))


def test_small_strips_of_a_compact_network_have_half_the_rows() -> None:
    network, heights = Compact(compact(2), CPU, torch.float32), dict[bool, int]()
    for small in (False, True):
        rows = Rows([noise(1024, 129)], Size(width=1024, height=129))
        heights[small] = max(map(len, network.enlarge(rows, go_on, lambda _: None, small=small)))
    assert heights == {False: 2 * 44, True: 2 * 27}


def test_what_memory_a_very_wide_picture_takes_is_foretold() -> None:
    networks = [_deep(scale, features=48, layers=18) for scale in (2, 4)]
    measured = 633 << 20
    size, wanted = Size(width=16_384, height=16), Size(width=129_434, height=126)
    assert measured < superres.peak_bytes(size, wanted, networks) < 1.2 * measured


def test_what_is_foretold_grows_with_the_layers_whose_rows_are_kept() -> None:
    few, many = (_deep(2, features=8, layers=layers).peak_bytes(1 << 16) for layers in (4, 24))
    assert many - few == 20 * 2 * 8 * 2 << 16


def test_memory_of_a_gpu_is_not_the_computer_s() -> None:
    network = _deep(4, features=48, layers=18)
    network.device = torch.device("cuda")
    strip = compact_module.GPU_STRIP_PIXELS * 4**2 * 3
    assert strip < network.peak_bytes(1 << 10) < 3 * strip
    assert network.peak_bytes(1 << 10, small=True) < 0.6 * network.peak_bytes(1 << 10)
    network.device = torch.device("mps")  # whose memory is the computer's
    assert network.peak_bytes(1 << 10) > 6 * strip


def _deep(scale: int, *, features: int, layers: int) -> Compact:
    channels = [3, *[features] * (layers - 1), 3 * scale**2]
    weights: Weights = {}
    for index, (of, into) in enumerate(pairwise(channels)):
        weights[f"body.{2 * index}.weight"] = torch.zeros(into, of, 3, 3)
        weights[f"body.{2 * index}.bias"] = torch.zeros(into)
        weights[f"body.{2 * index + 1}.weight"] = torch.zeros(into)
    del weights[f"body.{2 * layers - 1}.weight"]
    return Compact(weights, CPU, torch.bfloat16)

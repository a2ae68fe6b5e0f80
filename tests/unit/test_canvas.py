"""Pictures as tensors."""

import numpy as np
import pytest
import torch

from worker.upscaler.canvas import padded, to_levels, to_tensor
from worker.upscaler.plan import Size

CPU = torch.device("cpu")


def test_levels_become_a_tensor_and_the_same_levels_again() -> None:
    rgb = np.arange(256, dtype=np.uint8)[:, None, None] + np.zeros((256, 2, 3), np.uint8)
    tensor = to_tensor(rgb, CPU)
    assert (tensor.shape, tensor.dtype) == ((1, 3, 256, 2), torch.float32)
    assert (float(tensor.min()), float(tensor.max())) == (0, 1)
    assert np.array_equal(to_levels(tensor), rgb)


def test_what_lies_beyond_black_and_white_is_cut_off() -> None:
    beyond = torch.tensor([-0.5, 0.5, 1.5]).view(1, 3, 1, 1)
    assert to_levels(beyond).tolist() == [[[0, 128, 255]]]


@pytest.mark.parametrize(("width", "height"), [(5, 7), (1, 1), (8, 3)])
def test_a_canvas_continues_the_picture_by_its_mirror_image(width: int, height: int) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    canvas = to_levels(padded(to_tensor(rgb, CPU), Size(width=16, height=24)))
    expected = np.pad(rgb, ((0, 24 - height), (0, 16 - width), (0, 0)), mode="symmetric")
    assert np.array_equal(canvas, expected)


def test_a_picture_that_fills_its_canvas_is_left_alone() -> None:
    picture = torch.rand(1, 3, 8, 16)
    assert padded(picture, Size(width=16, height=8)) is picture

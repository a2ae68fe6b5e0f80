"""Networks that know that neither its pose nor its brightness changes what a picture shows.

**Pose**: what is turned or mirrored is enlarged to the same picture, turned or mirrored (group-equivariant
convolutions: Cohen and Welling, 2016). Features come in eight equal parts, each of which sees the picture in a pose
of its own. The weights are the same in every pose: when the squares of the convolutions turn, the eight parts change
places, and so do the pixels within the square that becomes of one. An eighth of the weights is free, then, and each
learns from eight times as much.

**Brightness**: what is added to a whole colour of the input is added to that of the output, since each square of the
first convolution sums to zero, colour by colour, and the network's base is the input itself; not near the edge,
beyond which it sees black. Without that the features of the middle layers come to carry little but the brightness,
beside which details are too small to reach the kink of a rectifier: measured, 12 of 22 layers were linear.

Either way it remains a network of plain convolutions.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_Pose = tuple[int, bool]
"""How many quarter turns, and whether it is mirrored then."""

_POSES: list[_Pose] = [(turns, mirrored) for turns in range(4) for mirrored in (False, True)]


class Symmetry:
    """What the weights of a network have to keep to.

    Raises:
        ValueError: the features cannot be divided by eight.
    """

    def __init__(self, model: Any) -> None:
        features = model.body[0].out_channels
        if features % len(_POSES):
            raise ValueError(f"A symmetric network has a multiple of {len(_POSES)} features, not {features}.")
        self._places = {
            name: torch.stack(list(_places(values, name.split(".")[1], model))).to(values.device)
            for name, values in model.named_parameters()
        }

    def check(self, model: Any) -> None:
        """Make sure that all weights keep to it.

        Raises:
            ValueError: they do not.
        """
        for name, values in model.state_dict().items():
            if not torch.allclose(self.project(name, values), values, atol=1e-3):
                raise ValueError(f"Training cannot begin with weights that are not symmetric: {name}.")

    def project(self, name: str, values: Tensor) -> Tensor:
        """Give of a parameter, or of its gradient, the part that keeps to it: the mean over all poses."""
        shared = values.contiguous().flatten()[self._places[name]].mean(dim=0).view(values.shape)
        return shared - shared.mean(dim=(2, 3), keepdim=True) if name == "body.0.weight" else shared


def _places(values: Tensor, layer: str, model: Any) -> Iterator[Tensor]:
    """Tell for each pose where in a parameter lies what then stands in the place of each of its numbers."""
    features = model.body[0].out_channels
    numbers = torch.arange(values.numel()).view(values.shape)
    for pose in _POSES:
        is_last = layer == str(len(model.body) - 1)
        seen = numbers[_pixels(model.upscale, pose) if is_last else _parts(features, pose)]
        if values.dim() == 4:
            seen = _posed(seen if layer == "0" else seen[:, _parts(features, pose)], pose)
        yield seen.flatten()


def _parts(features: int, pose: _Pose) -> Tensor:
    """Tell in which order the features stand: each part in the place of the pose that it comes to."""
    corners = torch.arange(4).view(2, 2)
    seen = torch.stack([_posed(corners, own).flatten() for own in _POSES])
    wanted = torch.stack([_posed(_posed(corners, pose), own).flatten() for own in _POSES])
    order = (wanted[:, None] == seen).all(dim=2).int().argmax(dim=1)
    return torch.arange(features).view(len(_POSES), -1)[order].flatten()


def _pixels(scale: int, pose: _Pose) -> Tensor:
    """Tell in which order the outputs stand, which are the pixels of a square in each of three colours."""
    return _posed(torch.arange(3 * scale**2).view(3, scale, scale), pose).flatten()


def _posed(planes: Tensor, pose: _Pose) -> Tensor:
    turns, mirrored = pose
    turned = planes.rot90(turns, (-2, -1))
    return turned.flip(-1) if mirrored else turned

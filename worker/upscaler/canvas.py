"""Pictures as tensors: what diffusion works on."""

import torch
from torch import Tensor

from worker.upscaler.picture import Levels
from worker.upscaler.plan import Size


def to_tensor(rgb: Levels, device: torch.device) -> Tensor:
    """Return (1, 3, height, width) of 0 to 1, fp32, from (height, width, 3)."""
    return torch.tensor(rgb).to(device).permute(2, 0, 1)[None].float() / 255


def to_levels(picture: Tensor) -> Levels:
    """Undo `to_tensor`; what lies beyond 0 and 1 is cut off."""
    levels = (picture[0].clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.permute(1, 2, 0).contiguous().cpu().numpy()


def padded(picture: Tensor, canvas: Size) -> Tensor:
    """Continue a picture to the right and downwards by its mirror image, as often as it takes."""
    height, width = picture.shape[-2:]
    if (width, height) == canvas:
        return picture
    rows, columns = (_mirrored(*axis).to(picture.device) for axis in ((height, canvas.height), (width, canvas.width)))
    return picture[:, :, rows][:, :, :, columns]


def _mirrored(length: int, canvas: int) -> Tensor:
    place = torch.arange(canvas) % (2 * length)
    return torch.where(place < length, place, 2 * length - 1 - place)

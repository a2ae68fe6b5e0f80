"""The classifier that comes with Stable Diffusion 1: does a picture show sexual content?"""

from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from core.errors import DeploymentError
from worker.upscaler.picture import Levels
from worker.upscaler.plan import Size, tiling

MAX_ASPECT = 16
"""How many times as long as wide a picture is looked at; a longer one is squeezed, or a line would be 10000 squares."""


class SafetyChecker:
    """CLIP's view of a picture, compared with 17 concepts that are unwanted."""

    def __init__(self, model: StableDiffusionSafetyChecker) -> None:
        self._model = cast("Any", model)
        self._side: int = self._model.config.vision_config.image_size

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Self:
        """Read the diffusers component of a folder: config.json and model.safetensors. On CUDA it runs in float16.

        Raises:
            DeploymentError: one of the files is missing, damaged or of another model.
        """
        component = cast("Any", StableDiffusionSafetyChecker)
        try:
            model, report = component.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise DeploymentError(f"{folder} holds no safety checker that can be loaded: {error}.") from error
        if report["missing_keys"]:
            # What is missing would be random numbers.
            raise DeploymentError(f"{folder} holds no whole safety checker: {min(report['missing_keys'])} is missing.")
        return cls(model.to(device, torch.float16 if device.type == "cuda" else torch.float32).eval())

    @torch.inference_mode()
    def flags(self, rgb: Levels) -> bool:
        """Tell whether a picture of shape (height, width, 3) shows any of the concepts; the picture stays as it is.

        CLIP sees squares. Its own preparation takes the middle one; here they cover the picture from end to end, each
        overlapping the next by at least half, and one that is flagged is enough.
        """
        squares = self._squares(rgb).to(self._model.device, self._model.dtype)
        # Unlike `forward` this asks the device for one answer only, and does not log that it blackened the picture.
        # It does blacken what it is given as one.
        blackened = torch.zeros(len(squares), device=squares.device)
        _, flagged = self._model.forward_onnx(squares, blackened)
        return bool(flagged.any())

    def _squares(self, rgb: Levels) -> Tensor:
        """Cut and normalise what CLIP looks at, as it was trained: (squares, 3, side, side)."""
        side = self._side
        height, width = rgb.shape[:2]
        longest, shorter = side * MAX_ASPECT, min(height, width)
        area = Size(width=min(side * width // shorter, longest), height=min(side * height // shorter, longest))
        small = np.asarray(Image.fromarray(rgb).resize(area, Image.Resampling.BICUBIC))
        tiles = tiling(area, Size(width=side, height=side), side // 2, feathered=False)
        squares = np.stack([small[slice(*row), slice(*column)] for row in tiles.rows for column in tiles.columns])
        mean, deviation = np.array(OPENAI_CLIP_MEAN, np.float32), np.array(OPENAI_CLIP_STD, np.float32)
        normal = (squares / np.float32(255) - mean) / deviation
        return torch.from_numpy(normal).permute(0, 3, 1, 2)  # pyright: ignore[reportUnknownMemberType]

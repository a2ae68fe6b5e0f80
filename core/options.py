"""UpscaleOptions: the one internal vocabulary of a request. Dialects translate into it, engines read it."""

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_SEED = 2**53 - 1
"""Largest seed accepted: the largest integer that every JSON parser reads exactly."""


class OutputFormat(StrEnum):
    PNG = "png"
    JPG = "jpg"
    WEBP = "webp"

    @property
    def content_type(self) -> str:
        return "image/jpeg" if self is OutputFormat.JPG else f"image/{self.value}"

    @property
    def max_side_pixels(self) -> int:
        """Longest side that the file format can hold: 14 bits for WebP, libjpeg's limit for JPEG, 31 bits for PNG."""
        return {OutputFormat.PNG: 2**31 - 1, OutputFormat.JPG: 65_500, OutputFormat.WEBP: 16_383}[self]


class UpscaleOptions(BaseModel):
    """How to upscale one image. The neutral words; each dialect's names and defaults are mapped onto these."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale_factor: Annotated[float, Field(ge=1, le=8)] = 2.0
    """Output side over input side; the output is exactly round(width × factor) by round(height × factor)."""

    strength: Annotated[float, Field(ge=0, le=1)] = 0.35
    """How much is invented: 0 keeps the picture, 1 replaces it."""

    control_scale: Annotated[float, Field(ge=0, le=3)] = 0.6
    """How tightly the result is held to the original (weight of the tile ControlNet)."""

    guidance_scale: Annotated[float, Field(ge=1, le=50)] = 6.0
    """How strongly the prompt pulls (classifier-free guidance); high values look like HDR."""

    steps: Annotated[int, Field(ge=1, le=100)] = 18
    """Denoising steps."""

    prompt: Annotated[str, Field(max_length=2000)] = ""
    negative_prompt: Annotated[str, Field(max_length=2000)] = ""

    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    """Same seed, same picture. Drawn when the job is submitted if the caller gave none, so that a retry repeats it."""

    sharpen: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Sharpening of the finished picture: 0 none, 10 strongest."""

    output_format: OutputFormat = OutputFormat.PNG

    output_quality: Annotated[int, Field(ge=1, le=100)] = 95
    """Quality of JPEG and WebP; PNG is lossless and ignores it."""

    small_tiles: bool = False
    """Work in smaller tiles, slower and with less memory. Set by the worker once an attempt has run out of memory."""

    @property
    def cost(self) -> float:
        """The work that is expected, in jobs with default options: it grows with the output's area and the steps."""
        return max(0.1, (self.scale_factor / 2) ** 2 * self.steps / 18)

"""UpscaleOptions: the one internal vocabulary of a request. Dialects translate into it, engines read it."""

from enum import StrEnum

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

    scale_factor: float = Field(2.0, ge=1, le=8)
    """Output side over input side; the output is exactly round(width × factor) by round(height × factor)."""

    strength: float = Field(0.35, ge=0, le=1)
    """How much is invented: 0 keeps the picture, 1 replaces it."""

    control_scale: float = Field(0.6, ge=0, le=3)
    """How tightly the result is held to the original (weight of the tile ControlNet)."""

    guidance_scale: float = Field(6.0, ge=1, le=50)
    """How strongly the prompt pulls (classifier-free guidance); high values look like HDR."""

    steps: int = Field(18, ge=1, le=100)
    """Denoising steps."""

    prompt: str = Field("", max_length=2000)
    negative_prompt: str = Field("", max_length=2000)

    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Same seed, same picture. Drawn when the job is submitted if the caller gave none, so that a retry repeats it."""

    sharpen: float = Field(0.0, ge=0, le=10)
    """Sharpening of the finished picture: 0 none, 10 strongest."""

    output_format: OutputFormat = OutputFormat.PNG

    output_quality: int = Field(95, ge=1, le=100)
    """Quality of JPEG and WebP; PNG is lossless and ignores it."""

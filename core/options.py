"""UpscaleOptions: the one internal vocabulary of a request. Dialects translate into it, engines read it."""

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_SEED = 2**63 - 1
"""Largest seed: what a signed integer of 64 bits holds. A dialect may stop earlier."""

MAX_STRENGTH = 0.999
"""Strengths above count as this one, as in the original."""


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


class Sampler(StrEnum):
    """How the noise is taken out again, step by step. "2m" is of second order, "sde" adds fresh noise in each step."""

    EULER = "euler"
    EULER_ANCESTRAL = "euler_ancestral"
    HEUN = "heun"
    LMS = "lms"
    DDIM = "ddim"
    DDPM = "ddpm"
    DPM2 = "dpm2"
    DPM2_ANCESTRAL = "dpm2_ancestral"
    DPMPP_2S = "dpmpp_2s"
    DPMPP_SDE = "dpmpp_sde"
    DPMPP_2M = "dpmpp_2m"
    DPMPP_2M_SDE = "dpmpp_2m_sde"
    DPMPP_3M = "dpmpp_3m"
    DPMPP_3M_SDE = "dpmpp_3m_sde"
    DEIS = "deis"
    IPNDM = "ipndm"
    UNIPC_2M = "unipc_2m"
    UNIPC_3M = "unipc_3m"
    LCM = "lcm"
    TCD = "tcd"


class Spacing(StrEnum):
    """How the steps are spread over the noise levels."""

    KARRAS = "karras"
    EXPONENTIAL = "exponential"
    UNIFORM = "uniform"
    BETA = "beta"


class ColourFix(StrEnum):
    """How the colours of the original are brought back after diffusion has shifted them."""

    WAVELET = "wavelet"
    ADAIN = "adain"
    OFF = "off"


class SafetyCheck(StrEnum):
    """Whether a classifier looks for sexual content in the finished picture; a job whose picture has some fails."""

    OFF = "off"
    IF_INSTALLED = "if_installed"
    REQUIRED = "required"
    """Refuse the job where the classifier is not installed."""


class EngineName(StrEnum):
    """Engines that a job may ask for by name; every worker has them, whatever its own is."""

    SUPERRES = "superres"


class UpscaleOptions(BaseModel):
    """How to upscale one image. The neutral words; each dialect's names and defaults are mapped onto these."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: EngineName | None = None
    """None leaves it to the deployment."""

    scale_factor: Annotated[float, Field(ge=1, le=8)] = 2.0
    """Output side over input side; the output is exactly round(width × factor) by round(height × factor)."""

    strength: Annotated[float, Field(ge=0, le=1)] = 0.35
    """How much is invented: 0 keeps the picture, 1 replaces it."""

    control_scale: Annotated[float, Field(ge=-4, le=4)] = 0.6
    """How tightly the result is held to the original (weight of the tile ControlNet); below 0 it is pushed away."""

    guidance_scale: Annotated[float, Field(ge=0, le=50)] = 6.0
    """How strongly the prompt pulls (classifier-free guidance); high values look like HDR, up to 1 it is off."""

    steps: Annotated[int, Field(ge=1, le=100)] = 18
    """Denoising steps from pure noise; `evaluations` of them are taken."""

    sampler: Sampler = Sampler.DPMPP_3M_SDE
    spacing: Spacing = Spacing.KARRAS

    pass_decay: Annotated[float, Field(ge=0, le=2)] = 0.8
    """What `strength` is multiplied by for each further pass of at most 2×."""

    tile_width: Annotated[int, Field(ge=16, le=256)] = 112
    """Width of a tile in cells of 8 × 8 output pixels; smaller tiles each invent more of their own."""
    tile_height: Annotated[int, Field(ge=16, le=256)] = 144

    prompt: Annotated[str, Field(max_length=2000)] = ""
    negative_prompt: Annotated[str, Field(max_length=2000)] = ""

    clip_skip: Annotated[int, Field(ge=0, le=4)] = 0
    """How many of the text encoder's last layers are left out."""

    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    """Same seed, same picture. Drawn when the job is submitted if the caller gave none, so that a retry repeats it."""

    sharpen: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Sharpening of the finished picture: 0 none, 10 strongest."""

    colour_fix: ColourFix | None = None
    """None leaves it to the deployment."""

    safety_check: SafetyCheck = SafetyCheck.OFF

    output_format: OutputFormat = OutputFormat.PNG

    output_quality: Annotated[int, Field(ge=1, le=100)] = 95
    """Quality of JPEG and WebP; PNG is lossless and ignores it."""

    small_tiles: bool = False
    """Work in smaller tiles, slower and with less memory. Set by the worker once an attempt has run out of memory."""

    @property
    def evaluations(self) -> int:
        """How often the first pass asks the network about each tile; 0 when nothing is to be invented."""
        return int(min(self.strength, MAX_STRENGTH) * self.steps) + 1 if self.strength else 0

    @property
    def cost(self) -> float:
        """The work that is expected, in jobs with default options: it grows with the output's area and the steps."""
        if self.engine is EngineName.SUPERRES:
            return 0.1 * max(1.0, (self.scale_factor / 2) ** 2)
        guidance = 1.0 if self.guidance_scale > 1 else 0.5
        return max(0.1, (self.scale_factor / 2) ** 2 * self.evaluations / 7 * guidance)

"""What four vendors call the options of an upscale, model by model: one table, and its short interpreter."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal, cast

import pydantic
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
    create_model,
)

from core.errors import ValidationError
from core.options import MAX_SEED, ColourFix, EngineName, SafetyCheck, UpscaleOptions
from core.schedulers import resolve


class Dialect(StrEnum):
    """Whose words a request uses, and of which model."""

    APIFRAME = "apiframe"
    """`clarityUpscaleParams` of model clarity-upscale."""
    APIFRAME_SUPERRES = "apiframe_superres"
    """`superresParams` of model superres, which is ours."""
    FAL = "fal"
    """fal-ai/clarity-upscaler."""
    RUNWARE = "runware"
    """A task of model runware:500@1."""
    RUNWARE_SUPERRES = "runware_superres"
    """A task of model runware:503@1."""
    REPLICATE = "replicate"
    """philz1337x/clarity-upscaler."""

    @property
    def engine(self) -> EngineName | None:
        """The engine that the model stands for; None leaves it to the deployment."""
        superres = (Dialect.APIFRAME_SUPERRES, Dialect.RUNWARE_SUPERRES)
        return EngineName.SUPERRES if self in superres else None


@dataclass(frozen=True)
class Parameter:
    """A row of the table: what a caller writes, and what it becomes."""

    name: str
    """As the caller writes it; a full stop leads into an object, as in `settings.steps`."""
    field: str | tuple[str, ...]
    """The field of UpscaleOptions that the value becomes, or the fields."""
    kind: Any
    """A type for pydantic, read strictly, which also converts into what the field takes."""
    default: Any = None
    """What the field is when the parameter is absent or null; None leaves it to UpscaleOptions."""
    low: float | None = None
    high: float | None = None

    def becomes(self, value: Any) -> Mapping[str, Any]:
        """Return the fields that a value, read and converted, sets."""
        return {self.field: value} if isinstance(self.field, str) else dict(zip(self.field, value, strict=True))


@dataclass(frozen=True)
class Refusal:
    """A parameter that we know and cannot honour."""

    name: str
    neutral: Any
    """The value that asks for nothing, and passes, as null does."""
    why: str


def storable(text: str) -> str:
    """Refuse the one character that JSON can carry and Postgres cannot."""
    if "\0" in text:
        raise ValueError("must not contain the character NUL")
    return text


def _whole(value: Any) -> Any:
    """Read 2.0 as 2, for clients whose numbers are all floating; leave what is no number for the Literal to refuse."""
    if isinstance(value, bool):
        return str(value)  # True would pass for 1
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _written(value: Any) -> Any:
    """Read a digit in a string."""
    return int(value) if isinstance(value, str) and value in {*"0123456789"} else value


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


def _colour_fix(value: Any) -> Any:
    # The client's type is a boolean, the words beside it are these.
    return ("ADAIN" if value else "NOFIX") if isinstance(value, bool) else value


Prompt = Annotated[str, StringConstraints(max_length=2000), AfterValidator(storable)]
Format = Literal["png", "jpg", "webp"]
ScaleFactor = Annotated[
    Literal[1, 2, 4, 8],
    BeforeValidator(_whole),
    BeforeValidator(_written),
    WithJsonSchema(
        {"anyOf": [{"type": "number", "enum": [1, 2, 4, 8]}, {"type": "string", "enum": ["1", "2", "4", "8"]}]}
    ),
]
"""Apiframe's: the page writes "2", the OpenAPI document 2."""
AnyScaleFactor = Annotated[
    float,
    BeforeValidator(_written),
    WithJsonSchema(
        {"anyOf": [{"type": "number", "minimum": 1, "maximum": 8}, {"type": "string", "enum": [*"12345678"]}]}
    ),
]
"""Any in the range of its row; a digit in a string is read for who is used to writing "2"."""

_RUNWARE_FACTOR = Annotated[Literal[2, 3, 4], BeforeValidator(_whole)]
_RUNWARE_FORMAT = Annotated[Literal["JPG", "PNG", "WEBP"], BeforeValidator(_upper), AfterValidator(str.lower)]
_RUNWARE_COLOURS = {"ADAIN": ColourFix.ADAIN, "WAVELET": ColourFix.WAVELET, "NOFIX": ColourFix.OFF}
_COLOURS = Annotated[
    Literal["ADAIN", "WAVELET", "NOFIX"],
    BeforeValidator(_upper),
    BeforeValidator(_colour_fix),
    AfterValidator(_RUNWARE_COLOURS.__getitem__),
]
_SCHEDULER = Annotated[str, AfterValidator(resolve)]
_SAFETY = Annotated[bool, AfterValidator(lambda wanted: SafetyCheck.REQUIRED if wanted else SafetyCheck.OFF)]

_PROMPT = "masterpiece, best quality, highres"
_NEGATIVE_PROMPT = "(worst quality, low quality, normal quality:2)"

_APIFRAME_OUTPUT = (
    Parameter("output_format", "output_format", Format, "png"),
    Parameter("output_quality", "output_quality", int, 95, 1, 100),
)
_RUNWARE_OUTPUT = (
    # Clarity's page has one value, the guide to the API 2 and 4, the page of imageUpscale 2, 3 and 4: all of them.
    Parameter("upscaleFactor", "scale_factor", _RUNWARE_FACTOR, 2),
    # In capitals on every page, but not in the guide's own example.
    Parameter("outputFormat", "output_format", _RUNWARE_FORMAT, "jpg"),
    Parameter("outputQuality", "output_quality", int, 95, 20, 99),
)
_RUNWARE_CHECKS = (
    # Old and new word of the same, on no page of these models, sent by the client. Off unless asked for.
    Parameter("checkNSFW", "safety_check", _SAFETY),
    Parameter("safety.checkContent", "safety_check", _SAFETY),
)

TABLE: Mapping[Dialect, tuple[Parameter, ...]] = {
    # The model page's. negative_prompt and sharpen are in its OpenAPI document only, output_quality is an addition of
    # ours. The seed ends at the largest integer that every JSON parser reads exactly.
    Dialect.APIFRAME: (
        Parameter("prompt", "prompt", Prompt, ""),
        Parameter("negative_prompt", "negative_prompt", Prompt, ""),
        Parameter("scale_factor", "scale_factor", ScaleFactor, 2),
        Parameter("creativity", "strength", float, 0.35, 0, 1),
        Parameter("resemblance", "control_scale", float, 0.6, 0, 3),
        Parameter("dynamic", "guidance_scale", float, 6, 1, 50),
        Parameter("num_inference_steps", "steps", int, 18, 1, 100),
        Parameter("sharpen", "sharpen", float, 0, 0, 10),
        *_APIFRAME_OUTPUT,
        Parameter("seed", "seed", int, None, 0, 2**53 - 1),
    ),
    Dialect.APIFRAME_SUPERRES: (
        Parameter("scale_factor", "scale_factor", AnyScaleFactor, 2, 1, 8),
        *_APIFRAME_OUTPUT,
    ),
    # The model page's. Its safety checker is on by default: here, where one is installed; asked for, it is demanded.
    Dialect.FAL: (
        Parameter("prompt", "prompt", Prompt, _PROMPT),
        Parameter("negative_prompt", "negative_prompt", Prompt, _NEGATIVE_PROMPT),
        Parameter("upscale_factor", "scale_factor", float, 2, 1, 4),
        Parameter("creativity", "strength", float, 0.35, 0, 1),
        Parameter("resemblance", "control_scale", float, 0.6, 0, 1),
        Parameter("guidance_scale", "guidance_scale", float, 4, 0, 20),
        Parameter("num_inference_steps", "steps", int, 18, 4, 50),
        Parameter("seed", "seed", int, None, 0, MAX_SEED),
        Parameter("enable_safety_checker", "safety_check", _SAFETY, SafetyCheck.IF_INSTALLED),
    ),
    # The model page's; it ends neither steps nor CFGScale and gives them no default: those are ours. Its Python client
    # notes narrower ranges (controlNetWeight 0 to 1, CFGScale 3 to 20, steps 4 to 60): the page counts.
    Dialect.RUNWARE: (
        *_RUNWARE_OUTPUT,
        Parameter("settings.positivePrompt", "prompt", Prompt, ""),
        Parameter("settings.negativePrompt", "negative_prompt", Prompt, ""),
        Parameter("settings.strength", "strength", float, 0.8, 0, 1),
        Parameter("settings.controlNetWeight", "control_scale", float, 1, -4, 4),
        Parameter("settings.CFGScale", "guidance_scale", float, None, 0, 50),
        Parameter("settings.steps", "steps", int, None, 1, 100),
        Parameter("settings.scheduler", ("sampler", "spacing"), _SCHEDULER),
        Parameter("settings.seed", "seed", int, None, 0, MAX_SEED),
        # The guide has clipSkip for another model only, the Python client colorFix for two others. We honour both.
        Parameter("settings.clipSkip", "clip_skip", int, 0, 0, 2),
        Parameter("settings.colorFix", "colour_fix", _COLOURS),
        *_RUNWARE_CHECKS,
    ),
    # SwinIR there, whose column is in no table of settings.
    Dialect.RUNWARE_SUPERRES: (*_RUNWARE_OUTPUT, *_RUNWARE_CHECKS),
    # The published schema's. Its default prompts also name two LoRAs and an embedding, which no deployment is sure to
    # have. It ends neither scale_factor nor seed, and takes multiples of 16 for the tiles only: we end where
    # UpscaleOptions does.
    Dialect.REPLICATE: (
        Parameter("prompt", "prompt", Prompt, _PROMPT),
        Parameter("negative_prompt", "negative_prompt", Prompt, _NEGATIVE_PROMPT),
        Parameter("scale_factor", "scale_factor", float, 2, 1, 8),
        Parameter("dynamic", "guidance_scale", float, 6, 1, 50),
        Parameter("creativity", "strength", float, 0.35, 0, 1),
        Parameter("resemblance", "control_scale", float, 0.6, 0, 3),
        Parameter("tiling_width", "tile_width", int, 112, 16, 256),  # in cells, as ours
        Parameter("tiling_height", "tile_height", int, 144, 16, 256),
        Parameter("scheduler", ("sampler", "spacing"), _SCHEDULER),
        Parameter("num_inference_steps", "steps", int, 18, 1, 100),
        Parameter("seed", "seed", int, 1337, 0, MAX_SEED),  # the same picture each time, unless told otherwise
        Parameter("multistep_factor", "pass_decay", float, 0.8, 0, 2),
        Parameter("sharpen", "sharpen", float, 0, 0, 10),
        Parameter("output_format", "output_format", Format, "png"),
    ),
}
"""Each dialect's parameters, with the ranges and defaults of the vendor's documents."""

_OTHER_MODELS = "belongs to other models"
_MEGAPIXELS = Refusal("targetMegapixels", None, f"{_OTHER_MODELS}; give upscaleFactor")
_CHECKPOINT = "the checkpoint is the deployment's choice"

REFUSALS: Mapping[Dialect, tuple[Refusal, ...]] = {
    Dialect.APIFRAME: (),
    Dialect.APIFRAME_SUPERRES: (),
    Dialect.FAL: (),
    Dialect.RUNWARE: (
        _MEGAPIXELS,
        Refusal("settings.enhanceDetails", neutral=False, why=_OTHER_MODELS),
        Refusal("settings.realism", neutral=False, why=_OTHER_MODELS),
        Refusal("settings.tileDiffusion", neutral=True, why="this model always works in tiles"),
    ),
    Dialect.RUNWARE_SUPERRES: (
        _MEGAPIXELS,
        # The clients send of settings only what they were given, so nothing of it can have come by itself.
        Refusal("settings.positivePrompt", "", _OTHER_MODELS),
        Refusal("settings.negativePrompt", "", _OTHER_MODELS),
        Refusal("settings.strength", None, _OTHER_MODELS),
        Refusal("settings.controlNetWeight", None, _OTHER_MODELS),
        Refusal("settings.CFGScale", None, _OTHER_MODELS),
        Refusal("settings.steps", None, _OTHER_MODELS),
        Refusal("settings.scheduler", None, _OTHER_MODELS),
        Refusal("settings.seed", None, f"{_OTHER_MODELS}; this one draws nothing by lot"),
        Refusal("settings.clipSkip", 0, _OTHER_MODELS),
        Refusal("settings.colorFix", neutral=False, why=_OTHER_MODELS),
        Refusal("settings.enhanceDetails", neutral=False, why=_OTHER_MODELS),
        Refusal("settings.realism", neutral=False, why=_OTHER_MODELS),
        Refusal("settings.tileDiffusion", neutral=False, why=_OTHER_MODELS),
    ),
    Dialect.REPLICATE: (
        Refusal("mask", None, "masks are not supported; combine the pictures afterwards"),
        Refusal("handfix", "disabled", "hands are not repaired separately"),
        Refusal("pattern", neutral=False, why="seamless patterns are not supported"),
        Refusal("downscaling", neutral=False, why="give a smaller image instead"),
        Refusal("downscaling_resolution", 768, "give a smaller image instead"),
        Refusal("lora_links", "", "nothing is downloaded; name an installed LoRA in the prompt"),
        Refusal("custom_sd_model", "", _CHECKPOINT),
        Refusal("sd_model", "juggernaut_reborn.safetensors [338b85bc4f]", _CHECKPOINT),
    ),
}
"""Each dialect's parameters that are refused by name when they ask for something."""


def parameter(dialect: Dialect, name: str) -> Parameter:
    """Return the row of a parameter."""
    return next(row for row in TABLE[dialect] if row.name == name)


def known(dialect: Dialect) -> frozenset[str]:
    """Return the name of every parameter that `translate` looks at; any other it leaves to the caller."""
    return frozenset(row.name for row in (*TABLE[dialect], *REFUSALS[dialect]))


def translate(dialect: Dialect, params: Mapping[str, Any], seed: int) -> UpscaleOptions:
    """Return the options that a request's parameters, as parsed from JSON, ask for.

    Args:
        params: null counts as absent; names that are not `known` are ignored.
        seed: what to use when neither the caller nor the vendor gives one.

    Raises:
        ValidationError: parameters are wrong, or cannot be honoured; every one of them is named as the caller knows
            it. Its cause is pydantic's, which also has the kind of each complaint.
    """
    reader = _READERS[dialect]
    given = {name: value for name in reader.model_fields if (value := _at(params, name)) is not None}
    try:
        read = dict(reader.model_validate(given))
    except pydantic.ValidationError as error:
        complaints = {
            str(fault["loc"][0]): [fault["msg"].removeprefix("Value error, ")]
            for fault in error.errors(include_context=False)
        }
        raise ValidationError(complaints) from error
    options: dict[str, Any] = {"engine": dialect.engine, "seed": seed}
    for row in TABLE[dialect]:
        if (value := read[row.name]) is not None:
            options |= row.becomes(value)
    return UpscaleOptions.model_validate(options)


def _at(params: Mapping[str, Any], path: str) -> Any:
    """Return what a dotted path leads to; None when it leads nowhere."""
    head, _, rest = path.partition(".")
    value = params.get(head)
    if not rest:
        return value
    return _at(cast("Mapping[str, Any]", value), rest) if isinstance(value, Mapping) else None


def _reader(dialect: Dialect) -> type[BaseModel]:
    """Make the model that reads all parameters of a dialect at once, each under its dotted path."""
    fields: dict[str, Any] = {
        row.name: (row.kind, Field(row.default, ge=row.low, le=row.high)) for row in TABLE[dialect]
    }
    for refusal in REFUSALS[dialect]:
        fields[refusal.name] = (Annotated[Any, AfterValidator(_only(refusal))], None)
    for name in known(dialect):
        head, dot, _ = name.partition(".")
        if dot:
            fields[head] = (Annotated[Any, AfterValidator(_object)], None)
    return create_model(dialect.value, __config__=ConfigDict(strict=True), **fields)


def _only(refusal: Refusal) -> Callable[[Any], Any]:
    def refuse(value: Any) -> None:
        if value != refusal.neutral:
            raise ValueError(refusal.why)

    return refuse


def _object(value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ValueError("must be a JSON object")  # noqa: TRY004, pydantic expects a ValueError


_READERS = {dialect: _reader(dialect) for dialect in Dialect}

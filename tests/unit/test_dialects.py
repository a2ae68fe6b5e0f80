"""Dialects: each parameter's default, bounds and meaning, the vendors' own examples, and the page that lists them."""

import re
from pathlib import Path
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from core.dialects import REFUSALS, TABLE, Dialect, Parameter, Refusal, known, parameter, translate
from core.errors import ValidationError
from core.options import ColourFix, EngineName, OutputFormat, SafetyCheck, Sampler, Spacing, UpscaleOptions

SEED = 77
ROWS = [(dialect, row) for dialect in Dialect for row in TABLE[dialect]]
BOUNDED = [(dialect, row) for dialect, row in ROWS if row.low is not None]
REFUSED = [(dialect, refusal) for dialect in Dialect for refusal in REFUSALS[dialect]]


def _id(value: object) -> str:
    return value.name if isinstance(value, Parameter | Refusal) else str(value)


def _nested(name: str, value: Any) -> dict[str, Any]:
    """Return the request that gives one parameter."""
    for step in reversed(name.split(".")):
        value = {step: value}
    return value


def _complaints(dialect: Dialect, params: dict[str, Any]) -> dict[str, list[str]]:
    with pytest.raises(ValidationError) as caught:
        translate(dialect, params, SEED)
    return caught.value.details


def _schema(row: Parameter) -> dict[str, Any]:
    return TypeAdapter(row.kind).json_schema()


@pytest.mark.parametrize(
    ("dialect", "expected"),
    [
        (
            Dialect.APIFRAME,
            UpscaleOptions(scale_factor=2, strength=0.35, control_scale=0.6, guidance_scale=6, steps=18, seed=SEED),
        ),
        (
            Dialect.FAL,
            UpscaleOptions(
                prompt="masterpiece, best quality, highres",
                negative_prompt="(worst quality, low quality, normal quality:2)",
                scale_factor=2,
                strength=0.35,
                control_scale=0.6,
                guidance_scale=4,
                steps=18,
                seed=SEED,
                safety_check=SafetyCheck.IF_INSTALLED,
            ),
        ),
        (
            Dialect.RUNWARE,
            UpscaleOptions(strength=0.8, control_scale=1, seed=SEED, output_format=OutputFormat.JPG, output_quality=95),
        ),
        (Dialect.APIFRAME_SUPERRES, UpscaleOptions(engine=EngineName.SUPERRES, seed=SEED)),
        (
            Dialect.RUNWARE_SUPERRES,
            UpscaleOptions(engine=EngineName.SUPERRES, seed=SEED, output_format=OutputFormat.JPG),
        ),
        (
            Dialect.REPLICATE,
            UpscaleOptions(
                prompt="masterpiece, best quality, highres",
                negative_prompt="(worst quality, low quality, normal quality:2)",
                guidance_scale=6,
                tile_width=112,
                tile_height=144,
                pass_decay=0.8,
                seed=1337,
            ),
        ),
    ],
)
def test_absent_and_null_parameters_get_the_vendor_s_defaults(dialect: Dialect, expected: UpscaleOptions) -> None:
    assert translate(dialect, {}, SEED) == expected
    nulls: dict[str, Any] = {}
    for name in known(dialect):
        head, dot, rest = name.partition(".")
        nulls.setdefault(head, {} if dot else None)
        if dot:
            nulls[head][rest] = None
    assert translate(dialect, nulls, SEED) == expected


def test_what_apiframe_s_page_shows_is_read_as_it_says() -> None:
    params = {
        "image": "https://example.com/input.jpg",
        "prompt": "Optional — describe the kind of detail to add",
        "scale_factor": "2",
        "creativity": 0.35,
    }
    assert translate(Dialect.APIFRAME, params, SEED) == UpscaleOptions(
        prompt="Optional — describe the kind of detail to add", seed=SEED
    )


def test_fal_s_full_example_is_read_as_it_says() -> None:
    params = {
        "image_url": "https://storage.googleapis.com/falserverless/gallery/NOCA_Mick-Thompson.resized.resized.jpg",
        "prompt": "masterpiece, best quality, highres",
        "upscale_factor": 2,
        "negative_prompt": "(worst quality, low quality, normal quality:2)",
        "creativity": 0.35,
        "resemblance": 0.6,
        "guidance_scale": 4,
        "num_inference_steps": 18,
        "enable_safety_checker": True,
    }
    assert translate(Dialect.FAL, params, SEED) == UpscaleOptions(
        prompt="masterpiece, best quality, highres",
        negative_prompt="(worst quality, low quality, normal quality:2)",
        scale_factor=2,
        strength=0.35,
        control_scale=0.6,
        guidance_scale=4,
        steps=18,
        seed=SEED,
        safety_check=SafetyCheck.REQUIRED,
    )


def test_the_example_of_runware_s_model_page_is_read_as_it_says() -> None:
    params = {
        "taskType": "upscale",
        "taskUUID": "2205ed9f-6640-47a2-8d62-5510ca6865fb",
        "model": "runware:500@1",
        "upscaleFactor": 2,
        "settings": {
            "positivePrompt": "clean realistic urban signboard closeup",
            "negativePrompt": "extra objects, altered layout",
            "strength": 0.34,
            "steps": 24,
            "CFGScale": 5.5,
            "seed": 36939,
        },
        "inputs": {"image": "https://assets.runware.ai/assets/inputs/2197a5ea-1c3b-49ca-8c0b-a45e054df72b.jpg"},
    }
    assert translate(Dialect.RUNWARE, params, SEED) == UpscaleOptions(
        prompt="clean realistic urban signboard closeup",
        negative_prompt="extra objects, altered layout",
        scale_factor=2,
        strength=0.34,
        control_scale=1,
        steps=24,
        guidance_scale=5.5,
        seed=36939,
        output_format=OutputFormat.JPG,
    )


def test_the_examples_of_runware_s_guide_are_read_as_they_say() -> None:
    creative = {
        "inputImage": "c64351d5-4c59-42f7-95e1-eace013eddab",
        "settings": {
            "steps": 20,
            "strength": 0.35,
            "CFGScale": 6,
            "controlNetWeight": 0.6,
            "positivePrompt": "high quality, detailed, sharp",
        },
    }
    assert translate(Dialect.RUNWARE, creative, SEED) == UpscaleOptions(
        prompt="high quality, detailed, sharp",
        strength=0.35,
        control_scale=0.6,
        steps=20,
        guidance_scale=6,
        seed=SEED,
        output_format=OutputFormat.JPG,
    )
    plain = {"outputType": "URL", "outputFormat": "jpg", "upscaleFactor": 2}
    assert translate(Dialect.RUNWARE, plain, SEED) == translate(Dialect.RUNWARE, {}, SEED)


def test_what_runware_s_clients_send_by_themselves_is_no_setting() -> None:
    params: dict[str, Any] = {
        "taskType": "imageUpscale",
        "taskUUID": "56d588b2-5af9-4d0d-80c3-c5c213597be6",
        "deliveryMethod": "sync",
        "upscaleFactor": 4,
        "inputImage": "989ba605-1449-4e1e-b462-cd83ec9c1a67",
        "model": "runware:503@1",
        "settings": {},
        "outputType": "URL",
        "outputFormat": "PNG",
        "includeCost": True,
    }
    assert translate(Dialect.RUNWARE_SUPERRES, params, SEED) == UpscaleOptions(
        engine=EngineName.SUPERRES, scale_factor=4, seed=SEED
    )


def test_every_setting_of_clarity_is_known_to_runware_s_other_model_and_refused_by_name() -> None:
    example = {"settings": {"positivePrompt": "fur", "strength": 0.34, "steps": 24, "CFGScale": 5.5, "seed": 36939}}
    assert known(Dialect.RUNWARE_SUPERRES) == known(Dialect.RUNWARE)
    complaints = _complaints(Dialect.RUNWARE_SUPERRES, example)
    assert set(complaints) == {f"settings.{name}" for name in example["settings"]}
    assert all(sentence.startswith("belongs to other models") for (sentence,) in complaints.values())


def test_replicate_s_own_defaults_written_out_change_nothing() -> None:
    params = {
        "seed": 1337,
        "prompt": "masterpiece, best quality, highres",
        "dynamic": 6,
        "handfix": "disabled",
        "pattern": False,
        "sharpen": 0,
        "sd_model": "juggernaut_reborn.safetensors [338b85bc4f]",
        "scheduler": "DPM++ 3M SDE Karras",
        "creativity": 0.35,
        "lora_links": "",
        "downscaling": False,
        "resemblance": 0.6,
        "scale_factor": 2,
        "tiling_width": 112,
        "output_format": "png",
        "tiling_height": 144,
        "custom_sd_model": "",
        "negative_prompt": "(worst quality, low quality, normal quality:2)",
        "num_inference_steps": 18,
        "downscaling_resolution": 768,
        "multistep_factor": 0.8,
    }
    assert translate(Dialect.REPLICATE, params, SEED) == translate(Dialect.REPLICATE, {}, SEED)
    assert set(params) | {"mask"} == known(Dialect.REPLICATE)


@pytest.mark.parametrize(
    ("dialect", "name", "value", "expected"),
    [
        (Dialect.APIFRAME, "scale_factor", "8", {"scale_factor": 8}),
        (Dialect.APIFRAME, "scale_factor", 4.0, {"scale_factor": 4}),
        (Dialect.APIFRAME, "output_format", "webp", {"output_format": OutputFormat.WEBP}),
        (Dialect.APIFRAME_SUPERRES, "scale_factor", "3", {"scale_factor": 3}),
        (Dialect.APIFRAME_SUPERRES, "scale_factor", 2.5, {"scale_factor": 2.5}),
        (Dialect.FAL, "upscale_factor", 1.5, {"scale_factor": 1.5}),
        (Dialect.FAL, "seed", 5, {"seed": 5}),
        (Dialect.FAL, "prompt", "", {"prompt": ""}),
        (Dialect.FAL, "enable_safety_checker", False, {"safety_check": SafetyCheck.OFF}),
        (Dialect.FAL, "enable_safety_checker", True, {"safety_check": SafetyCheck.REQUIRED}),
        (Dialect.RUNWARE, "upscaleFactor", 4.0, {"scale_factor": 4}),
        (Dialect.RUNWARE, "upscaleFactor", 3, {"scale_factor": 3}),
        (Dialect.RUNWARE, "outputFormat", "WEBP", {"output_format": OutputFormat.WEBP}),
        (Dialect.RUNWARE, "outputFormat", "Png", {"output_format": OutputFormat.PNG}),
        (Dialect.RUNWARE, "checkNSFW", True, {"safety_check": SafetyCheck.REQUIRED}),
        (Dialect.RUNWARE, "checkNSFW", False, {"safety_check": SafetyCheck.OFF}),
        (Dialect.RUNWARE, "safety.checkContent", True, {"safety_check": SafetyCheck.REQUIRED}),
        (Dialect.RUNWARE, "settings.clipSkip", 2, {"clip_skip": 2}),
        (Dialect.RUNWARE, "settings.colorFix", True, {"colour_fix": ColourFix.ADAIN}),
        (Dialect.RUNWARE, "settings.colorFix", False, {"colour_fix": ColourFix.OFF}),
        (Dialect.RUNWARE, "settings.colorFix", "wavelet", {"colour_fix": ColourFix.WAVELET}),
        (
            Dialect.RUNWARE,
            "settings.scheduler",
            "DPM++ Uniform Beta",
            {"sampler": Sampler.DPMPP_2M, "spacing": Spacing.BETA},
        ),
        (Dialect.RUNWARE_SUPERRES, "upscaleFactor", 3.0, {"scale_factor": 3}),
        (Dialect.RUNWARE_SUPERRES, "outputFormat", "webp", {"output_format": OutputFormat.WEBP}),
        (Dialect.RUNWARE_SUPERRES, "checkNSFW", True, {"safety_check": SafetyCheck.REQUIRED}),
        (Dialect.REPLICATE, "scheduler", "DPM2 a Karras", {"sampler": Sampler.DPM2_ANCESTRAL}),
        (Dialect.REPLICATE, "tiling_width", 64, {"tile_width": 64}),
        (Dialect.REPLICATE, "tiling_height", 256, {"tile_height": 256}),
        (Dialect.REPLICATE, "multistep_factor", 1.2, {"pass_decay": 1.2}),
    ],
)
def test_a_value_becomes_ours(dialect: Dialect, name: str, value: Any, expected: dict[str, Any]) -> None:
    wanted = translate(dialect, {}, SEED).model_dump() | expected
    assert translate(dialect, _nested(name, value), SEED) == UpscaleOptions(**wanted)


@pytest.mark.parametrize(("dialect", "row"), BOUNDED, ids=_id)
def test_both_bounds_pass_and_what_lies_beyond_is_refused_by_name(dialect: Dialect, row: Parameter) -> None:
    assert isinstance(row.field, str)
    assert row.low is not None and row.high is not None
    step = 1 if row.kind is int else 0.001
    for bound in (row.low, row.high):
        assert getattr(translate(dialect, _nested(row.name, bound), SEED), row.field) == bound
    for beyond in (row.low - step, row.high + step):
        assert list(_complaints(dialect, _nested(row.name, beyond))) == [row.name]


@pytest.mark.parametrize(("dialect", "row"), ROWS, ids=_id)
def test_a_value_of_another_type_is_refused_by_name_in_one_sentence(dialect: Dialect, row: Parameter) -> None:
    wrong: list[Any] = [[], {}, "\ud800", "x" * 2001, float("nan"), float("inf"), 10**400]
    if row.kind in (int, float):
        wrong += ["2", True]
    if row.kind is int:
        wrong += [2.5, 18.0]
    if "enum" in (schema := _schema(row)) or "anyOf" in schema:
        wrong += ["gif", 5 if row.low is None else "9", "02", "\N{ARABIC-INDIC DIGIT TWO}"]
    if schema.get("type") == "boolean":
        wrong += [1, "true"]
    if row.name.endswith("rompt"):
        wrong += ["a\0b", 7, True]
    for value in wrong:
        complaints = _complaints(dialect, _nested(row.name, value))
        assert list(complaints) == [row.name], value
        assert len(complaints[row.name]) == 1


@pytest.mark.parametrize(
    ("dialect", "name"),
    [
        *((dialect, "scale_factor") for dialect in (Dialect.APIFRAME, Dialect.APIFRAME_SUPERRES)),
        *((dialect, "upscaleFactor") for dialect in (Dialect.RUNWARE, Dialect.RUNWARE_SUPERRES)),
    ],
    ids=_id,
)
def test_only_apiframe_writes_factors_as_strings_and_nobody_as_booleans(dialect: Dialect, name: str) -> None:
    assert list(_complaints(dialect, {name: True})) == [name]
    if name == "upscaleFactor":
        assert _complaints(dialect, {name: "2"}) == {name: ["Input should be 2, 3 or 4"]}


def test_every_wrong_parameter_is_named_at_once_as_the_caller_knows_it() -> None:
    params = {
        "upscaleFactor": 8,
        "outputQuality": 100,
        "targetMegapixels": 4,
        "settings": {"CFGScale": 51, "steps": "many", "scheduler": "FlowMatchEulerDiscreteScheduler"},
    }
    complaints = _complaints(Dialect.RUNWARE, params)
    assert complaints == {
        "upscaleFactor": ["Input should be 2, 3 or 4"],
        "outputQuality": ["Input should be less than or equal to 99"],
        "targetMegapixels": ["belongs to other models; give upscaleFactor"],
        "settings.CFGScale": ["Input should be less than or equal to 50"],
        "settings.steps": ["Input should be a valid integer"],
        "settings.scheduler": [
            "FlowMatchEulerDiscreteScheduler is for models that match flows; this one predicts noise"
        ],
    }


def test_the_cause_of_a_refusal_tells_what_kind_it_is() -> None:
    with pytest.raises(ValidationError) as caught:
        translate(Dialect.FAL, {"upscale_factor": 9}, SEED)
    assert isinstance(caught.value.__cause__, pydantic.ValidationError)
    (fault,) = caught.value.__cause__.errors()
    assert (fault["type"], fault["loc"], fault["input"]) == ("less_than_equal", ("upscale_factor",), 9)


@pytest.mark.parametrize(("dialect", "refusal"), REFUSED, ids=_id)
def test_what_cannot_be_honoured_passes_only_when_it_asks_for_nothing(dialect: Dialect, refusal: Refusal) -> None:
    for neutral in (refusal.neutral, None):
        assert translate(dialect, _nested(refusal.name, neutral), SEED) == translate(dialect, {}, SEED)
    something = not refusal.neutral if isinstance(refusal.neutral, bool) else "something"
    assert _complaints(dialect, _nested(refusal.name, something)) == {refusal.name: [refusal.why]}


@pytest.mark.parametrize("name", ["settings", "safety"])
@pytest.mark.parametrize("value", ["steps", 7, True, ["steps"]])
def test_an_object_that_is_none_is_refused_by_name(name: str, value: Any) -> None:
    assert _complaints(Dialect.RUNWARE, {name: value}) == {name: ["must be a JSON object"]}


def test_a_name_that_is_unknown_is_the_caller_s_business() -> None:
    for dialect in Dialect:
        strangers: dict[str, Any] = {"image": "https://example.com/a.png", "settings.steps": 50, "nonsense": []}
        assert translate(dialect, strangers, SEED) == translate(dialect, {}, SEED)
        assert not known(dialect) & {"image", "nonsense"}


def test_names_and_fields_are_unambiguous() -> None:
    for dialect in Dialect:
        names = [row.name for row in (*TABLE[dialect], *REFUSALS[dialect])]
        assert len(names) == len(set(names)) == len(known(dialect))
    for _, row in ROWS:
        fields = [row.field] if isinstance(row.field, str) else row.field
        assert set(fields) <= set(UpscaleOptions.model_fields)
    assert parameter(Dialect.FAL, "guidance_scale").high == 20


@given(st.floats(1, 8) | st.integers(1, 8) | st.sampled_from("12345678"))
def test_superres_takes_every_factor_in_its_range(factor: float | str) -> None:
    options = translate(Dialect.APIFRAME_SUPERRES, {"scale_factor": factor}, SEED)
    assert options == UpscaleOptions(engine=EngineName.SUPERRES, scale_factor=float(factor), seed=SEED)


@given(st.floats(1, 8), st.floats(1, 8))
def test_what_superres_makes_larger_costs_no_less_and_far_less_than_diffusion(one: float, other: float) -> None:
    small, large = (UpscaleOptions(engine=EngineName.SUPERRES, scale_factor=factor) for factor in sorted((one, other)))
    assert 0.1 <= small.cost <= large.cost <= 1.6
    assert small.cost <= UpscaleOptions(scale_factor=small.scale_factor).cost


def test_the_page_of_parameters_is_true() -> None:
    page = (Path(__file__).parents[2] / "docs/parameters.md").read_text()
    chapters = re.split(r"^## .*`(\w+)`$", page, flags=re.MULTILINE)
    shown = {
        name: [line for line in text.splitlines() if line.startswith("| `")]
        for name, text in zip(chapters[1::2], chapters[2::2], strict=True)
    }
    expected = {
        dialect.value: [
            *(f"| `{row.name}` | {_fields(row)} | {_values(row)} | {_shown(row.default)} |" for row in TABLE[dialect]),
            *(f"| `{refusal.name}` | {_shown(refusal.neutral)} | {refusal.why} |" for refusal in REFUSALS[dialect]),
        ]
        for dialect in Dialect
    }
    assert shown == expected


def _fields(row: Parameter) -> str:
    return ", ".join(f"`{field}`" for field in ([row.field] if isinstance(row.field, str) else row.field))


def _values(row: Parameter) -> str:
    if row.low is not None:
        return f"{row.low} to {row.high}"
    schema = _schema(row)
    if "maxLength" in schema:
        return f"up to {schema['maxLength']} characters"
    if schema.get("type") == "boolean":
        return "true, false"
    if "anyOf" in schema:
        return ", ".join(schema["anyOf"][1]["enum"]) + " as number or string"
    return ", ".join(map(str, schema["enum"])) if "enum" in schema else "a scheduler's name"


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return (
        {True: "true", False: "false"}[value] if isinstance(value, bool) else f"`{value}`" if value != "" else "empty"
    )

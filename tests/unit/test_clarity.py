"""The Clarity engine as a whole, on networks of the real geometry with random weights."""

import gc
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from core.errors import DeploymentError, OutOfMemory, Stopped, UnknownLora
from core.options import ColourFix, Sampler, UpscaleOptions
from tests import tiny
from worker.upscaler import engines, images, resampling
from worker.upscaler.engine import Engine, Levels, Picture
from worker.upscaler.engines import Config, clarity
from worker.upscaler.engines.clarity import Clarity
from worker.upscaler.plan import Size, output_size
from worker.upscaler.superres import Network

Floats = npt.NDArray[np.float64]

QUICK = UpscaleOptions(steps=6, tile_width=16, tile_height=16, seed=7)
"""Three evaluations of small tiles."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.save(folder)
    return folder


@pytest.fixture(scope="module")
def engine(models: Path) -> Clarity:
    return clarity.load(Config(models_dir=models, device="cpu"))


def _load(models: Path, **chosen: Any) -> Clarity:
    return clarity.load(Config(models_dir=models, device="cpu", **chosen))


def _upscale(engine: Engine, picture: Picture, options: UpscaleOptions = QUICK, **changed: Any) -> Picture:
    return engine.upscale(picture, options.model_copy(update=changed), lambda _: None, lambda: False)


def _photo(width: int, height: int, seed: int = 0) -> Picture:
    """Return something with large forms and fine grain."""
    down, across = np.mgrid[0:height, 0:width]
    waves = [np.sin(down / (7 + 3 * i)) * np.cos(across / (11 - 2 * i)) for i in range(3)]
    grain = np.random.default_rng(seed).normal(0, 12, (height, width, 3))
    return Picture(np.clip(128 + 80 * np.stack(waves, axis=2) + grain, 0, 255).astype(np.uint8))


def _difference(one: Picture, other: Picture) -> Floats:
    return np.abs(one.rgb.astype(np.float64) - other.rgb)


@contextmanager
def _counted(module: nn.Module) -> Generator[list[int]]:
    """Note how many samples each call of a network has."""
    seen: list[int] = []

    def note(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(len(arguments[0]))

    hook = module.register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        hook.remove()


# Sizes and pictures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "factor"),
    [(1, 1, 2.0), (16, 16, 1.0), (13, 7, 1.5), (33, 21, 2.0), (20, 9, 3.0), (9, 14, 4.0), (5, 6, 7.3), (6, 5, 8.0)],
)
def test_the_output_has_exactly_the_size_that_was_asked_for(
    engine: Clarity, width: int, height: int, factor: float
) -> None:
    upscaled = _upscale(engine, _photo(width, height), scale_factor=factor, steps=3)
    assert (upscaled.width, upscaled.height) == output_size(width, height, factor)


def test_a_panorama_is_worked_on_in_tiles(engine: Clarity, models: Path) -> None:
    with _counted(engine.parts.unet) as batches:
        upscaled = _upscale(engine, _photo(2048, 32), QUICK, tile_width=32, tile_height=32, steps=1)
    assert (upscaled.width, upscaled.height) == (4096, 64)
    assert len(batches) > 16


def _encoded(mode: str, kind: str, **how: Any) -> bytes:
    rgba = np.random.default_rng(3).integers(0, 256, (18, 24, 4), np.uint8)
    image = Image.fromarray(rgba)
    image = Image.fromarray(rgba[:, :, 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    file = BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _encoded("RGB", "JPEG", exif=exif)


@pytest.mark.parametrize(
    ("data", "size", "transparent"),
    [
        (_encoded("RGB", "PNG"), (48, 36), False),
        (_encoded("RGBA", "PNG"), (48, 36), True),
        (_encoded("LA", "PNG"), (48, 36), True),
        (_encoded("P", "PNG"), (48, 36), True),
        (_encoded("L", "PNG"), (48, 36), False),
        (_encoded("1", "PNG"), (48, 36), False),
        (_encoded("I;16", "PNG"), (48, 36), False),
        (_encoded("CMYK", "JPEG"), (48, 36), False),
        (_encoded("RGBA", "WEBP"), (48, 36), True),
        (_rotated(), (36, 48), False),
    ],
    ids=["RGB", "RGBA", "LA", "P", "L", "1", "I;16", "CMYK", "WebP", "EXIF"],
)
def test_pictures_of_every_mode_go_through(
    engine: Clarity, data: bytes, size: tuple[int, int], transparent: bool
) -> None:
    picture = images.decode(data, 10**6)
    upscaled = _upscale(engine, picture, steps=3)
    assert (upscaled.width, upscaled.height) == size
    assert (upscaled.alpha is not None) == transparent
    assert upscaled.rgb.std() > 1


def test_alpha_is_enlarged_apart_and_has_no_say_in_the_colours(engine: Clarity) -> None:
    opaque = _photo(24, 20)
    alpha = np.tile(np.linspace(0, 255, 24).astype(np.uint8), (20, 1))
    upscaled = _upscale(engine, replace(opaque, alpha=alpha))
    assert np.array_equal(upscaled.rgb, _upscale(engine, opaque).rgb)
    assert upscaled.alpha is not None
    assert np.array_equal(upscaled.alpha, resampling.resample_alpha(alpha, Size(width=48, height=40), lambda: None))


# What the options mean ------------------------------------------------------------------------------------------------


def test_at_strength_0_nothing_is_invented_and_no_network_asked(engine: Clarity) -> None:
    picture = _photo(24, 20)
    with _counted(engine.parts.unet) as asked:
        upscaled = _upscale(engine, picture, strength=0)
    assert asked == []
    assert np.array_equal(upscaled.rgb, resampling.resample(picture, Size(width=48, height=40), lambda: None).rgb)


def test_more_strength_moves_farther_away(engine: Clarity) -> None:
    picture = _photo(40, 40)
    next_to_none = _upscale(engine, picture, strength=0.001)
    changes = [_difference(_upscale(engine, picture, strength=s), next_to_none).mean() for s in (0.2, 0.5, 1.0)]
    assert changes == sorted(changes)


def test_guidance_of_1_halves_what_the_networks_are_asked(engine: Clarity) -> None:
    asked: dict[float, int] = {}
    for scale in (6.0, 1.0, 0.0):
        with _counted(engine.parts.unet) as unet, _counted(engine.parts.controlnet) as controlnet:
            _upscale(engine, _photo(24, 24), guidance_scale=scale)
        assert unet == controlnet
        asked[scale] = sum(unet)
    assert asked[6.0] == 2 * asked[1.0] == 2 * asked[0.0] > 0


def test_without_control_the_control_net_is_not_asked(engine: Clarity) -> None:
    picture = _photo(24, 24)
    with _counted(engine.parts.controlnet) as asked:
        free = _upscale(engine, picture, control_scale=0)
    assert asked == []
    assert _difference(free, _upscale(engine, picture, control_scale=2)).max() > 0


def test_the_prompt_and_the_negative_prompt_have_a_say(engine: Clarity) -> None:
    picture = _photo(24, 24)
    plain = _upscale(engine, picture)
    assert _difference(plain, _upscale(engine, picture, prompt="(fur:1.5)")).max() > 0
    assert _difference(plain, _upscale(engine, picture, negative_prompt="blur")).max() > 0


@pytest.mark.parametrize("sampler", Sampler)
def test_every_sampler_gives_a_picture(engine: Clarity, sampler: Sampler) -> None:
    picture = _photo(16, 16)
    upscaled = _upscale(engine, picture, sampler=sampler, steps=10)
    away = _difference(upscaled, _upscale(engine, picture, strength=0))
    assert 0 < away.mean() < 60


def test_sharpening_comes_last(engine: Clarity) -> None:
    picture = _photo(24, 24)
    soft, sharp = _upscale(engine, picture), _upscale(engine, picture, sharpen=5)
    assert np.diff(sharp.rgb.astype(float), axis=0).std() > 1.2 * np.diff(soft.rgb.astype(float), axis=0).std()


def test_passes_are_jobs_of_their_own_with_less_strength_and_the_next_seed(engine: Clarity) -> None:
    picture = _photo(20, 14)
    at_once = _upscale(engine, picture, scale_factor=4, strength=0.5)
    first = _upscale(engine, picture, scale_factor=2, strength=0.5)
    second = _upscale(engine, first, scale_factor=2, strength=0.4, seed=QUICK.seed + 1)
    assert np.array_equal(at_once.rgb, second.rgb)


def test_the_colours_of_the_original_are_brought_back_unless_told_otherwise(engine: Clarity) -> None:
    picture = _photo(48, 48)
    enlarged = _upscale(engine, picture, strength=0)

    def shift(kind: ColourFix | None) -> float:
        upscaled = _upscale(engine, picture, colour_fix=kind, strength=0.6)
        return float(abs(upscaled.rgb.mean((0, 1)) - enlarged.rgb.mean((0, 1))).max())

    assert shift(ColourFix.WAVELET) == shift(None) < 0.2 * shift(ColourFix.OFF)
    assert shift(ColourFix.ADAIN) < 0.2 * shift(ColourFix.OFF)


# Deployments ----------------------------------------------------------------------------------------------------------


def test_the_compat_preset_takes_the_original_s_numbers(models: Path, engine: Clarity) -> None:
    compat = _load(models, clarity_preset="compat")
    picture, options = _photo(160, 160), QUICK.model_copy(update={"tile_width": 18, "tile_height": 18, "steps": 1})
    with _counted(engine.parts.unet) as quality_tiles, _counted(compat.parts.unet) as compat_tiles:
        _upscale(engine, picture, options)
        upscaled = _upscale(compat, picture, options)
    assert (len(compat_tiles), len(quality_tiles)) == (3 * 3, 4 * 4)
    assert np.array_equal(upscaled.rgb, _upscale(compat, picture, options, colour_fix=ColourFix.OFF).rgb)


class _Doubling:
    """A network that repeats each pixel."""

    scale = 2

    def enlarge(self, rgb: Levels, check: Callable[[], None]) -> Levels:
        check()
        return rgb.repeat(2, axis=0).repeat(2, axis=1)


def test_the_hint_is_the_input_of_the_pass_or_by_setting_the_enlarged_picture(models: Path) -> None:
    by_hint: dict[str, Picture] = {}
    for hint in ("input", "preupscaled"):
        parts = _load(models).parts
        network = cast("Network", _Doubling())
        by_hint[hint] = _upscale(Clarity(parts, network, Config(models_dir=models, clarity_hint=hint)), _photo(24, 24))
    assert _difference(by_hint["input"], by_hint["preupscaled"]).max() > 0


def test_the_size_of_a_batch_does_not_change_the_picture(models: Path, engine: Clarity) -> None:
    picture = _photo(112, 80)
    with _counted(engine.parts.unet) as one_by_one:
        alone = _upscale(engine, picture)
    by_fours = _load(models, clarity_batch=4)
    with _counted(by_fours.parts.unet) as together:
        batched = _upscale(by_fours, picture)
    assert set(one_by_one) == {2}
    assert max(together) > 2
    assert _difference(alone, batched).max() <= 1


@pytest.mark.parametrize(("precision", "levels"), [("fp16", 2), ("bf16", 10)])
def test_half_precision_gives_the_same_picture_but_for_rounding(
    models: Path, engine: Clarity, precision: Literal["fp16", "bf16"], levels: int
) -> None:
    picture = _photo(112, 80)
    difference = _difference(_upscale(_load(models, precision=precision), picture), _upscale(engine, picture))
    assert 0 < difference.max() <= levels
    assert difference.mean() < 1


# Jobs one after the other ---------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_picture_and_another_one_does_not(engine: Clarity) -> None:
    picture = _photo(32, 24)
    first = _upscale(engine, picture)
    assert np.array_equal(first.rgb, _upscale(engine, picture).rgb)
    assert _difference(first, _upscale(engine, picture, seed=8)).max() > 0
    assert _upscale(engine, picture, seed=2**63 - 1).rgb.shape == first.rgb.shape


def test_the_picture_is_the_one_that_it_has_been_so_far(engine: Clarity) -> None:
    """Any change that moves it is meant, and then so is a new file beside this one."""
    with Image.open(Path(__file__).parent / "clarity.png") as file:
        before = np.asarray(file).astype(np.float64)
    noise = np.mean((_upscale(engine, _photo(48, 32), prompt="(fur:1.2), a cat").rgb - before) ** 2)
    assert 10 * np.log10(255**2 / max(noise, 1e-9)) > 40


def test_a_job_leaves_nothing_behind_for_the_next_one(models: Path, engine: Clarity) -> None:
    (models / "loras").mkdir(exist_ok=True)
    weight = engine.parts.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k").weight
    assert isinstance(weight, Tensor)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    ranks = {"lora_up": torch.ones(weight.shape[0], 1), "lora_down": torch.ones(1, weight.shape[1])}
    save_file(
        {f"{name}.{part}.weight": tensor for part, tensor in ranks.items()} | {f"{name}.alpha": torch.tensor(1.0)},
        models / "loras" / "bold.safetensors",
    )
    picture = _photo(24, 24)
    before = _upscale(engine, picture)
    bold = _upscale(engine, picture, prompt="<lora:bold:2>", guidance_scale=3, control_scale=2, sharpen=3, clip_skip=1)
    with pytest.raises(Stopped):
        engine.upscale(picture, QUICK.model_copy(update={"prompt": "<lora:bold:2>"}), lambda _: None, lambda: True)
    assert _difference(before, bold).max() > 0
    assert np.array_equal(_upscale(engine, picture).rgb, before.rgb)


def test_a_lora_that_is_not_installed_fails_the_job_by_its_name(engine: Clarity) -> None:
    with pytest.raises(UnknownLora, match="more_details"):
        _upscale(engine, _photo(8, 8), prompt="a cat <lora:more_details:0.5>")


def test_progress_rises_with_every_step_up_to_1(engine: Clarity) -> None:
    told: list[float] = []
    options = QUICK.model_copy(update={"scale_factor": 4, "steps": 12})
    engine.upscale(_photo(20, 20), options, told.append, lambda: False)
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert len(set(told)) >= 2 * options.evaluations
    assert max(np.diff(told)) < 0.35


def test_progress_is_told_of_passes_that_invent_nothing(engine: Clarity) -> None:
    told: list[float] = []
    options = QUICK.model_copy(update={"scale_factor": 8, "strength": 0})
    engine.upscale(_photo(20, 20), options, told.append, lambda: False)
    assert len(set(told)) == 3
    assert told == sorted(told)


def test_on_a_processor_no_call_of_a_network_is_silent(engine: Clarity) -> None:
    inside: list[bool] = []
    asked = 0

    def count() -> bool:
        nonlocal asked
        asked += any(inside)
        return False

    def enter(*_: object) -> None:
        inside.append(True)

    def leave(*_: object) -> None:
        inside.clear()

    parts = engine.parts
    networks = [parts.unet, parts.controlnet, parts.vae.get_submodule("encoder"), parts.vae.get_submodule("decoder")]
    for network in networks:
        hooks = [network.register_forward_pre_hook(enter), network.register_forward_hook(leave)]
        before = asked
        engine.upscale(_photo(16, 16), QUICK, lambda _: None, count)
        assert asked > before + 10
        for hook in hooks:
            hook.remove()
    before = asked
    inside.append(True)
    parts.unet.get_submodule("conv_in")(torch.zeros(1, 4, 8, 8))
    assert asked == before  # of the jobs nothing is left in the networks


def test_the_pace_is_that_of_the_engines_own_gpu_one_evaluation_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Event:
        """A mark in what a GPU is to do."""

        stream = "the first GPU's"

        def record(self, stream: str = stream) -> None:
            self.stream = stream
            happened.append(f"mark {stream}")

        def synchronize(self) -> None:
            happened.append(f"wait for {self.stream}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", str)
    told: list[float] = []
    denoise = clarity.paced(lambda x, _: x, 4, told.append)
    for _ in range(3):
        denoise(cast("Tensor", SimpleNamespace(is_cuda=True, device="cuda:1")), 1.0)
    assert told == [0.25, 0.5, 0.75]
    assert happened == ["mark cuda:1", *["wait for cuda:1", "mark cuda:1"] * 2]


@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_job_that_is_to_stop_does_so_within_one_step(engine: Clarity, after: int) -> None:
    with _counted(engine.parts.unet) as asked, pytest.raises(Stopped):
        engine.upscale(_photo(96, 96), QUICK, lambda _: None, lambda: len(asked) >= after)
    assert len(asked) == after


def test_when_memory_does_not_do_half_a_batch_is_tried(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, picture = _load(models, clarity_batch=4), _photo(96, 96)
    expected = _upscale(engine, picture)
    sizes: list[int] = []
    holds = 2

    class Small(clarity.TiledDenoiser):
        """A GPU that holds few tiles."""

        def __init__(self, *arguments: Any, batch: int, **named: Any) -> None:
            super().__init__(*arguments, batch=batch, **named)
            sizes.append(batch)
            if batch > holds:
                raise torch.OutOfMemoryError

    monkeypatch.setattr(clarity, "TiledDenoiser", Small)
    assert _difference(_upscale(engine, picture), expected).max() <= 1
    assert sizes == [4, 2]
    holds = 1
    with pytest.raises(OutOfMemory):
        _upscale(engine, picture)
    assert sizes == [4, 2, 4, 2]


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError(),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)."),
    ],
    ids=["cuda", "python", "cpu", "mps"],
)
def test_whoever_keeps_the_error_does_not_keep_what_filled_the_memory(
    engine: Clarity, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    filling: list[weakref.ref[Tensor]] = []

    def fail(denoiser: clarity.TiledDenoiser, x: Tensor, sigma: float) -> Tensor:
        del denoiser, sigma
        filling.append(weakref.ref(x))
        raise failure.with_traceback(None)

    monkeypatch.setattr(clarity.TiledDenoiser, "__call__", fail)
    gc.disable()  # by itself it comes late, and the next job needs the memory at once
    try:
        with pytest.raises(OutOfMemory) as kept:
            _upscale(engine, _photo(16, 16))
        failure.__traceback__ = None  # that of the parameter, which pytest keeps
        assert [one() for one in filling] == [None]
    finally:
        gc.enable()
    assert kept.value.__context__ is None


def test_another_error_of_pytorchs_stays_what_it_is(engine: Clarity, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(clarity.TiledDenoiser, "__call__", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        _upscale(engine, _photo(16, 16))


def test_small_tiles_are_half_as_wide_and_come_one_by_one(models: Path) -> None:
    engine = _load(models, clarity_batch=4)
    shapes: list[torch.Size] = []

    def note(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        shapes.append(arguments[0].shape)

    engine.parts.unet.register_forward_pre_hook(note)
    _upscale(engine, _photo(96, 96), tile_width=24, tile_height=20, small_tiles=True, steps=1)
    assert set(shapes) == {torch.Size([2, 4, 10, 12])}


# Weights --------------------------------------------------------------------------------------------------------------


def test_auto_takes_clarity_where_its_weights_are_installed(models: Path) -> None:
    assert engines.load("auto", Config(models_dir=models, device="cpu")).name == "clarity"


def test_a_pre_upscaler_that_is_not_there_is_refused_by_the_name_of_its_setting(models: Path) -> None:
    with pytest.raises(DeploymentError, match=r"^UPSCALED_SUPERRES_WEIGHTS is gone\.safetensors, and there is no"):
        _load(models, superres_weights="gone.safetensors")


def test_on_request_each_block_of_both_networks_is_compiled_and_else_none(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def note(module: nn.Module, **how: object) -> None:
        assert how == {"dynamic": False}
        compiled.append(type(module).__name__)

    monkeypatch.setattr(nn.Module, "compile", note)
    parts = _load(models).parts
    assert compiled == []
    Clarity(parts, None, Config(models_dir=models, clarity_compile=True))
    blocks = {"BasicTransformerBlock": 16 + 7, "ResnetBlock2D": 22 + 10}
    assert {name: compiled.count(name) for name in set(compiled)} == blocks


def test_a_compiler_that_fails_stops_the_worker_with_the_name_of_the_setting(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def note(*_: object, **__: object) -> None:
        pass

    def fail(*_: object) -> None:
        raise TorchDynamoException("no compiler")

    monkeypatch.setattr(nn.Module, "compile", note)
    monkeypatch.setattr(clarity.Clarity, "upscale", fail)
    with pytest.raises(DeploymentError, match=r"^UPSCALED_CLARITY_COMPILE is set, which fails here: no compiler"):
        _load(models, clarity_compile=True)

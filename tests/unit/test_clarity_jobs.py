"""Jobs of the Clarity engine one after the other: progress, stopping, memory, and nothing left behind."""

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from core.errors import OutOfMemory, Stopped, UnknownLora
from tests.clarity import QUICK, counted, difference, load, photo, upscale
from worker.upscaler.engines import Config, clarity
from worker.upscaler.engines.clarity import Clarity


def test_the_same_seed_gives_the_same_picture_and_another_one_does_not(engine: Clarity) -> None:
    picture = photo(32, 24)
    first = upscale(engine, picture)
    assert np.array_equal(first.rgb, upscale(engine, picture).rgb)
    assert difference(first, upscale(engine, picture, seed=8)).max() > 0
    assert upscale(engine, picture, seed=2**63 - 1).rgb.shape == first.rgb.shape


def test_the_picture_is_the_one_that_it_has_been_so_far(models: Path, engine: Clarity) -> None:
    """Any change that moves it is meant, and then so is a new file beside this one; no network enlarges here."""
    with Image.open(Path(__file__).parent / "clarity.png") as file:
        before = np.asarray(file).astype(np.float64)
    without = Clarity(engine.parts, (), Config(models_dir=models))
    noise = np.mean((upscale(without, photo(48, 32), prompt="(fur:1.2), a cat").rgb - before) ** 2)
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
    picture = photo(24, 24)
    before = upscale(engine, picture)
    bold = upscale(engine, picture, prompt="<lora:bold:2>", guidance_scale=3, control_scale=2, sharpen=3, clip_skip=1)
    with pytest.raises(Stopped):
        list(
            engine.upscale(picture, QUICK.model_copy(update={"prompt": "<lora:bold:2>"}), lambda _: None, lambda: True)
        )
    assert difference(before, bold).max() > 0
    assert np.array_equal(upscale(engine, picture).rgb, before.rgb)


def test_a_lora_that_is_not_installed_fails_the_job_by_its_name(engine: Clarity) -> None:
    with pytest.raises(UnknownLora, match="more_details"):
        upscale(engine, photo(8, 8), prompt="a cat <lora:more_details:0.5>")


def test_progress_rises_with_every_step_up_to_1(engine: Clarity) -> None:
    told: list[float] = []
    options = QUICK.model_copy(update={"scale_factor": 4, "steps": 12})
    list(engine.upscale(photo(20, 20), options, told.append, lambda: False))
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert len(set(told)) >= 2 * options.evaluations
    assert max(np.diff(told)) < 0.35


def test_progress_is_told_of_passes_that_invent_nothing(engine: Clarity) -> None:
    told: list[float] = []
    options = QUICK.model_copy(update={"scale_factor": 8, "strength": 0})
    list(engine.upscale(photo(20, 20), options, told.append, lambda: False))
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
        list(engine.upscale(photo(16, 16), QUICK, lambda _: None, count))
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
    with counted(engine.parts.unet) as asked, pytest.raises(Stopped):
        list(engine.upscale(photo(96, 96), QUICK, lambda _: None, lambda: len(asked) >= after))
    assert len(asked) == after


def test_when_memory_does_not_do_half_a_batch_is_tried(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, picture = load(models, clarity_batch=4), photo(96, 96)
    expected = upscale(engine, picture)
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
    assert difference(upscale(engine, picture), expected).max() <= 1
    assert sizes == [4, 2]
    holds = 1
    with pytest.raises(OutOfMemory):
        upscale(engine, picture)
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
            upscale(engine, photo(16, 16))
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
        upscale(engine, photo(16, 16))


def test_small_tiles_are_half_as_wide_and_come_one_by_one(models: Path) -> None:
    engine = load(models, clarity_batch=4)
    shapes: list[torch.Size] = []

    def note(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        shapes.append(arguments[0].shape)

    engine.parts.unet.register_forward_pre_hook(note)
    upscale(engine, photo(96, 96), tile_width=24, tile_height=20, small_tiles=True, steps=1)
    assert set(shapes) == {torch.Size([2, 4, 10, 12])}

"""What a deployment decides about the Clarity engine."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from core.errors import DeploymentError
from core.options import ColourFix
from tests.clarity import QUICK, counted, difference, load, photo, upscale
from tests.networks import compact
from worker.upscaler import engines
from worker.upscaler.engines import Config, clarity
from worker.upscaler.engines.clarity import Clarity
from worker.upscaler.picture import Levels, Picture
from worker.upscaler.plan import Size, Span
from worker.upscaler.strips import Rows


def test_the_compat_preset_takes_the_original_s_numbers(models: Path, engine: Clarity) -> None:
    compat = load(models, clarity_preset="compat")
    picture, options = photo(160, 160), QUICK.model_copy(update={"tile_width": 18, "tile_height": 18, "steps": 1})
    with counted(engine.parts.unet) as quality_tiles, counted(compat.parts.unet) as compat_tiles:
        upscale(engine, picture, options)
        upscaled = upscale(compat, picture, options)
    assert (len(compat_tiles), len(quality_tiles)) == (3 * 3, 4 * 4)
    assert np.array_equal(upscaled.rgb, upscale(compat, picture, options, colour_fix=ColourFix.OFF).rgb)


class _Doubling:
    """A network that repeats each pixel."""

    scale = 2

    def enlarge(
        self, rows: Rows, check: Callable[[], None], on_progress: Callable[[float], None], *, small: bool = False
    ) -> Iterator[Levels]:
        check()
        yield rows.read(Span(0, rows.size.height)).repeat(2, axis=0).repeat(2, axis=1)

    def peak_bytes(self, width: int, *, small: bool = False) -> int:
        return 0


def test_the_hint_is_the_input_of_the_pass_or_by_setting_the_enlarged_picture(models: Path) -> None:
    by_hint: dict[str, Picture] = {}
    for hint in ("input", "preupscaled"):
        parts = load(models).parts
        engine = Clarity(parts, [_Doubling()], Config(models_dir=models, clarity_hint=hint))
        by_hint[hint] = upscale(engine, photo(24, 24))
    assert difference(by_hint["input"], by_hint["preupscaled"]).max() > 0


def test_the_size_of_a_batch_does_not_change_the_picture(models: Path, engine: Clarity) -> None:
    picture = photo(112, 80)
    with counted(engine.parts.unet) as one_by_one:
        alone = upscale(engine, picture)
    by_fours = load(models, clarity_batch=4)
    with counted(by_fours.parts.unet) as together:
        batched = upscale(by_fours, picture)
    assert set(one_by_one) == {2}
    assert max(together) > 2
    assert difference(alone, batched).max() <= 1


@pytest.mark.parametrize(("precision", "levels"), [("fp16", 2), ("bf16", 10)])
def test_half_precision_gives_the_same_picture_but_for_rounding(
    models: Path, engine: Clarity, precision: Literal["fp16", "bf16"], levels: int
) -> None:
    picture = photo(112, 80)
    away = difference(upscale(load(models, precision=precision), picture), upscale(engine, picture))
    assert 0 < away.max() <= levels
    assert away.mean() < 1


def test_auto_takes_clarity_where_its_weights_are_installed(models: Path) -> None:
    assert engines.load("auto", Config(models_dir=models, device="cpu")).name == "clarity"


def test_a_pre_upscaler_that_is_not_there_is_refused_by_the_name_of_its_setting(models: Path) -> None:
    with pytest.raises(DeploymentError, match=r"^UPSCALED_SUPERRES_WEIGHTS .*: gone\.safetensors does not exist"):
        load(models, superres_weights="gone.safetensors")


def test_a_pre_upscaler_that_is_installed_takes_the_place_of_our_own(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models, tmp_path / "models")
    (folder / "preupscaler").mkdir()
    save_file(compact(2), folder / "preupscaler" / "network.safetensors")
    picture = photo(20, 16)
    upscaled = upscale(load(folder), picture, strength=0)
    assert np.array_equal(upscaled.rgb, picture.rgb.repeat(2, axis=0).repeat(2, axis=1))


def test_memory_is_counted_by_the_input_and_the_output(engine: Clarity) -> None:
    needed = engine.peak_bytes(Size(width=1000, height=500), QUICK.model_copy(update={"scale_factor": 3}), alpha=True)
    assert needed == 1000 * 500 * (4 + 9 * 16)


def test_on_request_each_block_of_both_networks_is_compiled_and_else_none(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def note(module: nn.Module, **how: object) -> None:
        assert how == {"dynamic": False}
        compiled.append(type(module).__name__)

    monkeypatch.setattr(nn.Module, "compile", note)
    parts = load(models).parts
    assert compiled == []
    Clarity(parts, (), Config(models_dir=models, clarity_compile=True))
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
        load(models, clarity_compile=True)

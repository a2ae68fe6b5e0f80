"""The choice of an engine."""

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from core.errors import DeploymentError
from core.options import EngineName, UpscaleOptions
from worker.upscaler import checkpoints, engines
from worker.upscaler.engine import Engine
from worker.upscaler.engines import Config
from worker.upscaler.picture import Picture
from worker.upscaler.plan import Size


class Mirror:
    """A third party's engine."""

    name = "mirror"

    def upscale(
        self,
        picture: Picture,
        options: UpscaleOptions,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> Iterator[Picture]:
        assert options
        assert not should_stop()
        on_progress(1.0)
        yield Picture(np.ascontiguousarray(picture.rgb[:, ::-1]), picture.alpha)

    def peak_bytes(self, size: Size, options: UpscaleOptions, *, alpha: bool) -> int:
        return size.width * size.height * 6


class Demanding(Mirror):
    def __init__(self, weights: str) -> None:
        self.weights = weights


class Nameless:
    pass


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    module = ModuleType("elsewhere")
    vars(module).update(Mirror=Mirror, Demanding=Demanding, Nameless=Nameless, broken=3)
    monkeypatch.setitem(sys.modules, "elsewhere", module)


def test_lanczos_is_loaded_by_its_name_and_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    engine = engines.load("lanczos")
    assert isinstance(engine, Engine)
    assert engine.name == "lanczos"
    assert not caplog.records


def test_superres_is_loaded_by_its_name_and_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    engine = engines.load("superres", Config(device="cpu"))
    assert isinstance(engine, Engine)
    assert engine.name == "superres"
    assert not caplog.records


def test_auto_falls_back_to_superres_with_one_warning_that_says_how_to_get_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert engines.load("auto", Config(models_dir=tmp_path, device="cpu")).name == "superres"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "superres is used" in record.message
    assert "`upscaled models pull`" in record.message


def test_clarity_without_weights_is_refused_with_the_command_that_fetches_them(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match=r"^UPSCALED_ENGINE is clarity, but .* `upscaled models pull` fetches"):
        engines.load("clarity", Config(models_dir=tmp_path))


def test_missing_weights_are_told_before_torch_is_loaded(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from core.errors import DeploymentError
from worker.upscaler import engines
try:
    engines.load("clarity", engines.Config(models_dir=Path(sys.argv[1])))
except DeploymentError:
    assert not {"torch", "diffusers"} & set(sys.modules)
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == "refused\n"


def test_superres_without_torch_is_refused_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "worker.upscaler.engines.superres", raising=False)
    monkeypatch.delattr(engines, "superres", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DeploymentError, match=r"^superres needs what upscaled\[worker\] installs: .*torch"):
        engines.load("superres")


def test_a_job_gets_the_deployment_s_engine_or_the_one_it_names_which_is_made_once() -> None:
    own = engines.load("lanczos")
    chosen = engines.Engines(own, Config(device="cpu"))
    assert chosen.choose(UpscaleOptions()) is own
    named = chosen.choose(UpscaleOptions(engine=EngineName.SUPERRES))
    assert named.name == "superres"
    assert chosen.choose(UpscaleOptions(engine=EngineName.SUPERRES)) is named
    assert engines.Engines(named).choose(UpscaleOptions(engine=EngineName.SUPERRES)) is named


@pytest.mark.parametrize("own", ["lanczos", "elsewhere:Mirror"])
def test_a_network_of_the_operator_s_that_is_wrong_ends_the_start_whatever_the_engine(own: str) -> None:
    with pytest.raises(DeploymentError, match=r"^UPSCALED_SUPERRES_WEIGHTS .*gone\.pth does not exist"):
        engines.Engines(engines.load(own), Config(device="cpu", superres_weights="gone.pth"))


def test_superres_is_not_made_before_a_job_asks_for_it_unless_the_operator_chose_a_network(tmp_path: Path) -> None:
    own = engines.load("lanczos")
    missing = Config(device="cpu", superres_weights=str(tmp_path / "gone.pth"))
    assert engines.Engines(own, Config(device="nowhere")).own is own
    for name in ("clarity", "superres"):
        read_already = Mirror()
        read_already.name = name
        assert engines.Engines(read_already, missing).own is read_already


def test_a_job_whose_engine_cannot_run_reads_no_path_and_the_operator_s_log_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpoints, "OWN_DIR", tmp_path)
    chosen = engines.Engines(engines.load("lanczos"), Config(device="cpu"))
    with pytest.raises(DeploymentError) as refused:
        chosen.choose(UpscaleOptions(engine=EngineName.SUPERRES))
    assert str(refused.value) == "The superres engine cannot run here; the service's log says why."
    (record,) = caplog.records
    assert str(tmp_path / "restore-x2.safetensors") in record.message


def test_an_unknown_choice_is_refused_with_the_choices() -> None:
    with pytest.raises(DeploymentError, match=r"'magic'.* auto, superres, lanczos, clarity and package\.module:Class"):
        engines.load("magic")


def test_a_class_from_elsewhere_is_imported_and_made() -> None:
    engine = engines.load("elsewhere:Mirror")
    picture = Picture(np.arange(6, dtype=np.uint8).reshape(1, 2, 3))
    (mirrored,) = engine.upscale(picture, UpscaleOptions(), lambda _: None, lambda: False)
    assert mirrored.rgb.tolist() == [[[3, 4, 5], [0, 1, 2]]]


@pytest.mark.parametrize(
    "choice",
    [
        "no_such_package:Engine",
        "elsewhere:Missing",
        "elsewhere:Demanding",
        "elsewhere:Nameless",
        "elsewhere:broken",
        "elsewhere:",
        ":Mirror",
        ".relative:Mirror",
        "else where:Mirror",
        "elsewhere:Mirror:twice",
    ],
)
def test_a_class_that_cannot_be_an_engine_is_refused_in_one_sentence_that_names_it(choice: str) -> None:
    with pytest.raises(DeploymentError) as refused:
        engines.load(choice)
    assert str(refused.value).startswith(f"UPSCALED_ENGINE is {choice!r}, which ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("rgb", "alpha"),
    [
        (np.zeros((2, 3), np.uint8), None),
        (np.zeros((2, 3, 4), np.uint8), None),
        (np.zeros((0, 3, 3), np.uint8), None),
        (np.zeros((2, 3, 3), np.float32), None),
        (np.zeros((2, 3, 3), np.uint8), np.zeros((3, 2), np.uint8)),
        (np.zeros((2, 3, 3), np.uint8), np.zeros((2, 3), np.bool_)),
    ],
)
def test_a_picture_refuses_arrays_of_another_shape_or_type(
    rgb: np.typing.NDArray[np.uint8], alpha: np.typing.NDArray[np.uint8] | None
) -> None:
    with pytest.raises(ValueError, match="must be uint8 of shape"):
        Picture(rgb, alpha)


def test_a_picture_knows_its_width_and_height() -> None:
    picture = Picture(np.zeros((2, 5, 3), np.uint8), np.zeros((2, 5), np.uint8))
    assert (picture.width, picture.height) == (5, 2)

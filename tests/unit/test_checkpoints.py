"""Checkpoints: real architectures through the real loader, pickles that run nothing, no trace of torchvision."""

import importlib
import importlib.util
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from transformers.utils.import_utils import is_torchvision_available

from core.errors import DeploymentError
from tests.networks import ARCHITECTURES, Weights, architecture, compact, rrdb, save_own
from worker.upscaler import checkpoints
from worker.upscaler.compact import Compact
from worker.upscaler.picture import Levels
from worker.upscaler.plan import Size
from worker.upscaler.strips import Rows
from worker.upscaler.superres import Network
from worker.upscaler.tiles import Tiled

CPU = torch.device("cpu")

SHIPPED = Path(checkpoints.__file__).with_name("networks")

Load = Callable[..., Network]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Save weights as a checkpoint, and load it."""

    def load(weights: Weights, precision: checkpoints.Precision = "auto") -> Network:
        save_file(weights, tmp_path / "network.safetensors")
        return checkpoints.load(tmp_path / "network.safetensors", CPU, precision)

    return load


def _noise(width: int, height: int) -> Levels:
    return np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _enlarged(network: Network, rgb: Levels) -> Levels:
    rows = Rows([rgb], Size(width=rgb.shape[1], height=rgb.shape[0]))
    return np.concatenate(list(network.enlarge(rows, lambda: None, lambda _: None)))


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # of spandrel's copies of the authors' code
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_published_architectures_are_recognised_and_enlarge(load: Load, name: str) -> None:
    network = load(architecture(name), "bf16")
    assert isinstance(network, Tiled)
    assert (network.scale, network.mixed) == (2, True)
    assert _enlarged(network, _noise(70, 9)).shape == (18, 140, 3)


@pytest.mark.parametrize(("weights", "scale"), [(rrdb(4), 4), (rrdb(2, unshuffle=2), 2)])
def test_a_real_esrgan_enlarges_with_and_without_taking_pixels_together(
    load: Load, weights: Weights, scale: int
) -> None:
    network = load(weights)
    assert network.scale == scale
    output = _enlarged(network, _noise(33, 9))
    assert output.shape == (9 * scale, 33 * scale, 3)
    assert output.std() > 10


def test_weights_of_half_precision_are_read(load: Load) -> None:
    halves = {name: values.half() for name, values in compact(2, random=True).items()}
    wholes = {name: values.float() for name, values in halves.items()}
    rgb = _noise(20, 20)
    assert np.array_equal(_enlarged(load(halves), rgb), _enlarged(load(wholes), rgb))


def test_a_restoring_network_of_scale_1_is_taken(load: Load) -> None:
    network, rgb = load(compact(1)), _noise(9, 7)
    assert network.scale == 1
    assert np.array_equal(_enlarged(network, rgb), rgb)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pth_file_is_read(tmp_path: Path, wrapped: bool) -> None:
    weights = compact(2, random=True)
    torch.save({"params_ema": weights} if wrapped else weights, tmp_path / "network.pth")
    save_file(weights, tmp_path / "network.safetensors")
    of_pickle, of_tensors = (checkpoints.load(tmp_path / f"network.{kind}", CPU) for kind in ("pth", "safetensors"))
    rgb = _noise(20, 20)
    assert np.array_equal(_enlarged(of_pickle, rgb), _enlarged(of_tensors, rgb))


class _Malicious:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (os.environ["TEST_TRAP"],)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_pth_file_that_would_run_code_is_refused_in_a_sentence_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    monkeypatch.setenv("TEST_TRAP", str(tmp_path / "sprung"))
    held = {**compact(2), "more": _Malicious()}
    torch.save(held, tmp_path / "network.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(DeploymentError, match=r"network\.pth holds more than tensors") as refused:
        checkpoints.load(tmp_path / "network.pth", CPU)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.filterwarnings("ignore")  # PyTorch announces the end of TorchScript
def test_a_pth_file_with_a_program_is_refused(tmp_path: Path) -> None:
    jit: Any = torch.jit
    jit.save(jit.script(torch.nn.PReLU()), tmp_path / "network.pth")
    with pytest.raises(DeploymentError, match=r"network\.pth holds a program \(TorchScript\)"):
        checkpoints.load(tmp_path / "network.pth", CPU)


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ({"something": torch.zeros(3)}, "is of no architecture that spandrel knows"),
        (compact(2) | {"body.2.weight": torch.zeros(5, 6, 3, 3)}, "is damaged: its tensors do not make a network"),
        (compact(2) | {"body.2.bias": torch.full((6,), torch.nan)}, r"is damaged: body\.2\.bias holds values that"),
        (compact(2) | {"body.2.bias": torch.full((6,), -torch.inf)}, r"is damaged: body\.2\.bias holds values that"),
        (compact(2, channels=1), "channels are 1 to 1"),
        (compact(2, channels=4), "channels are 4 to 4"),
    ],
    ids=["unknown", "misshapen", "no numbers", "infinite", "grey", "with alpha"],
)
def test_a_file_with_something_else_is_refused_by_name(load: Load, weights: Weights, complaint: str) -> None:
    with pytest.raises(DeploymentError, match=rf"network\.safetensors .*{complaint}"):
        load(weights)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("text.pth", b"no tensors" * 10, "is no checkpoint: it does not begin as a .pth file does."),
        ("page.safetensors", b"<!DOCTYPE html>", "is no checkpoint: it does not begin as a .safetensors file does."),
        ("number.pth", pickle.dumps(3, protocol=2), "is no checkpoint: it does not begin as a .pth file does."),
        ("short.safetensors", b"\x40" + bytes(7) + b'{"body', "is damaged or incomplete."),
        ("empty.pth", b"", "is empty."),
        ("empty.safetensors", b"", "is empty."),
        ("network.onnx", b"", "is neither a .safetensors nor a .pth file."),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_in_one_sentence_that_says_why(
    tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DeploymentError) as refused:
        checkpoints.load(tmp_path / name, CPU)
    assert str(refused.value) == f"{tmp_path / name} {complaint}"


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kept", [12, 2000])
def test_a_pth_file_that_was_cut_short_is_refused_as_incomplete(tmp_path: Path, zipped: bool, kept: int) -> None:
    path = tmp_path / "network.pth"
    torch.save(compact(2), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DeploymentError, match=r"network\.pth is damaged or incomplete\.$"):
        checkpoints.load(path, CPU)


@pytest.mark.parametrize("held", [3, torch.zeros(3), {0: torch.zeros(3)}], ids=["a number", "a tensor", "no names"])
def test_a_pth_file_without_named_tensors_is_refused(tmp_path: Path, held: object) -> None:
    torch.save(held, tmp_path / "network.pth")
    with pytest.raises(DeploymentError, match=r"network\.pth holds no dictionary of tensors\.$"):
        checkpoints.load(tmp_path / "network.pth", CPU)


def test_what_is_no_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(DeploymentError, match=r"folder\.pth is a folder, not a file\.$"):
        checkpoints.load(tmp_path / "folder.pth", CPU)
    with pytest.raises(DeploymentError, match=r"missing\.pth does not exist\.$"):
        checkpoints.load(tmp_path / "missing.pth", CPU)


def test_a_file_that_may_not_be_read_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "network.pth").touch()
    monkeypatch.setattr(Path, "open", refuse)  # whoever runs the tests may be root, who may read all
    with pytest.raises(DeploymentError, match=r"network\.pth cannot be read: Permission denied\.$"):
        checkpoints.load(tmp_path / "network.pth", CPU)


@pytest.mark.parametrize("name", ["NETWORK.PTH", "network.SafeTensors"])
def test_the_kind_of_a_file_may_be_written_in_capitals(tmp_path: Path, name: str) -> None:
    weights = compact(2)
    if name.endswith("PTH"):
        torch.save(weights, tmp_path / name)
    else:
        save_file(weights, tmp_path / name)
    assert checkpoints.load(tmp_path / name, CPU).scale == 2


# Precision ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("computes", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_processor_takes_bfloat16_where_it_computes_with_it(
    load: Load, monkeypatch: pytest.MonkeyPatch, computes: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": computes})
    network = load(compact(2))
    assert isinstance(network, Compact)
    assert network.dtype is dtype


def test_in_bfloat16_other_networks_multiply_only(load: Load) -> None:
    rgb = _noise(30, 30)
    exact, mixed = (load(architecture("RCAN"), precision) for precision in ("fp32", "bf16"))
    assert isinstance(mixed, Tiled)
    assert mixed.dtype is torch.float32
    away = np.abs(_enlarged(exact, rgb).astype(int) - _enlarged(mixed, rgb))
    assert 0 < away.max() < 16


@pytest.mark.parametrize(
    ("precision", "half", "bfloat16", "computes", "expected"),
    [
        ("fp32", True, True, True, torch.float32),
        ("fp16", True, True, True, torch.float16),
        ("fp16", False, True, True, torch.float32),
        ("bf16", True, True, True, torch.bfloat16),
        ("bf16", True, False, True, torch.float32),
        ("auto", True, True, True, torch.float16),
        ("auto", False, True, True, torch.bfloat16),
        ("auto", False, True, False, torch.float32),
        ("auto", False, False, True, torch.float32),
    ],
)
def test_half_precision_is_taken_only_where_network_and_gpu_have_it(
    monkeypatch: pytest.MonkeyPatch,
    precision: checkpoints.Precision,
    half: bool,
    bfloat16: bool,
    computes: bool,
    expected: torch.dtype,
) -> None:
    def supported(*, including_emulation: bool = True) -> bool:
        return computes or including_emulation

    monkeypatch.setattr("torch.cuda.is_bf16_supported", supported)
    choose = checkpoints._precision  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    assert choose(torch.device("cuda"), precision, half=half, bfloat16=bfloat16) is expected


# Our own --------------------------------------------------------------------------------------------------------------


def test_our_own_networks_need_no_spandrel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_own(tmp_path)
    monkeypatch.setattr(checkpoints, "OWN_DIR", tmp_path)
    monkeypatch.setitem(sys.modules, "spandrel", None)
    rgb = _noise(9, 7)
    networks = checkpoints.load_own("fidelity", CPU)
    assert [network.scale for network in networks] == [2, 4]
    for network in networks:
        assert np.array_equal(_enlarged(network, rgb), rgb.repeat(network.scale, 0).repeat(network.scale, 1))


def test_a_network_of_our_own_that_is_missing_or_damaged_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_own(tmp_path)
    monkeypatch.setattr(checkpoints, "OWN_DIR", tmp_path)
    (tmp_path / "restore-x4.safetensors").unlink()
    with pytest.raises(DeploymentError, match=r"belongs to this installation .*restore-x4\.safetensors does not exist"):
        checkpoints.load_own("restore", CPU)
    unfit = {"something": torch.zeros(3)}, compact(2) | {"body.0.bias": torch.full((6,), torch.nan)}
    for weights in unfit:
        save_file(weights, tmp_path / "fidelity-x2.safetensors")
        with pytest.raises(DeploymentError, match=r"belongs to this .*fidelity-x2\.safetensors is damaged: "):
            checkpoints.load_own("fidelity", CPU)


@pytest.mark.parametrize("variant", ["fidelity", "restore"])
def test_the_networks_that_are_shipped_are_read_and_keep_what_is_flat(variant: checkpoints.Variant) -> None:
    for scale in checkpoints.OWN_SCALES:
        network = checkpoints.load(SHIPPED / f"{variant}-x{scale}.safetensors", CPU)
        assert isinstance(network, Compact)
        assert network.scale == scale
        output = _enlarged(network, np.full((24, 24, 3), 90, np.uint8))
        assert np.abs(output[12 * scale, 12 * scale].astype(int) - 90).max() <= 3


# torchvision ----------------------------------------------------------------------------------------------------------


def test_no_trace_of_torchvision_is_left_behind(load: Load) -> None:
    load(compact(2))
    assert "spandrel" in sys.modules
    assert [name for name in sys.modules if name.partition(".")[0] == "torchvision"] == []
    assert importlib.util.find_spec("torchvision") is None
    assert not is_torchvision_available()


_ASKING = """
import torchvision
from torchvision.transforms.functional import InterpolationMode, normalize, rotate
raise ImportError(f"{normalize} saw {getattr(torchvision, '__file__', 'a stand-in')}")
"""


def _put_spandrel(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let another module be found under the name of spandrel."""
    (folder / "spandrel.py").write_text(code)
    monkeypatch.delitem(sys.modules, "spandrel", raising=False)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    importlib.invalidate_caches()


def test_the_stand_in_for_torchvision_goes_even_when_the_import_fails(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put_spandrel(_ASKING, tmp_path, monkeypatch)
    with pytest.raises(DeploymentError, match="saw a stand-in"):
        load(compact(2))
    assert "torchvision" not in sys.modules


def test_a_torchvision_that_is_installed_is_used(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transforms = tmp_path / "torchvision" / "transforms"
    transforms.mkdir(parents=True)
    (tmp_path / "torchvision" / "__init__.py").touch()
    (transforms / "__init__.py").touch()
    (transforms / "functional.py").write_text("InterpolationMode = normalize = rotate = 'the real one'")
    _put_spandrel(_ASKING, tmp_path, monkeypatch)
    try:
        with pytest.raises(DeploymentError, match=r"the real one saw .*__init__\.py"):
            load(compact(2))
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


def test_without_spandrel_the_command_that_installs_it_is_named(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(DeploymentError, match="`pip install --no-deps spandrel`"):
        load(compact(2))

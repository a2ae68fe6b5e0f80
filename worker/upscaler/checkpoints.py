"""Super-resolution networks as files: our own, and any checkpoint that spandrel knows."""

import importlib
import importlib.util
import pickle
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, NoReturn, Protocol, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import nn

from core.errors import DeploymentError
from worker.upscaler.compact import Compact
from worker.upscaler.superres import Network
from worker.upscaler.tiles import Model, Tiled

OWN_DIR = Path(__file__).with_name("networks")
"""Where our own networks lie."""

OWN_SCALES = (2, 4)

Variant = Literal["fidelity", "restore"]

Precision = Literal["auto", "bf16", "fp16", "fp32"]

_CHANNELS = (3, 3)

_DAMAGED = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError),
    *(EOFError, SafetensorError, pickle.UnpicklingError),
)
"""What damaged files raise: each format and each architecture has errors of its own."""

_BEGINNINGS = {
    ".safetensors": (slice(8, 9), (b"{",)),
    ".pth": (slice(0, 4), (b"PK\x03\x04", b"\x80\x02\x8a\x0a")),
}
"""Of each kind of file the place by which it is known, and what stands there: for a .pth the new form and the old."""


class _Architecture(Protocol):
    id: str


class _Checkpoint(Model, Protocol):
    """The part of spandrel's ImageModelDescriptor that is used here."""

    architecture: _Architecture
    purpose: str
    input_channels: int
    output_channels: int
    supports_half: bool
    supports_bfloat16: bool
    model: nn.Module

    def to(self, device: torch.device, dtype: torch.dtype) -> object: ...

    def eval(self) -> object: ...


def load_own(variant: Variant, device: torch.device, precision: Precision = "auto") -> tuple[Network, ...]:
    """Read the networks of a variant, one for each of `OWN_SCALES`; this needs no spandrel.

    Raises:
        DeploymentError: a file is missing or damaged.
    """
    dtype = _precision(device, precision, half=True, bfloat16=True)
    try:
        return tuple(_load_own(own_weights(variant, scale), device, dtype) for scale in OWN_SCALES)
    except DeploymentError as error:
        raise DeploymentError(f"A network that belongs to this installation cannot be used: {error}") from error


def own_weights(variant: Variant, scale: int) -> Path:
    """Return the file of one of our own networks."""
    return OWN_DIR / f"{variant}-x{scale}.safetensors"


def _load_own(path: Path, device: torch.device, dtype: torch.dtype) -> Network:
    weights = _finite(_read(path), path)
    try:
        return Compact(weights, device, dtype)
    except _DAMAGED as error:
        raise _is_no_network(path) from error


def load(path: Path, device: torch.device, precision: Precision = "auto") -> Network:
    """Read a network from a .safetensors or .pth file of any architecture that spandrel knows.

    It runs in half precision only where spandrel declares that it may. By default that is on CUDA, in float16 rather
    than bfloat16, whose 8 bits are too few for smooth skies; and in bfloat16 on processors that compute with it.

    Raises:
        DeploymentError: spandrel is not installed, or the file is missing, damaged, or holds something else.
    """
    found = _read(path)
    spandrel = import_spandrel()
    try:
        state = _finite(spandrel.canonicalize_state_dict(found), path)
        loaded = spandrel.ModelLoader(torch.device("cpu")).load_from_state_dict(state)
    except spandrel.UnsupportedModelError as error:
        raise DeploymentError(f"{path} is of no architecture that spandrel knows.") from error
    except _DAMAGED as error:
        raise _is_no_network(path) from error
    checkpoint = cast("_Checkpoint", loaded)
    channels = (checkpoint.input_channels, checkpoint.output_channels)
    if checkpoint.purpose not in ("SR", "Restoration") or channels != _CHANNELS:
        raise DeploymentError(
            f"{path} is no network for RGB pictures: its purpose is {checkpoint.purpose}, its channels are "
            f"{channels[0]} to {channels[1]}."
        )
    dtype = _precision(device, precision, half=checkpoint.supports_half, bfloat16=checkpoint.supports_bfloat16)
    if checkpoint.architecture.id == "Compact":
        return Compact(checkpoint.model.state_dict(), device, dtype)
    checkpoint.model.requires_grad_(requires_grad=False)
    # Not all of bfloat16: some architectures that declare it make masks of float32 as they run, which would not fit.
    mixed = dtype is torch.bfloat16
    checkpoint.to(device, torch.float32 if mixed else dtype)
    checkpoint.eval()
    return Tiled(checkpoint, mixed=mixed)


def _read(path: Path) -> Mapping[str, Any]:
    """Read the tensors of a file. A .pth file is a pickle, which could run code: only tensors are taken from it.

    Raises:
        DeploymentError: there is no such file, or it is damaged, or no checkpoint.
    """
    _require_checkpoint(path)
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        # Not spandrel's own way of reading: it would hand a TorchScript archive to the compiler. This refuses one.
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # PyTorch recommends at length to run its code
        raise DeploymentError(f"{path} holds more than tensors, or is damaged.") from error
    except _DAMAGED as error:
        if "TorchScript" in str(error):
            raise DeploymentError(f"{path} holds a program (TorchScript), not only tensors.") from error
        raise DeploymentError(f"{path} is damaged or incomplete.") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in cast("dict[Any, Any]", found)):
        raise DeploymentError(f"{path} holds no dictionary of tensors.")
    return cast("dict[str, Any]", found)


def _require_checkpoint(path: Path) -> None:
    """Refuse what is no checkpoint by its name and its first bytes.

    Raises:
        DeploymentError: it is none, or cannot be read.
    """
    kind = path.suffix.lower()
    try:
        if path.is_dir():
            raise DeploymentError(f"{path} is a folder, not a file.")
        if not path.is_file():
            raise DeploymentError(f"{path} does not exist.")
        if kind not in _BEGINNINGS:
            raise DeploymentError(f"{path} is neither a .safetensors nor a .pth file.")
        with path.open("rb") as file:
            beginning = file.read(16)
    except OSError as error:
        raise DeploymentError(f"{path} cannot be read: {error.strerror}.") from error
    place, expected = _BEGINNINGS[kind]
    if not beginning:
        raise DeploymentError(f"{path} is empty.")
    if beginning[place] not in expected:
        raise DeploymentError(f"{path} is no checkpoint: it does not begin as a {kind} file does.")


def _is_no_network(path: Path) -> DeploymentError:
    return DeploymentError(f"{path} is damaged: its tensors do not make a network.")


def _finite(state: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Refuse weights of which a picture would become black, or white.

    Raises:
        DeploymentError: one is infinite or no number.
    """
    for name, values in state.items():
        if isinstance(values, torch.Tensor) and values.is_floating_point() and not bool(values.isfinite().all()):
            raise DeploymentError(f"{path} is damaged: {name} holds values that are infinite or no numbers.")
    return state


def _precision(device: torch.device, precision: Precision, *, half: bool, bfloat16: bool) -> torch.dtype:
    """Choose what a network runs in that declares whether it can in float16 and in bfloat16."""
    if precision == "auto":
        precision = "bf16" if _computes_bfloat16(device) else "fp32"
        if device.type == "cuda" and half:
            precision = "fp16"
    if precision == "fp16" and half:
        return torch.float16
    return torch.bfloat16 if precision == "bf16" and bfloat16 else torch.float32


def _computes_bfloat16(device: torch.device) -> bool:
    """Tell whether a device multiplies in bfloat16; others would only imitate it, slower than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def import_spandrel() -> Any:
    """Import spandrel, in the absence of torchvision, too.

    Raises:
        DeploymentError: it cannot be imported.
    """
    try:
        with torchvision_stood_in(_OF_TORCHVISION):
            return importlib.import_module("spandrel")
    except ImportError as error:
        raise DeploymentError(
            f"spandrel, which reads super-resolution networks, cannot be imported ({error}): "
            "`pip install --no-deps spandrel`."
        ) from error


@contextmanager
def torchvision_stood_in(modules: Mapping[str, Mapping[str, object]]) -> Generator[None]:
    """Put modules with these names and contents where torchvision is missing, for as long as this lasts.

    One that stayed would make transformers and diffusers believe that torchvision is there.
    """
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    for name, contents in modules.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(contents)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def _missing(*_: object, **__: object) -> NoReturn:
    raise NotImplementedError("This needs torchvision.")


_OF_TORCHVISION: Mapping[str, Mapping[str, object]] = {
    "torchvision": {},
    "torchvision.transforms": {},
    "torchvision.transforms.functional": {
        "rotate": _missing,
        "normalize": _missing,
        "InterpolationMode": SimpleNamespace(),
    },
}
"""What spandrel imports, for two architectures that do not enlarge (LaMa, RestoreFormer)."""

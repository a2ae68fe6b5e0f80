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
"""What files raise that are damaged or of no kind that spandrel knows: each architecture has errors of its own."""


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
    return tuple(_load_own(own_weights(variant, scale), device, dtype) for scale in OWN_SCALES)


def own_weights(variant: Variant, scale: int) -> Path:
    """Return the file of one of our own networks."""
    return OWN_DIR / f"{variant}-x{scale}.safetensors"


def _load_own(path: Path, device: torch.device, dtype: torch.dtype) -> Network:
    if not path.is_file():
        raise DeploymentError(f"{path} is missing, which belongs to this installation.")
    try:
        return Compact(load_file(path), device, dtype)
    except _DAMAGED as error:
        raise DeploymentError(f"{path}, which belongs to this installation, is damaged: {_reason(error)}") from error


def load(path: Path, device: torch.device, precision: Precision = "auto") -> Network:
    """Read a network from a .safetensors or .pth file of any architecture that spandrel knows.

    It runs in half precision only where spandrel declares that it may. By default that is on CUDA, in float16 rather
    than bfloat16, whose 8 bits are too few for smooth skies; and in bfloat16 on processors that compute with it.

    Raises:
        DeploymentError: spandrel is not installed, or the file is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise DeploymentError(f"There is no file {path}.")
    spandrel = import_spandrel()
    try:
        state = spandrel.canonicalize_state_dict(_read(path))
        loaded = spandrel.ModelLoader(torch.device("cpu")).load_from_state_dict(state)
    except (spandrel.UnsupportedModelError, *_DAMAGED) as error:
        raise DeploymentError(f"{path} is damaged, or no network that spandrel knows: {_reason(error)}") from error
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
    """Read the tensors of a file. A .pth file is a pickle, which could run code: only tensors are taken from it."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix != ".pth":
        raise ValueError("it is neither a .safetensors nor a .pth file")
    # Not spandrel's own way of reading: it would hand a TorchScript archive to the compiler. This refuses one.
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        raise TypeError("it holds no dictionary of tensors")
    return cast("dict[str, Any]", found)


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors, or no pickle at all."  # PyTorch recommends at length to run its code
    return str(error).partition("\n")[0].strip() or type(error).__name__  # PyTorch adds a line for each weight


def _precision(device: torch.device, precision: Precision, *, half: bool, bfloat16: bool) -> torch.dtype:
    """Choose what a network runs in that declares whether it can in float16 and in bfloat16."""
    if precision == "auto":
        precision = "fp32"
        if device.type == "cuda":
            precision = "fp16" if half else "bf16"
        elif device.type == "cpu" and _computes_bfloat16():
            precision = "bf16"
    if precision == "fp16" and half:
        return torch.float16
    return torch.bfloat16 if precision == "bf16" and bfloat16 else torch.float32


def _computes_bfloat16() -> bool:
    """Tell whether this processor multiplies in bfloat16; others would only imitate it, slower than in float32."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def import_spandrel() -> Any:
    """Import spandrel, in the absence of torchvision, too.

    Raises:
        DeploymentError: it cannot be imported.
    """
    try:
        with _torchvision_stood_in():
            return importlib.import_module("spandrel")
    except ImportError as error:
        raise DeploymentError(
            f"spandrel, which reads super-resolution networks, cannot be imported ({error}): "
            "`pip install --no-deps spandrel`."
        ) from error


@contextmanager
def _torchvision_stood_in() -> Generator[None]:
    """Put a stand-in where torchvision is missing, for as long as this lasts.

    spandrel imports three of its names, for two architectures that do not enlarge (LaMa, RestoreFormer). A stand-in
    that stayed would make transformers and diffusers believe that torchvision is there.
    """
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    functions = ModuleType("torchvision.transforms.functional")
    vars(functions).update(rotate=_missing, normalize=_missing, InterpolationMode=SimpleNamespace())
    modules = {name: ModuleType(name) for name in ("torchvision", "torchvision.transforms")}
    modules[functions.__name__] = functions
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def _missing(*_: object, **__: object) -> NoReturn:
    raise NotImplementedError("This needs torchvision.")

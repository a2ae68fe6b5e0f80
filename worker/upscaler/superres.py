"""Super-resolution networks: any checkpoint that spandrel knows, run tile by tile, and pictures brought to a size."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from math import ceil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn, Protocol, cast

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from core.errors import DeploymentError, OutOfMemory
from worker.upscaler.picture import Levels, Picture
from worker.upscaler.plan import Size, tiling
from worker.upscaler.resampling import resample

TILE_PIXELS = 256
"""Side of a tile of the input, rounded up to what a network asks for."""

OVERLAP_PIXELS = 32
"""What neighbouring tiles have in common at least."""

MAX_RUNS = 3
"""How often a network is run on its own output: three times 2× is the largest scale factor."""

_DAMAGED = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What spandrel raises, architecture by architecture, for files that are damaged or of no kind that it knows."""


class _SizeRequirements(Protocol):
    minimum: int
    multiple_of: int


class _Model(Protocol):
    """The part of spandrel's ImageModelDescriptor that is used here."""

    purpose: str
    scale: int
    input_channels: int
    output_channels: int
    supports_half: bool
    supports_bfloat16: bool
    size_requirements: _SizeRequirements
    device: torch.device
    dtype: torch.dtype

    def to(self, device: torch.device, dtype: torch.dtype) -> object: ...

    def eval(self) -> object: ...

    def __call__(self, image: Tensor) -> Tensor: ...


def enlarge(rgb: Levels, size: Size, network: "Network | None", check: Callable[[], None]) -> Levels:
    """Enlarge a picture of shape (height, width, 3) to exactly `size`, no side of which is less than the picture's.

    Without a network by Lanczos. A network is run as often as it takes, `MAX_RUNS` times at most. What is too large
    for that is brought down by Pillow's Lanczos: before a further run to what this one needs, and at the end to
    `size`; as it is, not in linear light, for so were made the small pictures that such networks learn from. A
    picture that has its size is returned as it is.

    Raises:
        OutOfMemory: the output does not fit.
    """
    if network is None:
        return resample(Picture(rgb), size, check).rgb
    with suppress(MemoryError, torch.OutOfMemoryError):
        return _run_to(rgb, size, network, check)
    # Not while that is handled: whoever keeps this error would keep that one, and with it what filled the memory.
    raise OutOfMemory(f"There is not enough memory for {size.width} x {size.height} pixels.")


def _run_to(rgb: Levels, size: Size, network: "Network", check: Callable[[], None]) -> Levels:
    height, width = rgb.shape[:2]
    scale = network.scale
    enough = Size(width=max(width, ceil(size.width / scale)), height=max(height, ceil(size.height / scale)))
    for _ in range(MAX_RUNS):
        height, width = rgb.shape[:2]
        if width >= size.width and height >= size.height:
            break
        needed = Size(width=min(width, enough.width), height=min(height, enough.height))
        rgb = network.enlarge(_fitted(rgb, needed), check)
    return _fitted(rgb, size)


def _fitted(rgb: Levels, size: Size) -> Levels:
    height, width = rgb.shape[:2]
    if size == (width, height):
        return rgb
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.LANCZOS))


class Network:
    """A network that enlarges pictures of any size by a whole factor."""

    def __init__(self, model: _Model) -> None:
        self.scale = model.scale
        self._model = model
        required = model.size_requirements
        self._side = ceil(max(TILE_PIXELS, required.minimum) / required.multiple_of) * required.multiple_of

    def enlarge(self, rgb: Levels, check: Callable[[], None]) -> Levels:
        """Enlarge a picture of shape (height, width, 3) by `scale`.

        All tiles have one size; a picture that is smaller is mirrored at its right and its lower edge. `check` is
        called before each tile. Takes memory for input, output and one row of tiles.
        """
        height, width = rgb.shape[:2]
        side, scale, device = self._side, self.scale, self._model.device
        padded = np.pad(rgb, [(0, max(side - height, 0)), (0, max(side - width, 0)), (0, 0)], "reflect")
        source = torch.from_numpy(padded).to(device).permute(2, 0, 1)  # pyright: ignore[reportUnknownMemberType]
        area = Size(width=source.shape[2], height=source.shape[1])
        tiles = tiling(area, Size(width=side, height=side), OVERLAP_PIXELS, feathered=True)
        column_weights = [self._spread(weights) for weights in tiles.column_weights]
        output = np.empty((height * scale, width * scale, 3), np.uint8)
        strip = torch.zeros(3, side * scale, area.width * scale, device=device)
        ends = [*(row.start for row in tiles.rows[1:]), area.height]
        for row, weights, end in zip(tiles.rows, tiles.row_weights, ends, strict=True):
            row_weights = self._spread(weights)[:, None]
            for column, across in zip(tiles.columns, column_weights, strict=True):
                check()
                tile = self._run(source[:, slice(*row), slice(*column)])
                strip[:, :, column.start * scale : column.stop * scale] += tile * row_weights * across
            # Where the next row begins, this one and those before are finished.
            ready = (end - row.start) * scale
            _put(strip[:, :ready], output[row.start * scale : end * scale])
            strip = torch.cat([strip[:, ready:], torch.zeros_like(strip[:, :ready])], dim=1)
        return output

    def _run(self, levels: Tensor) -> Tensor:
        """Enlarge one tile: (3, height, width) from 0 to 255, to floats from 0 to 1."""
        return self._model((levels[None].float() / 255).to(self._model.dtype))[0].float()

    def _spread(self, weights: tuple[float, ...]) -> Tensor:
        """Give each pixel of the output the weight of the input's it comes from."""
        return torch.tensor(weights, device=self._model.device).repeat_interleave(self.scale)


def _put(planes: Tensor, output: Levels) -> None:
    """Round planes of 0 to 1 to levels; what `output` has no room for is padding."""
    height, width = output.shape[:2]
    levels = (planes[:, :height, :width] * 255).round().to(torch.uint8)
    output[:] = levels.permute(1, 2, 0).cpu().numpy()


def load(path: Path, device: torch.device) -> Network:
    """Read a network from a .safetensors file of any super-resolution architecture that spandrel knows.

    On CUDA it runs in half precision where spandrel declares that it may, in float16 rather than bfloat16, whose 8
    bits are too few for smooth skies.

    Raises:
        DeploymentError: spandrel is not installed, or the file is missing, damaged, or holds something else.
    """
    # Other formats are pickles, which can run code.
    if path.suffix != ".safetensors" or not path.is_file():
        raise DeploymentError(f"{path} is no .safetensors file.")
    spandrel = _import_spandrel()

    try:
        loaded = spandrel.ModelLoader(torch.device("cpu")).load_from_file(path)
    except (SafetensorError, spandrel.UnsupportedModelError, *_DAMAGED) as error:
        reason = str(error).partition("\n")[0].strip() or type(error).__name__  # PyTorch adds a line for each weight
        raise DeploymentError(f"{path} is damaged, or no network that spandrel knows: {reason}") from error
    model = cast("_Model", loaded)
    channels = (model.input_channels, model.output_channels)
    if model.purpose != "SR" or model.scale < 2 or channels != (3, 3):
        raise DeploymentError(
            f"{path} is no network that enlarges RGB pictures: its purpose is {model.purpose}, its scale "
            f"{model.scale}, its channels are {channels[0]} to {channels[1]}."
        )
    model.to(device, _precision(model, device))
    model.eval()
    return Network(model)


def _precision(model: _Model, device: torch.device) -> torch.dtype:
    if device.type == "cuda" and model.supports_half:
        return torch.float16
    if device.type == "cuda" and model.supports_bfloat16:
        return torch.bfloat16
    return torch.float32


def _import_spandrel() -> Any:
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

"""The networks that Clarity consists of, read from the folders that they were installed in; never from a hub."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from accelerate import init_empty_weights  # pyright: ignore[reportMissingTypeStubs]
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from core.errors import DeploymentError
from worker.upscaler import weights
from worker.upscaler.devices import choose_device
from worker.upscaler.tiled import split_hint_encoder

_ORIGINAL_TEXT_ENCODER = "cond_stage_model.transformer."
"""What the text encoder's weights are called by in a checkpoint that is one file."""

_INCOMPLETE = "weights are missing from it."


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """Stable Diffusion 1.5 and its tile ControlNet: on one device, in evaluation mode, without gradients."""

    unet: UNet2DConditionModel
    controlnet: ControlNetModel
    """Wants the features that `hint_encoder` makes, where it wanted a picture."""
    hint_encoder: nn.Module
    vae: AutoencoderKL
    """Of `dtype`, but float32 where that is float16: beyond its range lie black pictures."""
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    device: torch.device
    dtype: torch.dtype


def load(models_dir: Path, *, checkpoint: str, device: str, precision: str) -> Components:
    """Load the base, its ControlNet and its VAE from their folders in `models_dir`; only safetensors are read.

    `checkpoint` replaces the base: a folder of diffusers, or a file with the original names, for which the base's
    configuration and tokenizer stand; empty for none. Its own VAE is not used. `device` is auto, cpu, mps, cuda or
    cuda:N; `precision` is auto, bf16, fp16 or fp32.

    Raises:
        DeploymentError: weights are missing, cannot be read or are not such weights, or there is no such device.
    """
    weights.require(models_dir, checkpoint)
    place = choose_device(device)
    dtype = choose_dtype(precision, place)
    base = _base(models_dir / "base", checkpoint)
    with _quiet():
        unet = _network(UNet2DConditionModel, base.unet, base.configs / "unet", dtype)
        controlnet = _network(ControlNetModel, _file_in(models_dir / "controlnet"), models_dir / "controlnet", dtype)
        vae = _vae(models_dir / "vae", torch.float32 if dtype is torch.float16 else dtype)
        text_encoder = _text_encoder(base.text_encoder, base.configs / "text_encoder", dtype)
        tokenizer = _tokenizer(base.configs / "tokenizer", text_encoder.config.vocab_size)
    hint_encoder = split_hint_encoder(controlnet)
    for network in (unet, controlnet, hint_encoder, vae, text_encoder):
        settle(network, place)
    return Components(
        unet=unet,
        controlnet=controlnet,
        hint_encoder=hint_encoder,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        device=place,
        dtype=dtype,
    )


class _Base(NamedTuple):
    """Where a fine-tune of Stable Diffusion 1.5 lies."""

    unet: Path
    """A file, as `text_encoder`; of a checkpoint in one file both are the same."""
    text_encoder: Path
    configs: Path
    """The folder of folders of configurations and of the tokenizer."""


def _base(installed: Path, checkpoint: str) -> _Base:
    chosen = Path(checkpoint) if checkpoint else installed
    if (chosen / "unet").is_dir():
        return _Base(_file_in(chosen / "unet"), _file_in(chosen / "text_encoder"), chosen)
    if chosen.is_file() and chosen.suffix == ".safetensors":
        return _Base(chosen, chosen, installed)
    raise DeploymentError(
        f"UPSCALED_CLARITY_CHECKPOINT is {checkpoint}, which is neither a .safetensors file nor a folder of diffusers."
    )


def _file_in(folder: Path) -> Path:
    """Return the one file of weights; where there are variants, the one without a variant's name in its own."""
    if not (files := sorted(folder.glob("*.safetensors"), key=lambda file: (len(file.name), file.name))):
        raise DeploymentError(f"{folder} has no .safetensors file.")
    return files[0]


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return what auto, bf16, fp16 or fp32 means on a device."""
    if precision != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32 if device.type == "cpu" else torch.float16


Network = TypeVar("Network", bound=nn.Module)
Read_co = TypeVar("Read_co", covariant=True)


class _Reader(Protocol[Read_co]):
    """How the classes of diffusers and transformers are read, which say little about types themselves."""

    def from_single_file(self, path: str, *, config: str, local_files_only: bool, dtype: torch.dtype) -> Read_co: ...
    def from_pretrained(self, path: str, *, local_files_only: bool, **options: Any) -> Read_co: ...


def _network(kind: type[Network], file: Path, config: Path, dtype: torch.dtype) -> Network:
    """Read a network from a file with the names of diffusers or with the original ones."""
    with _naming(file):
        read = cast("_Reader[Network]", kind).from_single_file
        try:
            return _complete(read(str(file), config=str(config), local_files_only=True, dtype=dtype))
        except NotImplementedError as error:  # what torch says when weights without values are moved
            raise ValueError(_INCOMPLETE) from error


def _vae(folder: Path, dtype: torch.dtype) -> AutoencoderKL:
    """Read the VAE as diffusers does; it knows what attention was called when the weights were published."""
    with _naming(folder):
        read = cast("_Reader[AutoencoderKL]", AutoencoderKL).from_pretrained
        return _complete(read(str(folder), use_safetensors=True, local_files_only=True, dtype=dtype))


def _text_encoder(file: Path, config: Path, dtype: torch.dtype) -> CLIPTextModel:
    """Read the text encoder from a file of its own, or out of a whole checkpoint."""
    with _naming(file):
        read = cast("_Reader[CLIPTextConfig]", CLIPTextConfig).from_pretrained
        shape, tensors = read(str(config), local_files_only=True), load_file(file)
        names = [name for name in tensors if name.startswith(_ORIGINAL_TEXT_ENCODER)] or list(tensors)
        plain = {name.removeprefix(_ORIGINAL_TEXT_ENCODER).removeprefix("text_model."): name for name in names}
        plain.pop("embeddings.position_ids", None)
        # The weights are replaced; what is computed without a file, a buffer, is not.
        with init_empty_weights(include_buffers=False):
            model = CLIPTextModel(shape)
        model.load_state_dict({name: tensors[given].to(dtype) for name, given in plain.items()}, assign=True)
        return model


def _tokenizer(folder: Path, words: int) -> CLIPTokenizer:
    """Read the tokenizer, which without files of words would be one that knows none, and say so to nobody."""
    with _naming(folder):
        if not folder.is_dir():
            raise FileNotFoundError("there is no such folder.")
        tokenizer = cast("_Reader[CLIPTokenizer]", CLIPTokenizer).from_pretrained(str(folder), local_files_only=True)
        if len(tokenizer) != words:
            raise ValueError(f"it knows {len(tokenizer)} words, the text encoder {words}.")
        return tokenizer


def settle(network: nn.Module, device: torch.device) -> None:
    """Bring a network to where it works, and into the layout in which convolutions are fastest."""
    network.eval().requires_grad_(requires_grad=False)
    network.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _complete(network: Network) -> Network:
    if any(weight.is_meta for weight in network.parameters()):
        raise ValueError(_INCOMPLETE)
    return network


@contextmanager
def _naming(source: Path) -> Generator[None]:
    try:
        yield
    except Exception as error:  # on damaged files and those of others the libraries raise what they happen to
        raise DeploymentError(f"{source} cannot be loaded: {_brief(error)}") from error


def _brief(error: BaseException) -> str:
    """Shorten what an error says, or what was wrong with a damaged file behind it, which diffusers leaves out."""
    shown, cause = error, error
    while (cause := cause.__context__) is not None:
        if isinstance(cause, SafetensorError):
            shown = cause
    return shorten(str(shown), 200, placeholder=" …") or type(shown).__name__


@contextmanager
def _quiet() -> Generator[None]:
    """Keep the libraries' remarks on how they read files to themselves; what goes wrong is raised."""
    before = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before[0])
        transformers_logging.set_verbosity(before[1])

"""LoRAs: low-rank changes of weights, merged while a job that asks for them runs."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextModel

from core.errors import DeploymentError, UnknownLora
from worker.upscaler.prompts import Lora

_KEY = re.compile(r"(?P<module>.+?)[._]lora(?:_linear_layer)?[._](?P<side>down|up|A|B)\.weight")
"""The ways to spell the two halves: of early diffusers, of diffusers, of PEFT."""

_TEXT_ENCODER_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class _Change(NamedTuple):
    """What is added to one weight: scale · up @ down."""

    up: Tensor
    down: Tensor
    scale: float


class Loras:
    """The LoRAs of a folder, and which of them are merged into the weights of two networks.

    Weights are changed in place, so compiled networks see it. Nobody else may change them meanwhile.
    """

    def __init__(self, folder: Path, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        self._folder = folder
        self._unet_config = unet.config
        networks: dict[str, nn.Module] = {"unet": unet, "text_encoder": text_encoder}
        self._weights = {
            f"{part}.{name}": cast("nn.Parameter", module.weight)
            for part, network in networks.items()
            for name, module in cast("Iterator[tuple[str, nn.Module]]", network.named_modules())
            if isinstance(module, nn.Linear | nn.Conv2d)
        }
        self._pristine: dict[str, Tensor] = {}
        self._applied: list[Lora] | None = []

    @property
    def installed(self) -> list[str]:
        """Names of the LoRAs that lie in the folder now."""
        return list(self._files())

    @torch.no_grad()
    def apply(self, wanted: Sequence[Lora]) -> None:
        """Leave exactly these merged; what is named twice counts twice, and weight 0 is none.

        Starts from the weights as they were, bit by bit, so what was merged before leaves no trace. On an error of
        these nothing has changed. What is merged already costs nothing.

        Raises:
            UnknownLora: one is not installed; names are never paths.
            DeploymentError: a file is damaged, of a kind that is not supported, or for another model. Whoever
                installed it can mend that; the sentence names it, so that a caller can do without.
        """
        files = self._files()
        for lora in wanted:
            if lora.name not in files:
                installed = ", ".join(files) or "none"
                raise UnknownLora(f'There is no LoRA named "{lora.name}"; installed: {installed}.')
        totals = _totals(wanted)
        if totals == self._applied:
            return
        changes: dict[str, list[_Change]] = defaultdict(list)
        for lora in totals:
            for name, change in self._read(files[lora.name], lora):
                changes[name].append(change)
        # Until all is done nothing is known to be applied: what fails halfway is put right by the next call.
        self._applied = None
        self._restore()
        for name, parts in changes.items():
            self._merge(name, parts)
        self._applied = totals

    def _files(self) -> dict[str, Path]:
        return {file.stem: file for file in sorted(self._folder.glob("*.safetensors"))}

    def _restore(self) -> None:
        for name in list(self._pristine):
            self._weights[name].copy_(self._pristine[name])
            del self._pristine[name]

    def _merge(self, name: str, changes: list[_Change]) -> None:
        weight = self._weights[name]
        self._pristine[name] = weight.detach().to("cpu", copy=True)
        merged = weight.flatten(1).float()
        for change in changes:
            up, down = (half.to(merged).flatten(1) for half in (change.up, change.down))
            merged = torch.addmm(merged, up, down, alpha=change.scale)
        weight.copy_(merged.view(weight.shape))

    def _read(self, file: Path, lora: Lora) -> Iterator[tuple[str, _Change]]:
        """Read what a file changes, checked against the networks.

        Raises:
            DeploymentError: it does not fit them.
        """
        state, alphas = _load(file, self._unet_config)
        halves: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in state.items():
            match = _KEY.fullmatch(key)
            if match is None:
                raise _unfit(file, f"it is of a kind that is not supported ({key})")
            halves[_module(match["module"])]["down" if match["side"] in {"down", "A"} else "up"] = tensor
        for name, pair in halves.items():
            self._check(file, name, pair)
            part, rank = name.split(".")[0], len(pair["down"])
            alpha = alphas.get(name, alphas.get(part, rank))
            weight = lora.unet_weight if part == "unet" else lora.text_weight
            if weight:
                yield name, _Change(pair["up"], pair["down"], weight * alpha / rank)

    def _check(self, file: Path, name: str, pair: dict[str, Tensor]) -> None:
        if name not in self._weights:
            raise _unfit(file, f"it changes {name}, which Stable Diffusion 1.5 does not have")
        if len(pair) < 2:
            raise _unfit(file, f"half of what it changes {name} by is missing")
        weight, up, down = self._weights[name], pair["up"], pair["down"]
        fits = up.ndim >= 2 and down.ndim >= 2 and up.flatten(1).shape == (len(weight), len(down))
        # A convolution of one pixel may be written as a matrix.
        if not (fits and len(down)) or down.shape[1] != weight.shape[1] or down[0].numel() != weight[0].numel():
            shapes = f"{tuple(up.shape)} and {tuple(down.shape)} for {tuple(weight.shape)}"
            raise _unfit(file, f"it changes {name} by {shapes}")


class _Opened(Protocol):
    """What safetensors gives to read from."""

    def metadata(self) -> dict[str, str] | None: ...
    def keys(self) -> list[str]: ...
    def get_tensor(self, name: str, /) -> Tensor: ...


class _Converts(Protocol):
    """Renames what a file holds as diffusers does; also returns the alphas of files in kohya's format."""

    def __call__(
        self, state: dict[str, Tensor], *, unet_config: object
    ) -> tuple[dict[str, Tensor], dict[str, float] | None]: ...


def _load(file: Path, unet_config: object) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Read a file under diffusers' names, and alphas by module, or by network for all its modules.

    Raises:
        DeploymentError: it is damaged, or of a kind that is not supported.
    """
    try:
        with cast("AbstractContextManager[_Opened]", safe_open(file, framework="pt")) as opened:
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  it is no mapping
            adapter = cast("dict[str, Any]", json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}")))
    except (OSError, SafetensorError, ValueError) as error:
        raise _unfit(file, "it cannot be read") from error
    # diffusers would leave these out, and the result would be another.
    unsupported = [key for key in state if "dora_scale" in key]
    unsupported += [key for key, value in adapter.items() if value and key.endswith(("use_rslora", "alpha_pattern"))]
    if unsupported:
        raise _unfit(file, f"it is of a kind that is not supported ({unsupported[0]})")
    convert = cast("_Converts", StableDiffusionLoraLoaderMixin.lora_state_dict)  # pyright: ignore[reportUnknownMemberType]
    try:
        state, alphas = convert(state, unet_config=unet_config)
    except (ValueError, LookupError) as error:
        raise _unfit(file, "its layers are not those of Stable Diffusion 1.5, or not changed by plain LoRA") from error
    by_module = {_module(key.removesuffix(".alpha")): alpha for key, alpha in (alphas or {}).items()}
    by_network = {key.split(".")[0]: alpha for key, alpha in adapter.items() if key.endswith(".lora_alpha")}
    return state, by_module | by_network


def _module(key: str) -> str:
    """Name the module that a key of diffusers' is about, as the networks name theirs."""
    match = _KEY.fullmatch(key)
    name = (match["module"] if match else key).replace(".processor.", ".")
    if name.startswith("unet."):
        return name.removesuffix(".to_out") + ".to_out.0" if name.endswith(".to_out") else name
    path, _, last = name.replace("text_encoder.text_model.", "text_encoder.").rpartition(".")
    return f"{path}.{_TEXT_ENCODER_NAMES.get(last, last)}"


def _totals(wanted: Sequence[Lora]) -> list[Lora]:
    """Add up what is named more than once; the same set in any order gives the same list."""
    totals: dict[str, Lora] = {}
    for name, unet_weight, text_weight in wanted:
        before = totals.get(name, Lora(name, 0, 0))
        totals[name] = Lora(name, before.unet_weight + unet_weight, before.text_weight + text_weight)
    return sorted(lora for lora in totals.values() if lora.unet_weight or lora.text_weight)


def _unfit(file: Path, reason: str) -> DeploymentError:
    return DeploymentError(f"The LoRA {file.name} cannot be used: {reason}.")

"""Loading: what is read from files computes what the networks that were written computed."""

import logging
import re
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from core.errors import DeploymentError
from tests import tiny
from worker.upscaler import components
from worker.upscaler.components import Components

UNET = "diffusion_pytorch_model.safetensors"
NETWORKS = [f"base/unet/{UNET}", "base/text_encoder/model.safetensors", f"controlnet/{UNET}", f"vae/{UNET}"]


@pytest.fixture(scope="module")
def written() -> tiny.Components:
    return tiny.components()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.save(folder)
    return folder


@pytest.fixture
def models(installed: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(installed, tmp_path / "models")


def load(models_dir: Path, checkpoint: Path | str = "", device: str = "cpu", precision: str = "auto") -> Components:
    return components.load(models_dir, checkpoint=str(checkpoint), device=device, precision=precision)


def tokens(of: Components | tiny.Components, text: str) -> list[int]:
    return cast("list[int]", of.tokenizer(text)["input_ids"])


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def outputs(of: Components | tiny.Components) -> list[Tensor]:
    """Return something of each network: noise, residuals, latents, a picture, an embedding."""
    context = of.text_encoder(torch.tensor([tokens(of, "the cat")])).last_hidden_state
    x, hint, time = noise(1, 4, 8, 8), noise(1, 3, 64, 64), torch.tensor(500)
    if isinstance(of, Components):
        hint = of.hint_encoder(hint)
    down, middle = of.controlnet(x, time, context, hint, return_dict=False)
    predicted = of.unet(x, time, context, return_dict=False)[0]
    vae = cast("Any", of.vae)
    latents = vae.encode(noise(1, 3, 64, 64), return_dict=False)[0].mode()
    return [predicted, middle, *down, latents, vae.decode(x, return_dict=False)[0], context]


def assert_same(loaded: Components, written: tiny.Components) -> None:
    for found, expected in zip(outputs(loaded), outputs(written), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# What is loaded -------------------------------------------------------------------------------------------------------


def test_folders_give_the_networks_that_were_written(installed: Path, written: tiny.Components) -> None:
    loaded = load(installed)
    assert_same(loaded, written)
    assert tokens(loaded, "The cats, 1:1 (é)") == tokens(written, "The cats, 1:1 (é)")


def test_the_networks_are_ready_to_infer_in_the_layout_that_is_fast_on_gpus(installed: Path) -> None:
    loaded = load(installed)
    networks: list[nn.Module] = [loaded.unet, loaded.controlnet, loaded.hint_encoder, loaded.vae, loaded.text_encoder]
    for network in networks:
        assert not any(module.training for module in network.modules())
        weights = list(network.parameters())
        assert not any(weight.requires_grad for weight in weights)
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights if weight.ndim == 4)


@pytest.mark.parametrize(
    ("precision", "dtype", "vae_dtype"),
    [
        ("auto", torch.float32, torch.float32),
        ("fp16", torch.float16, torch.float32),
        ("bf16", torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_vae_never_computes_in_float16(
    installed: Path, precision: str, dtype: torch.dtype, vae_dtype: torch.dtype
) -> None:
    loaded = load(installed, precision=precision)
    assert loaded.dtype is dtype
    for network in (loaded.unet, loaded.controlnet, loaded.hint_encoder, loaded.text_encoder):
        assert {weight.dtype for weight in network.parameters()} == {dtype}
    assert {weight.dtype for weight in loaded.vae.parameters()} == {vae_dtype}


def test_auto_is_the_cpu_where_there_is_nothing_better(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert load(installed, device="auto").device == torch.device("cpu")


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_gets_the_precision_that_it_is_made_for(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, dtype: torch.dtype
) -> None:
    def supported(*, including_emulation: bool) -> bool:
        return has_bf16 or including_emulation

    monkeypatch.setattr("torch.cuda.is_bf16_supported", supported)
    chosen: Callable[[str, torch.device], torch.dtype] = components.choose_dtype  # pyright: ignore[reportPrivateUsage]
    assert chosen("auto", torch.device("cuda:1")) is dtype
    assert chosen("fp32", torch.device("cuda:1")) is torch.float32


# Forms in which weights are published ---------------------------------------------------------------------------------

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "controlnet_mid_block": "middle_block_out.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_cond_embedding.conv_out": "input_hint_block.14",
}
_LAYERS = 2
"""Per block; in the original, blocks are counted through, and each ends with a change of size."""


def original(name: str) -> str:
    """Return what the original code, CompVis's and lllyasviel's, calls a weight of a UNet or a ControlNet."""
    module, _, kind = name.rpartition(".")
    return f"{_ENDS.get(module) or _original(module)}.{kind}"


def _original(module: str) -> str:
    block, *words = module.split(".")
    if block == "controlnet_down_blocks":
        return f"zero_convs.{words[0]}.0"
    if block == "controlnet_cond_embedding":
        return f"input_hint_block.{2 * int(words[1]) + 2}"
    if block == "mid_block":
        part, layer, *rest = words
        place = 1 if part == "attentions" else 2 * int(layer)
        return f"middle_block.{place}.{_inside(rest)}"
    number, part, layer, *rest = words
    first = (_LAYERS + 1) * int(number)
    if part == "downsamplers":
        return f"input_blocks.{first + _LAYERS + 1}.0.op"
    if part == "upsamplers":
        return f"output_blocks.{first + _LAYERS}.{1 if number == '0' else 2}.{_inside(rest)}"
    place = (
        f"input_blocks.{first + int(layer) + 1}" if block == "down_blocks" else f"output_blocks.{first + int(layer)}"
    )
    return f"{place}.{int(part == 'attentions')}.{_inside(rest)}"


def _inside(words: list[str]) -> str:
    return _RESNET.get(name := ".".join(words), name)


def save_checkpoint(of: tiny.Components, file: Path) -> None:
    """Write a checkpoint in one file, as fine-tunes are shared: with a VAE, and a buffer that was once a weight."""
    unet = {f"model.diffusion_model.{original(name)}": weight for name, weight in of.unet.state_dict().items()}
    prefix = "cond_stage_model.transformer.text_model"
    text = {f"{prefix}.{name}": weight for name, weight in of.text_encoder.state_dict().items()}
    positions = {f"{prefix}.embeddings.position_ids": torch.arange(77)[None]}
    vae = {"first_stage_model.decoder.conv_in.weight": torch.zeros(8, 4, 3, 3)}
    save_file({name: weight.clone() for name, weight in (unet | text | positions | vae).items()}, file)


def test_a_checkpoint_in_one_file_replaces_unet_and_text_encoder(
    installed: Path, written: tiny.Components, tmp_path: Path
) -> None:
    tune = tiny.components(seed=1)
    save_checkpoint(tune, tmp_path / "tune.safetensors")
    expected = tiny.Components(tune.unet, written.controlnet, written.vae, tune.text_encoder, written.tokenizer)
    loaded = load(installed, tmp_path / "tune.safetensors")
    assert_same(loaded, expected)
    assert not torch.equal(outputs(loaded)[0], outputs(load(installed))[0])


def test_a_folder_of_diffusers_replaces_the_whole_base(models: Path, written: tiny.Components, tmp_path: Path) -> None:
    tune = tiny.components(seed=1)
    tiny.save(tmp_path / "tune", seed=1)
    shutil.rmtree(models / "base")
    expected = tiny.Components(tune.unet, written.controlnet, written.vae, tune.text_encoder, written.tokenizer)
    assert_same(load(models, tmp_path / "tune/base"), expected)


def test_a_controlnet_can_have_its_original_names(models: Path, written: tiny.Components) -> None:
    (models / "controlnet" / UNET).unlink()
    weights = written.controlnet.state_dict().items()
    save_file(
        {f"control_model.{original(name)}": weight for name, weight in weights}, models / "controlnet/tile.safetensors"
    )
    assert_same(load(models), written)


def test_files_can_be_those_of_the_variant_with_half_precision(models: Path, written: tiny.Components) -> None:
    for file, name in (("unet/diffusion_pytorch_model", "fp16"), ("text_encoder/model", "fp16")):
        path = models / f"base/{file}.safetensors"
        halves = {key: weight.half() for key, weight in load_file(path).items()}
        path.unlink()
        save_file(halves, path.with_suffix(f".{name}.safetensors"))
    loaded = load(models)
    for found, expected in zip(outputs(loaded), outputs(written), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


def test_older_names_of_the_text_encoder_and_of_the_vaes_attention_are_understood(
    models: Path, written: tiny.Components
) -> None:
    text = models / "base/text_encoder/model.safetensors"
    older = {f"text_model.{name}": weight for name, weight in load_file(text).items()}
    save_file(older | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, text)
    vae = models / "vae" / UNET
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = "|".join(map(re.escape, words))
    save_file({re.sub(pattern, lambda word: words[word[0]], name): w for name, w in load_file(vae).items()}, vae)
    assert any("proj_attn" in name for name in load_file(vae))
    assert_same(load(models), written)


# What is refused ------------------------------------------------------------------------------------------------------


def test_missing_weights_are_named_and_so_is_the_command_that_fetches_them(models: Path) -> None:
    (models / "vae" / UNET).unlink()
    shutil.rmtree(models / "controlnet")
    with pytest.raises(DeploymentError) as caught:
        load(models)
    assert str(caught.value) == (
        f"UPSCALED_ENGINE is clarity, but these weights are missing: {models / 'controlnet'}, {models / 'vae'}; "
        "`upscaled models pull` fetches them."
    )


@pytest.mark.parametrize(
    ("name", "refusal"),
    [(f"tune.{suffix}", "neither") for suffix in ("ckpt", "pt", "bin")] + [("tune.safetensors", "cannot be loaded")],
)
def test_a_checkpoint_that_is_a_pickle_is_not_read(installed: Path, tmp_path: Path, name: str, refusal: str) -> None:
    torch.save(_Trap(), tmp_path / name)
    with pytest.raises(DeploymentError, match=f"{re.escape(name)}.* {refusal}"):
        load(installed, tmp_path / name)


@pytest.mark.parametrize("part", ["base/unet", "vae"])
def test_a_pickle_in_place_of_installed_weights_is_not_read(models: Path, part: str) -> None:
    (models / part / UNET).unlink()
    torch.save(_Trap(), models / part / "diffusion_pytorch_model.bin")
    with pytest.raises(DeploymentError, match="are missing"):
        load(models)
    torch.save(_Trap(), models / part / UNET)
    with pytest.raises(DeploymentError, match=f"{part}.* cannot be loaded: "):
        load(models)


class _Trap:
    """Ends the test when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return pytest.fail, ("a pickle was read",)


@pytest.mark.parametrize("file", [*NETWORKS, "base/unet/config.json", "vae/config.json", "base/tokenizer/vocab.json"])
def test_a_file_that_is_cut_off_is_named_in_one_line(models: Path, file: str) -> None:
    path = models / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DeploymentError, match=r"cannot be loaded: ") as caught:
        load(models)
    assert str(path.parent) in str(caught.value)
    assert "\n" not in str(caught.value)
    if path.suffix == ".safetensors":
        assert "deserializing header" in str(caught.value)


@pytest.mark.parametrize("lost", [["vocab.json", "merges.txt"], ["vocab.json"], []])
def test_a_tokenizer_without_its_words_is_refused(models: Path, lost: list[str]) -> None:
    folder = models / "base/tokenizer"
    for name in lost:
        (folder / name).unlink()
    if not lost:
        shutil.rmtree(folder)
    with pytest.raises(DeploymentError, match=f"^{re.escape(str(folder))} cannot be loaded: .*(words|vocab|folder)"):
        load(models)


@pytest.mark.parametrize("part", NETWORKS)
def test_a_file_that_lacks_a_weight_is_refused_instead_of_made_up_for(models: Path, part: str) -> None:
    weights = load_file(models / part)
    del weights[min(weights)]
    save_file(weights, models / part)
    with pytest.raises(DeploymentError, match=f"{re.escape(str((models / part).parent))}.* cannot be loaded: "):
        load(models)


def test_weights_of_another_model_are_refused(installed: Path, written: tiny.Components, tmp_path: Path) -> None:
    save_checkpoint(written, tmp_path / "tune.safetensors")
    weights = load_file(tmp_path / "tune.safetensors")
    wider = {name: torch.cat([w, w], dim=-1) if "attn2.to_k" in name else w for name, w in weights.items()}
    without_text = {name: weight for name, weight in weights.items() if not name.startswith("cond_stage_model")}
    lora = {"lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(4.0)}
    for number, others in enumerate((wider, without_text, lora)):
        save_file(others, file := tmp_path / f"{number}.safetensors")
        with pytest.raises(DeploymentError, match=f"{re.escape(str(file))} cannot be loaded: "):
            load(installed, file)


def test_a_checkpoint_or_a_device_that_is_not_there_is_named(installed: Path, tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match=r"UPSCALED_CLARITY_CHECKPOINT is .*/none\.safetensors, which is neither"):
        load(installed, tmp_path / "none.safetensors")
    with pytest.raises(DeploymentError, match=r"UPSCALED_CLARITY_CHECKPOINT is .*, which is neither"):
        load(installed, tmp_path)
    with pytest.raises(DeploymentError, match="UPSCALED_DEVICE is cuda:99, which cannot be used: "):
        load(installed, device="cuda:99")


def test_loading_opens_no_connection_and_says_nothing(
    installed: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    before = diffusers_logging.get_verbosity()
    load(installed, precision="bf16")
    assert said == []
    assert diffusers_logging.get_verbosity() == before


@pytest.fixture
def said() -> Generator[list[str]]:
    """What diffusers and transformers log."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, loggers = Handler(), [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    yield lines
    for logger in loggers:
        logger.removeHandler(handler)

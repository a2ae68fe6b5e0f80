"""LoRAs merged into weights, against arithmetic of its own, and taken out again bit by bit."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from core.errors import DeploymentError, UnknownLora
from tests import tiny
from worker.upscaler.loras import Loras
from worker.upscaler.prompts import Lora

COMPONENTS = tiny.components()
NETWORKS: dict[str, nn.Module] = {"unet": COMPONENTS.unet, "te": COMPONENTS.text_encoder}
PRISTINE = {part: {key: value.clone() for key, value in net.state_dict().items()} for part, net in NETWORKS.items()}

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
PROJECTION = "mid_block.attentions.0.proj_in"
CONVOLUTION = "down_blocks.0.resnets.0.conv1"
QUERY = "encoder.layers.0.self_attn.q_proj"
RANK, ALPHA = 2, 3.0


class Pair(NamedTuple):
    up: Tensor
    down: Tensor

    def delta(self) -> Tensor:
        """Apply the upper half to the lower: a matrix to a matrix, or a convolution to a convolution."""
        if self.up.ndim == 2:
            return self.up @ self.down
        return nn.functional.conv2d(self.down.transpose(0, 1), self.up).transpose(0, 1)


def weight_of(part: str, module: str) -> Tensor:
    return PRISTINE[part][f"{module}.weight"]


def pair_for(weight: Tensor, seed: int = 0, rank: int = RANK) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    kernel = weight.shape[2:]
    up = torch.randn(len(weight), rank, *(1 for _ in kernel), generator=generator)
    return Pair(up, torch.randn(rank, *weight.shape[1:], generator=generator))


def kohya(modules: Mapping[str, Sequence[str]], alpha: float | None = ALPHA, seed: int = 0) -> dict[str, Tensor]:
    """Make a file's tensors as kohya's trainer names them."""
    tensors: dict[str, Tensor] = {}
    for part, names in modules.items():
        for name in names:
            pair = pair_for(weight_of(part, name), seed)
            # The trainers' text encoder has one level more than that of transformers 5.
            stem = f"lora_{part}_{'text_model_' if part == 'te' else ''}{name.replace('.', '_')}"
            tensors |= {f"{stem}.lora_up.weight": pair.up, f"{stem}.lora_down.weight": pair.down}
            if alpha is not None:
                tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors


def now(part: str, module: str) -> Tensor:
    return NETWORKS[part].state_dict()[f"{module}.weight"]


def assert_changed_by(part: str, module: str, delta: Tensor) -> None:
    torch.testing.assert_close(now(part, module), weight_of(part, module) + delta)


def changed() -> set[str]:
    """Name the weights that are not, bit by bit, what they were."""
    return {
        f"{part}.{key}".removesuffix(".weight")
        for part, network in NETWORKS.items()
        for key, value in network.state_dict().items()
        if not torch.equal(value, PRISTINE[part][key])
    }


@pytest.fixture
def loras(tmp_path: Path) -> Iterator[Loras]:
    loras = Loras(tmp_path, COMPONENTS.unet, COMPONENTS.text_encoder)
    yield loras
    loras.apply([])
    assert changed() == set()


def test_a_file_of_kohyas_changes_matrices_and_convolutions(loras: Loras, tmp_path: Path) -> None:
    names = {"unet": [ATTENTION, PROJECTION, CONVOLUTION], "te": [QUERY]}
    save_file(kohya(names), tmp_path / "x.safetensors")
    loras.apply([Lora("x", unet_weight=0.5, text_weight=-2.0)])
    for part, weight in (("unet", 0.5), ("te", -2.0)):
        for name in names[part]:
            assert_changed_by(part, name, weight * ALPHA / RANK * pair_for(weight_of(part, name)).delta())
    assert changed() == {f"{part}.{name}" for part in names for name in names[part]}


def test_every_layer_is_reached_by_kohyas_names(loras: Loras, tmp_path: Path) -> None:
    layers = {
        part: [
            key.removesuffix(".weight") for key, value in state.items() if value.ndim > 1 and "embeddings." not in key
        ]
        for part, state in PRISTINE.items()
    }
    save_file(kohya(layers), tmp_path / "x.safetensors")
    loras.apply([Lora("x")])
    assert changed() == {f"{part}.{name}" for part in layers for name in layers[part]}
    for part, names in layers.items():
        for name in names:
            assert_changed_by(part, name, ALPHA / RANK * pair_for(weight_of(part, name)).delta())


SPELLINGS: dict[str, dict[str, str]] = {
    "PEFT": {
        f"unet.{ATTENTION}.lora_B.weight": "up",
        f"unet.{ATTENTION}.lora_A.weight": "down",
        f"text_encoder.text_model.{QUERY}.lora_B.weight": "up",
        f"text_encoder.text_model.{QUERY}.lora_A.weight": "down",
    },
    "diffusers": {
        f"unet.{ATTENTION}.lora.up.weight": "up",
        f"unet.{ATTENTION}.lora.down.weight": "down",
        f"text_encoder.text_model.{QUERY}.lora_linear_layer.up.weight": "up",
        f"text_encoder.text_model.{QUERY}.lora_linear_layer.down.weight": "down",
    },
    "early diffusers": {
        f"unet.{ATTENTION.replace('attn1.', 'attn1.processor.')}_lora.up.weight": "up",
        f"unet.{ATTENTION.replace('attn1.', 'attn1.processor.')}_lora.down.weight": "down",
        f"text_encoder.text_model.{QUERY.replace('q_proj', 'to_q_lora')}.up.weight": "up",
        f"text_encoder.text_model.{QUERY.replace('q_proj', 'to_q_lora')}.down.weight": "down",
    },
    "later transformers": {
        f"unet.{ATTENTION}.lora_B.weight": "up",
        f"unet.{ATTENTION}.lora_A.weight": "down",
        f"text_encoder.{QUERY}.lora_B.weight": "up",
        f"text_encoder.{QUERY}.lora_A.weight": "down",
    },
}


def spelt(spelling: str) -> dict[str, Tensor]:
    pairs = {"unet": pair_for(weight_of("unet", ATTENTION)), "text_encoder": pair_for(weight_of("te", QUERY))}
    return {key: getattr(pairs[key.split(".")[0]], side) for key, side in SPELLINGS[spelling].items()}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_files_of_diffusers_and_peft_are_read_as_well(loras: Loras, tmp_path: Path, spelling: str) -> None:
    save_file(spelt(spelling), tmp_path / "x.safetensors")
    loras.apply([Lora("x")])
    assert changed() == {f"unet.{ATTENTION}", f"te.{QUERY}"}
    assert_changed_by("unet", ATTENTION, pair_for(weight_of("unet", ATTENTION)).delta())
    assert_changed_by("te", QUERY, pair_for(weight_of("te", QUERY)).delta())


def test_an_alpha_in_the_metadata_counts_for_its_network(loras: Loras, tmp_path: Path) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8, "unet.r": RANK, "unet.use_rslora": False})}
    save_file(spelt("PEFT"), tmp_path / "x.safetensors", metadata)
    loras.apply([Lora("x")])
    assert_changed_by("unet", ATTENTION, 8 / RANK * pair_for(weight_of("unet", ATTENTION)).delta())
    assert_changed_by("te", QUERY, pair_for(weight_of("te", QUERY)).delta())


def test_without_an_alpha_the_halves_count_as_they_are(loras: Loras, tmp_path: Path) -> None:
    save_file(kohya({"unet": [ATTENTION]}, alpha=None), tmp_path / "x.safetensors")
    loras.apply([Lora("x")])
    assert_changed_by("unet", ATTENTION, pair_for(weight_of("unet", ATTENTION)).delta())


def test_the_names_of_the_original_checkpoint_are_read(loras: Loras, tmp_path: Path) -> None:
    tensors = kohya({"unet": ["down_blocks.0.attentions.0.proj_in"]})
    renamed = {key.replace("down_blocks_0_attentions_0", "input_blocks_1_1"): value for key, value in tensors.items()}
    save_file(renamed, tmp_path / "x.safetensors")
    loras.apply([Lora("x")])
    assert changed() == {"unet.down_blocks.0.attentions.0.proj_in"}


def test_a_matrix_fits_a_convolution_of_one_pixel(loras: Loras, tmp_path: Path) -> None:
    tensors = kohya({"unet": [PROJECTION]})
    flat = {key: value.flatten(1) if value.ndim else value for key, value in tensors.items()}
    save_file(flat, tmp_path / "x.safetensors")
    loras.apply([Lora("x")])
    assert_changed_by("unet", PROJECTION, ALPHA / RANK * pair_for(weight_of("unet", PROJECTION)).delta())


def test_two_loras_on_one_layer_add_up_in_any_order(loras: Loras, tmp_path: Path) -> None:
    deltas: list[Tensor] = []
    for seed, name in enumerate("ab"):
        save_file(kohya({"unet": [ATTENTION]}, seed=seed), tmp_path / f"{name}.safetensors")
        deltas.append(ALPHA / RANK * pair_for(weight_of("unet", ATTENTION), seed).delta())
    loras.apply([Lora("a", 0.5), Lora("b", 2.0)])
    assert_changed_by("unet", ATTENTION, 0.5 * deltas[0] + 2 * deltas[1])
    merged = now("unet", ATTENTION).clone()
    loras.apply([])
    loras.apply([Lora("b", 2.0), Lora("a", 0.5)])
    assert torch.equal(now("unet", ATTENTION), merged)


def test_a_lora_named_twice_counts_twice(loras: Loras, tmp_path: Path) -> None:
    save_file(kohya({"unet": [ATTENTION], "te": [QUERY]}), tmp_path / "x.safetensors")
    loras.apply([Lora("x", 0.5, 0.25), Lora("x", 0.75, -0.25)])
    assert_changed_by("unet", ATTENTION, 1.25 * ALPHA / RANK * pair_for(weight_of("unet", ATTENTION)).delta())
    assert changed() == {f"unet.{ATTENTION}"}


def test_weight_zero_is_none(loras: Loras, tmp_path: Path) -> None:
    save_file(kohya({"unet": [ATTENTION], "te": [QUERY]}), tmp_path / "x.safetensors")
    loras.apply([Lora("x", 0.0, 0.0)])
    assert changed() == set()
    loras.apply([Lora("x", 1.0, 0.0)])
    assert changed() == {f"unet.{ATTENTION}"}
    loras.apply([Lora("x", 0.0, 1.0)])
    assert changed() == {f"te.{QUERY}"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_merged_in_full_and_restored_bit_by_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    own = tiny.components()
    nn.Module.to(own.unet, dtype)
    layer = own.unet.get_submodule(ATTENTION)
    assert isinstance(layer, nn.Linear)
    parameter, before = layer.weight, layer.weight.detach().clone()
    for seed, name in enumerate("abc"):
        save_file(kohya({"unet": [ATTENTION, CONVOLUTION]}, seed=seed), tmp_path / f"{name}.safetensors")
    pristine = {key: value.clone() for key, value in own.unet.state_dict().items()}
    loras = Loras(tmp_path, own.unet, own.text_encoder)
    loras.apply([Lora(name, 0.01) for name in "abc"])
    deltas = [pair_for(before, seed).delta() for seed in range(3)]
    exact = before.float() + sum((0.01 * ALPHA / RANK * delta for delta in deltas), torch.zeros(()))
    torch.testing.assert_close(parameter.float(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)
    assert layer.weight is parameter
    loras.apply([Lora("b")])
    loras.apply([])
    assert all(torch.equal(value, pristine[key]) for key, value in own.unet.state_dict().items())


def test_what_was_merged_before_leaves_no_trace(loras: Loras, tmp_path: Path) -> None:
    save_file(kohya({"unet": [ATTENTION, CONVOLUTION]}), tmp_path / "a.safetensors")
    save_file(kohya({"unet": [ATTENTION]}, seed=1), tmp_path / "b.safetensors")
    loras.apply([Lora("b")])
    fresh = now("unet", ATTENTION).clone()
    loras.apply([Lora("a", 1e6)])
    loras.apply([Lora("b")])
    assert torch.equal(now("unet", ATTENTION), fresh)
    assert changed() == {f"unet.{ATTENTION}"}


def test_what_is_merged_already_is_not_merged_again(loras: Loras, tmp_path: Path) -> None:
    save_file(kohya({"unet": [ATTENTION]}), tmp_path / "x.safetensors")
    loras.apply([Lora("x")])
    version = COMPONENTS.unet.get_submodule(ATTENTION).get_parameter("weight")._version  # noqa: SLF001  torch's count of writes
    (tmp_path / "x.safetensors").write_bytes(b"never read again")
    loras.apply([Lora("x", 0.25, 0.5), Lora("x", 0.75, 0.5)])
    assert COMPONENTS.unet.get_submodule(ATTENTION).get_parameter("weight")._version == version  # noqa: SLF001


def test_layouts_of_memory_are_kept(tmp_path: Path) -> None:
    own = tiny.components()
    weight = own.unet.get_submodule(CONVOLUTION).get_parameter("weight")
    weight.data = weight.data.to(memory_format=torch.channels_last)
    before, strides = weight.detach().clone(), weight.stride()
    save_file(kohya({"unet": [CONVOLUTION]}), tmp_path / "x.safetensors")
    loras = Loras(tmp_path, own.unet, own.text_encoder)
    loras.apply([Lora("x")])
    delta = ALPHA / RANK * pair_for(weight_of("unet", CONVOLUTION)).delta()
    torch.testing.assert_close(weight.detach(), before + delta)
    loras.apply([])
    assert torch.equal(weight, before)
    assert weight.stride() == strides


def test_merging_works_in_inference_mode_too(loras: Loras, tmp_path: Path) -> None:
    save_file(kohya({"unet": [ATTENTION]}), tmp_path / "x.safetensors")
    with torch.inference_mode():
        loras.apply([Lora("x")])
    assert changed() == {f"unet.{ATTENTION}"}


def test_the_folder_is_read_anew(loras: Loras, tmp_path: Path) -> None:
    assert loras.installed == []
    for name in ("b_v2.0", "a"):
        save_file(kohya({"unet": [ATTENTION]}), tmp_path / f"{name}.safetensors")
    (tmp_path / "pickle.pt").touch()
    assert loras.installed == ["a", "b_v2.0"]
    loras.apply([Lora("b_v2.0")])


def test_a_folder_that_does_not_exist_has_none(tmp_path: Path) -> None:
    loras = Loras(tmp_path / "none", COMPONENTS.unet, COMPONENTS.text_encoder)
    assert loras.installed == []
    loras.apply([])


def test_an_unknown_name_is_refused_with_what_is_installed(loras: Loras, tmp_path: Path) -> None:
    with pytest.raises(UnknownLora, match=r'^There is no LoRA named "x"; installed: none\.$'):
        loras.apply([Lora("x")])
    for name in "ab":
        save_file(kohya({"unet": [ATTENTION]}), tmp_path / f"{name}.safetensors")
    with pytest.raises(UnknownLora, match=r'^There is no LoRA named "x"; installed: a, b\.$'):
        loras.apply([Lora("a"), Lora("x", 0, 0)])
    assert changed() == set()


def test_a_name_is_never_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    for file in (tmp_path / "x.safetensors", folder / "inner.safetensors"):
        save_file(kohya({"unet": [ATTENTION]}), file)
    loras = Loras(folder, COMPONENTS.unet, COMPONENTS.text_encoder)
    for name in ("../x", str(tmp_path / "x"), "./inner", "../loras/inner", "inner.safetensors", ""):
        with pytest.raises(UnknownLora):
            loras.apply([Lora(name)])
    assert changed() == set()


UNFIT: dict[str, Callable[[], dict[str, Tensor]]] = {
    "another shape": lambda: {
        f"lora_unet_{ATTENTION.replace('.', '_')}.lora_up.weight": torch.ones(40, RANK),
        f"lora_unet_{ATTENTION.replace('.', '_')}.lora_down.weight": torch.ones(RANK, 40),
    },
    "ranks that differ": lambda: {
        f"unet.{ATTENTION}.lora_B.weight": torch.ones(16, 2),
        f"unet.{ATTENTION}.lora_A.weight": torch.ones(3, 16),
    },
    "no rank": lambda: {
        f"unet.{ATTENTION}.lora_B.weight": torch.ones(16, 0),
        f"unet.{ATTENTION}.lora_A.weight": torch.ones(0, 16),
    },
    "half of it": lambda: {f"unet.{ATTENTION}.lora_B.weight": torch.ones(16, 2)},
    "half of kohya's": lambda: {
        f"lora_unet_{ATTENTION.replace('.', '_')}.lora_down.weight": torch.ones(RANK, 16),
    },
    "SDXL's second text encoder": lambda: {
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": torch.ones(32, 2),
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": torch.ones(2, 32),
    },
    "layers of another model": lambda: {
        "transformer.blocks.0.to_q.lora_B.weight": torch.ones(32, 2),
        "transformer.blocks.0.to_q.lora_A.weight": torch.ones(2, 32),
    },
    "DoRA": lambda: (
        kohya({"unet": [ATTENTION]}) | {f"lora_unet_{ATTENTION.replace('.', '_')}.dora_scale": torch.ones(16, 1)}
    ),
    "LoHa": lambda: {f"lora_unet_{ATTENTION.replace('.', '_')}.hada_w1_a": torch.ones(16, 2)},
    "a checkpoint": lambda: {"model.diffusion_model.out.2.weight": torch.ones(4, 8, 3, 3)},
}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_file_that_does_not_fit_is_refused_before_anything_changes(loras: Loras, tmp_path: Path, kind: str) -> None:
    save_file(kohya({"unet": [CONVOLUTION]}), tmp_path / "good.safetensors")
    save_file(UNFIT[kind](), tmp_path / "wrong.safetensors")
    with pytest.raises(DeploymentError, match=r"^The LoRA wrong\.safetensors cannot be used: .*\.$"):
        loras.apply([Lora("good"), Lora("wrong")])
    assert changed() == set()
    loras.apply([Lora("good")])
    with pytest.raises(DeploymentError):
        loras.apply([Lora("wrong")])
    assert changed() == {f"unet.{CONVOLUTION}"}


def test_a_file_that_scales_in_another_way_is_refused(loras: Loras, tmp_path: Path) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({"unet.use_rslora": True})}
    save_file(spelt("PEFT"), tmp_path / "x.safetensors", metadata)
    with pytest.raises(DeploymentError, match=r"unet\.use_rslora"):
        loras.apply([Lora("x")])


def test_a_damaged_file_is_refused_by_name(loras: Loras, tmp_path: Path) -> None:
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(DeploymentError, match=r"torn\.safetensors cannot be used: it cannot be read\.$"):
        loras.apply([Lora("torn")])


def test_what_failed_halfway_is_put_right_by_the_next_call(
    loras: Loras, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(kohya({"unet": [ATTENTION, CONVOLUTION]}), tmp_path / "x.safetensors")
    plain, calls = torch.addmm, iter([True, False])

    def fails_once(*arguments: Tensor, alpha: float) -> Tensor:
        if next(calls):
            return plain(*arguments, alpha=alpha)
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch, "addmm", fails_once)
        loras.apply([Lora("x")])
    assert len(changed()) == 1
    loras.apply([])
    assert changed() == set()

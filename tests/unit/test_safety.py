"""The safety checker: the real component, CLIP's own preparation, and the whole of a picture."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor
from transformers import CLIPConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from core.errors import DeploymentError
from worker.upscaler.picture import Levels
from worker.upscaler.safety import MAX_ASPECT, SafetyChecker

CPU = torch.device("cpu")

SIDE = 32
"""What the small model takes for a picture; the real one takes 224."""

NEVER, ALWAYS = 2.0, -2.0
"""Thresholds that no cosine passes, and that all do."""


@cache
def _made() -> Any:
    torch.random.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    network = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**network, "image_size": SIDE, "patch_size": 8}, projection_dim=8)
    component = cast("Any", StableDiffusionSafetyChecker(config)).eval()
    for weights in (component.concept_embeds, component.special_care_embeds):
        torch.nn.init.normal_(weights)
    for threshold in (component.concept_embeds_weights, component.special_care_embeds_weights):
        torch.nn.init.constant_(threshold, NEVER)
    return component


def _component() -> Any:
    """Make a small model with random weights that flags nothing."""
    return deepcopy(_made())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A component as diffusers saves it."""
    folder = tmp_path_factory.mktemp("safety_checker")
    _component().save_pretrained(folder)
    return folder


def _checker(change: Callable[[Any], None] = lambda _: None) -> SafetyChecker:
    component = _component()
    change(component)
    return SafetyChecker(component)


def _noise(width: int, height: int, seed: int = 0) -> Levels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _prepared(rgb: Levels) -> Tensor:
    """What CLIP's own preparation makes of a picture: one square."""
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    processor = cast("Any", CLIPImageProcessorPil)(**size)
    return processor(Image.fromarray(rgb), return_tensors="pt")["pixel_values"]


def _embedding(component: Any, squares: Tensor) -> Tensor:
    with torch.no_grad():
        return component.visual_projection(component.vision_model(squares)[1])


def _looking_for(sight: Levels) -> Callable[[Any], None]:
    """Make one concept of what a square shows, and flag what is all but it."""

    def change(component: Any) -> None:
        component.concept_embeds.data[5] = _embedding(component, _prepared(sight))[0]
        component.concept_embeds_weights.data[5] = 0.9999

    return change


@pytest.mark.parametrize("size", [(32, 32), (300, 300), (400, 150), (1, 1), (1, 300), (31, 7)])
def test_thresholds_alone_can_force_either_answer(size: tuple[int, int]) -> None:
    rgb = _noise(*size)
    assert not _checker().flags(rgb)
    assert _checker(lambda component: component.concept_embeds_weights.data.fill_(ALWAYS)).flags(rgb)


def test_one_concept_of_the_seventeen_is_enough() -> None:
    def change(component: Any) -> None:
        component.concept_embeds_weights.data[16] = ALWAYS

    assert _checker(change).flags(_noise(40, 30))


def test_special_care_flags_nothing_by_itself_but_lowers_the_other_thresholds_by_a_hundredth() -> None:
    rgb = _noise(SIDE, SIDE)
    component = _component()
    cosines = torch.cosine_similarity(_embedding(component, _prepared(rgb)), component.concept_embeds)

    def answer(missed_by: float, special: float) -> bool:
        def change(component: Any) -> None:
            component.concept_embeds_weights.data[:] = cosines + missed_by
            component.special_care_embeds_weights.data[1] = special

        return _checker(change).flags(rgb)

    assert answer(-0.001, NEVER)
    assert not answer(0.005, NEVER)
    assert answer(0.005, ALWAYS)
    assert not answer(0.015, ALWAYS)


def test_a_square_is_prepared_as_clip_prepares_it() -> None:
    # All 17 thresholds lie a hair above, then below, the cosines that CLIP's own preparation leads to.
    for seed, side in enumerate([SIDE, 100, 77, 5]):
        rgb = _noise(side, side, seed)
        component = _component()
        cosines = torch.cosine_similarity(_embedding(component, _prepared(rgb)), component.concept_embeds)
        for hair in (1e-5, -1e-5):

            def change(component: Any, cosines: Tensor = cosines, hair: float = hair) -> None:
                component.concept_embeds_weights.data[:] = cosines + hair

            assert _checker(change).flags(rgb) == (hair < 0)


def test_the_answers_are_those_of_the_component_itself() -> None:
    component = _component()
    component.concept_embeds_weights.data.fill_(0.75)
    checker, answers = SafetyChecker(component), set[bool]()
    for seed in range(12):
        rgb = _noise(50, 50, seed)
        _, (expected,) = component.forward(_prepared(rgb), [np.zeros(1)])
        assert checker.flags(rgb) == expected
        answers.add(expected)
    assert answers == {True, False}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("place", [0, 0.25, 0.5, 0.75, 1])
def test_a_panorama_is_looked_at_from_end_to_end(place: float, *, turned: bool) -> None:
    sight, panorama = _noise(100, 100, seed=7), np.full((100, 500, 3), 128, np.uint8)
    checker = _checker(_looking_for(sight))
    assert not checker.flags(panorama)
    left = int(place * 400)
    panorama[:, left : left + 100] = sight
    if turned:
        checker = _checker(_looking_for(sight.transpose(1, 0, 2)))
        panorama = np.ascontiguousarray(panorama.transpose(1, 0, 2))
    assert checker.flags(panorama)


def test_a_thread_of_pixels_is_seen_as_some_thirty_squares_only() -> None:
    component = _component()
    seen: list[int] = []

    def note(_: object, given: tuple[Tensor]) -> None:
        seen.append(len(given[0]))

    component.vision_model.register_forward_pre_hook(note)
    checker = SafetyChecker(component)
    for size in ((20_000, 1), (1, 20_000), (SIDE * MAX_ASPECT, SIDE), (SIDE, SIDE), (SIDE * 3 // 2, SIDE)):
        checker.flags(_noise(*size))
    assert seen == [31, 31, 31, 1, 2]


def test_the_picture_stays_as_it_is_and_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    rgb = _noise(60, 40)
    before = rgb.copy()
    rgb.flags.writeable = False
    assert _checker(lambda component: component.concept_embeds_weights.data.fill_(ALWAYS)).flags(rgb)
    assert np.array_equal(rgb, before)
    assert caplog.records == []


# Loading --------------------------------------------------------------------------------------------------------------


def test_a_saved_component_answers_as_it_did(folder: Path) -> None:
    sight = _noise(SIDE, SIDE, seed=3)
    weights = load_file(folder / "model.safetensors")
    component = _component()
    assert torch.equal(weights["concept_embeds"], component.concept_embeds)
    assert not SafetyChecker.load(folder, CPU).flags(sight)


def _copy(folder: Path, into: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Copy a component, its weights changed."""
    (into / "config.json").write_text((folder / "config.json").read_text())
    save_file(change(load_file(folder / "model.safetensors")), into / "model.safetensors", {"format": "pt"})
    return into


def test_weights_under_the_names_that_they_were_published_with_are_read(folder: Path, tmp_path: Path) -> None:
    sight = _noise(SIDE, SIDE, seed=3)

    def published(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        component = _component()
        _looking_for(sight)(component)
        weights |= {"concept_embeds": component.concept_embeds.data}
        weights |= {"concept_embeds_weights": component.concept_embeds_weights.data}
        renamed = {name.replace("vision_model.", "vision_model.vision_model."): weights[name] for name in weights}
        return renamed | {"vision_model.vision_model.embeddings.position_ids": torch.arange(17)[None]}

    checker = SafetyChecker.load(_copy(folder, tmp_path, published), CPU)
    assert checker.flags(sight)
    assert not checker.flags(_noise(SIDE, SIDE, seed=4))


def test_a_component_that_lacks_weights_is_refused_and_not_filled_with_random_numbers(
    folder: Path, tmp_path: Path
) -> None:
    def robbed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: weight for name, weight in weights.items() if name != "concept_embeds"}

    with pytest.raises(DeploymentError, match=f"{tmp_path} .* concept_embeds is missing"):
        SafetyChecker.load(_copy(folder, tmp_path, robbed), CPU)


def test_a_component_of_another_shape_is_refused(folder: Path, tmp_path: Path) -> None:
    misshapen = _copy(folder, tmp_path, lambda weights: weights | {"concept_embeds": torch.zeros(3, 8)})
    with pytest.raises(DeploymentError, match=str(tmp_path)):
        SafetyChecker.load(misshapen, CPU)


def test_a_missing_a_damaged_and_a_pickled_component_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="nowhere"):
        SafetyChecker.load(tmp_path / "nowhere", CPU)
    _copy(folder, tmp_path, dict)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors" * 10)
    with pytest.raises(DeploymentError, match=str(tmp_path)):
        SafetyChecker.load(tmp_path, CPU)
    (tmp_path / "model.safetensors").unlink()
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(DeploymentError, match=str(tmp_path)):
        SafetyChecker.load(tmp_path, CPU)

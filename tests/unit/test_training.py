"""Training: what a network learns from, and that it learns and goes on where it was."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from training import degradation, learning, pictures
from training.__main__ import RUNS, Run, train
from training.drawings import dead_leaves
from training.learning import Learner, Plan, charbonnier, difference, squares
from training.network import forward, grow, make
from training.pictures import Pool
from training.symmetry import Symmetry
from worker.upscaler.picture import Levels

SIDE = 192
"""Of a picture: at scale 4 the least for a patch of 16 pixels."""


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and small patches, saved often."""
    for name, value in (("_PATCHES", 2), ("_SAVED_EVERY", 4), ("_WARM_UP", 2)):
        monkeypatch.setattr(learning, name, value)


def picture(seed: int = 0, side: int = SIDE) -> Levels:
    return dead_leaves(np.random.default_rng(seed), side)


def pool(scale: int = 2, *, degrade: pictures.Degrade = degradation.shrink) -> Pool:
    return Pool([picture(0), picture(1)], scale, degrade)


@pytest.mark.parametrize("scale", [2, 4])
def test_a_patch_and_its_target_show_the_same_place(scale: int) -> None:
    one, random = pool(scale), np.random.default_rng(0)
    for _ in range(20):
        low, high = one.sample(12, random)
        assert low.shape == (12, 12, 3)
        assert high.shape == (12 * scale, 12 * scale, 3)
        again = np.asarray(Image.fromarray(np.ascontiguousarray(high)).resize((12, 12), Image.Resampling.BICUBIC))
        inner = slice(2, -2)  # the rim of the whole was shrunk with its neighbours in view
        assert np.abs(again[inner, inner].astype(int) - low[inner, inner]).mean() < 1


def test_a_picture_as_small_as_a_patch_and_what_is_around_it_can_be_learned_from() -> None:
    one, random = Pool([picture(side=pictures.around(16) * 2)], 2, degradation.shrink), np.random.default_rng(0)
    for _ in range(10):
        low, high = one.sample(16, random)
        assert (low.shape, high.shape) == ((16, 16, 3), (32, 32, 3))


def test_a_picture_is_learned_from_in_its_own_size_and_in_smaller_ones() -> None:
    ramp = np.broadcast_to(np.arange(SIDE, dtype=np.uint8)[:, None, None], (SIDE, SIDE, 3))
    one, random = Pool([ramp], 2, degradation.shrink), np.random.default_rng(0)
    highs = [one.sample(16, random)[1][:, 0, 0].astype(int) for _ in range(200)]
    steepest = max(abs(int(high[-1]) - int(high[0])) for high in highs)
    assert 31 * 1.4 < steepest < 31 / 0.6 + 2
    assert sum(abs(high[-1] - high[0]) == 31 for high in highs) > 30


def test_in_other_colours_a_picture_shows_the_same() -> None:
    random = np.random.default_rng(0)
    levels = random.integers(256, size=(16, 16, 3), dtype=np.uint8)
    kinds = {tuple(_alikeness(levels, pictures.recoloured(levels, random))) for _ in range(400)}
    assert len(kinds) == 12  # six orders of the colours, each as a positive and a negative


def test_contrast_is_taken_away_at_times_and_no_more_than_half_of_it() -> None:
    ramp, random = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3), np.random.default_rng(0)
    ranges = [int(np.ptp(pictures.recoloured(ramp, random))) for _ in range(400)]
    assert 127 <= min(ranges) < 140
    assert 150 < ranges.count(255) < 250


def _alikeness(levels: Levels, others: Levels) -> list[int]:
    """Tell which colour has become each of three: 1, 2 or 3, or negative where its tones are turned around."""
    both = np.concatenate([levels.reshape(-1, 3), others.reshape(-1, 3)], axis=1).astype(float)
    alike = np.corrcoef(both.T)[:3, 3:]
    assert np.abs(alike).max(axis=0) == pytest.approx([1, 1, 1], abs=1e-3)
    best = np.abs(alike).argmax(axis=0)
    return [(int(index) + 1) * (1 if alike[index, place] > 0 else -1) for place, index in enumerate(best)]


def marked(high: Levels, scale: int, random: np.random.Generator) -> Levels:
    """Stand in for wearing: a white rim in red, in green each pixel's row and column, modulo 16, in blue chance."""
    low = np.zeros_like(high[::scale, ::scale])
    rows, columns = np.indices(low.shape[:2]) % 16
    low[:, :, 0] = 255
    low[3:-3, 3:-3, 0] = 0
    low[:, :, 1] = rows * 16 + columns
    low[:, :, 2] = random.integers(256, size=low.shape[:2])
    return low


@pytest.fixture(scope="module")
def patches() -> list[Levels]:
    random = np.random.default_rng(0)
    one = Pool([picture()], 2, marked)
    return [one.sample(12, random)[0] for _ in range(300)]


def test_each_patch_is_worn_in_a_way_of_its_own(patches: list[Levels]) -> None:
    assert len({patch[:, :, 2].tobytes() for patch in patches}) == 300


def test_a_patch_begins_anywhere_in_the_squares_of_jpeg(patches: list[Levels]) -> None:
    begins = [int(patch[0, 0, 1]) for patch in patches]
    assert {begin // 16 for begin in begins} == {begin % 16 for begin in begins} == set(range(16))


def test_the_rim_of_what_was_worn_is_not_learned_from(patches: list[Levels]) -> None:
    assert not any(patch[:, :, 0].any() for patch in patches)


@pytest.mark.parametrize("run", RUNS, ids=[run.name for run in RUNS])
def test_the_smallest_pictures_suffice_for_the_patches_of_each_run(run: Run) -> None:
    least = min(pictures.LEAST_SIDE, pictures.DRAWING_SIDE)
    assert pictures.around(run.plan.side) * run.plan.scale <= least


def test_a_worn_picture_has_its_size_and_is_not_the_shrunk_one() -> None:
    clean = degradation.shrink(picture(), 2, np.random.default_rng(0))
    worn = [degradation.wear(picture(), 2, np.random.default_rng(seed)) for seed in range(20)]
    assert {levels.shape for levels in worn} == {clean.shape}
    changes = [np.abs(levels.astype(int) - clean).mean() for levels in worn]
    assert 0.5 < np.mean(changes) < 12


def test_every_eighth_photograph_is_held_out_and_small_ones_are_left_out(tmp_path: Path) -> None:
    for index in range(9):
        Image.new("RGB", (120 if index == 0 else 300, 520), (index, 0, 0)).save(tmp_path / f"{index}.png")
    learned, held_out = pictures.read(tmp_path)
    assert [levels[0, 0, 0] for levels in held_out] == [7]
    assert [levels[0, 0, 0] for levels in learned] == [1, 2, 3, 4, 5, 6, 8]


def test_a_network_begins_near_the_nearest_neighbours() -> None:
    low = torch.rand(1, 3, 12, 12)
    with torch.inference_mode():
        made = forward(make(2, 0), low)
    nearest = low.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert (made - nearest).abs().mean() < 0.1


@pytest.mark.parametrize("convolutions", [4, 5, 7, 8, 13])
def test_a_grown_network_makes_the_same_picture_with_larger_pixels(convolutions: int) -> None:
    low = torch.rand(1, 3, 12, 12)
    model, larger = make(2, 0, 4), make(4, 1, convolutions)
    larger.load_state_dict(grow(model.state_dict(), 4, convolutions))
    with torch.inference_mode():
        expected = forward(model, low).repeat_interleave(2, 2).repeat_interleave(2, 3)
        assert torch.allclose(forward(larger, low), expected, atol=1e-4)


def test_a_grown_network_is_symmetric() -> None:
    state = grow(make(2, 0, 3, 16).state_dict(), 4, 5)
    symmetry = Symmetry(make(4, 0, 5, 16))
    assert all(torch.allclose(symmetry.project(name, values), values, atol=1e-6) for name, values in state.items())


def test_no_network_is_grown_to_fewer_convolutions_than_it_has() -> None:
    with pytest.raises(ValueError, match="5 inner convolutions cannot be grown to 4"):
        grow(make(2, 0, 5).state_dict(), 2, 4)


def posed(planes: Tensor, turns: int, mirrored: bool) -> Tensor:
    turned = planes.rot90(turns, (-2, -1))
    return turned.flip(-1) if mirrored else turned


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("scale", [2, 4])
def test_a_network_enlarges_a_picture_alike_in_all_poses(scale: int, turns: int, mirrored: bool) -> None:
    model = make(scale, 1, 3, 16)
    symmetry = Symmetry(model)
    for name, values in model.state_dict().items():
        values.copy_(symmetry.project(name, values + 0.05 * torch.randn(values.shape)))
    low = torch.rand(1, 3, 10, 12)
    with torch.inference_mode():
        expected = posed(model(low), turns, mirrored)
        assert torch.allclose(model(posed(low, turns, mirrored)), expected, atol=1e-5)


def test_what_is_added_to_a_colour_is_added_to_what_a_network_makes() -> None:
    model = make(2, 1, 3, 16)
    symmetry = Symmetry(model)
    for name, values in model.state_dict().items():
        values.copy_(symmetry.project(name, values + 0.05 * torch.randn(values.shape)))
    low, more = torch.rand(1, 3, 20, 20), torch.tensor([0.1, -0.2, 0.3])[:, None, None]
    inner = (..., slice(10, -10), slice(10, -10))  # beyond the edge it sees black
    with torch.inference_mode():
        assert torch.allclose(model(low + more)[inner], (model(low) + more)[inner], atol=1e-5)


def test_sharing_weights_among_poses_leaves_the_noise_of_the_beginning_as_strong_as_it_was() -> None:
    state = make(2, 1, 4, 16).state_dict()
    inner = state["body.2.weight"].clone()
    inner[:, :, 1, 1] -= torch.eye(16)
    expected = {  # Kaiming's, and PyTorch's: 1 / √(3 · inputs)
        "inner": (inner, 0.3 * (2 / ((1 + 0.25**2) * 9 * 16)) ** 0.5),
        "first": (state["body.0.weight"], (3 * 9 * 3) ** -0.5),
        "last": (state["body.10.weight"], 0.1 * (3 * 9 * 16) ** -0.5),
    }
    for weight, strength in expected.values():
        assert float(weight.std()) == pytest.approx(strength, rel=0.15)


@pytest.mark.usefixtures("small")
def test_a_network_remains_symmetric_while_it_learns(tmp_path: Path) -> None:
    model = make(2, 0, 4, 16)
    symmetry = Symmetry(model)
    before = model.body[2].weight.clone()
    learner = Learner(model, Plan(2, 12, 0, features=16, side=16), tmp_path / "checkpoint")
    list(learner.learn(pool(), pool()))
    assert (model.body[2].weight != before).any()
    for state in (model.state_dict(), learner.mean):
        for name, values in state.items():
            assert torch.allclose(symmetry.project(name, values), values, atol=1e-6)


def test_a_network_whose_features_cannot_be_divided_by_eight_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 8 features, not 12"):
        make(2, 0, 2, 12)


def test_a_training_that_would_begin_with_weights_that_are_not_symmetric_is_refused(tmp_path: Path) -> None:
    model = make(2, 0, 4, 16)
    with torch.no_grad():
        model.body[0].weight[0, 0, 0, 0] += 0.1
    with pytest.raises(ValueError, match=r"cannot begin with weights that are not symmetric: body\.0\.weight"):
        Learner(model, Plan(2, 1, 0, features=16), tmp_path / "checkpoint")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("longest", [1e-3, 1e-2])
def test_no_gradient_is_longer_than_it_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest: float) -> None:
    monkeypatch.setattr(learning, "_LONGEST_GRADIENT", longest)
    model = make(2, 0, 4)
    list(Learner(model, Plan(2, 1, 0, side=16), tmp_path / "checkpoint").learn(pool(), pool()))
    squares = sum(float((weight.grad**2).sum()) for weight in model.parameters())
    assert squares**0.5 == pytest.approx(longest, rel=1e-3)


def test_the_loss_counts_errors_of_luma_beside_those_of_colour() -> None:
    black = torch.zeros(1, 3, 4, 4)

    def off(red: float, green: float, blue: float) -> float:
        return float(difference(black + torch.tensor([red, green, blue])[:, None, None], black, charbonnier))

    assert off(0.1, 0.1, 0.1) == pytest.approx(0.2, rel=0.01)
    assert off(0.3, 0, 0) < off(0, 0.3, 0)


def test_squares_count_few_large_errors_more_than_many_small_ones() -> None:
    few, many = torch.zeros(100), torch.full((100,), 0.01)
    few[0] = 1
    assert charbonnier(few) == pytest.approx(float(charbonnier(many)), rel=0.1)
    assert squares(few) > 50 * squares(many)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("loss", ["charbonnier", "squares"])
def test_what_is_learned_is_seen_in_pictures_that_were_not(
    tmp_path: Path, loss: Literal["charbonnier", "squares"]
) -> None:
    high = picture(2, 64)
    low = degradation.shrink(high, 2, np.random.default_rng(0))

    def measure(state: Mapping[str, Tensor]) -> float:
        model = make(2, 0, 4)
        model.load_state_dict(state)
        with torch.inference_mode():
            made, wanted = forward(model, pictures.tensor([low])), pictures.tensor([high])
            return float(difference(made, wanted, charbonnier))

    plan = Plan(scale=2, steps=60, seed=0, side=16, loss=loss)
    learner = Learner(make(2, 0, 4), plan, tmp_path / "checkpoint")
    before = measure(learner.mean)
    list(learner.learn(pool(), pool()))
    assert measure(learner.mean) < 0.9 * before
    assert learner.seconds > 0


@pytest.mark.usefixtures("small")
def test_muon_moves_the_inner_convolutions_by_orthogonal_steps_and_nothing_else(tmp_path: Path) -> None:
    model = make(2, 0, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = Plan(scale=2, steps=4, seed=0, side=16, rate=0.0, muon=0.01)
    list(Learner(model, plan, tmp_path / "checkpoint").learn(pool(), pool()))
    steps = {name: value - before[name] for name, value in model.state_dict().items()}
    moved = {name: step for name, step in steps.items() if float(step.abs().max()) > 1e-6}  # symmetry rounds
    assert sorted(moved) == [f"body.{index}.weight" for index in (2, 4, 6, 8)]
    for step in moved.values():
        lengths = np.linalg.svd(step.permute(0, 2, 3, 1).flatten(1).numpy(), compute_uv=False)
        assert lengths.max() < 2 * np.median(lengths)


@pytest.mark.usefixtures("small")
def test_a_training_that_was_interrupted_ends_as_one_that_was_not(tmp_path: Path) -> None:
    worn = pool(degrade=degradation.wear)
    plan = Plan(scale=2, steps=12, seed=0, side=16)
    straight = Learner(make(2, 0, 4), plan, tmp_path / "straight")
    list(straight.learn(worn, worn))
    next(Learner(make(2, 0, 4), plan, tmp_path / "pieces").learn(worn, worn))  # what came after that is lost
    rest = Learner(make(2, 7, 4), plan, tmp_path / "pieces")
    assert rest.step == 4
    list(rest.learn(worn, worn))
    assert all(torch.allclose(straight.mean[name], rest.mean[name], atol=1e-6) for name in straight.mean)


@pytest.mark.usefixtures("small")
def test_a_run_writes_weights_that_say_how_they_came_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.pictures.DRAWINGS", 1)
    monkeypatch.setattr("training.pictures.LEAST_SIDE", SIDE)
    folder, into = tmp_path / "training", tmp_path / "networks"
    (folder / "photographs").mkdir(parents=True)
    for index in range(8):
        Image.fromarray(picture(index)).save(folder / "photographs" / f"{index}.png")
    first = Run("small-x2", "fidelity", Plan(scale=2, steps=4, seed=1, convolutions=2, side=16), shipped=False)
    train(first, folder, into)
    train(
        Run("small-x4", "restore", Plan(scale=4, steps=4, seed=2, convolutions=3, side=16), start="small-x2"),
        folder,
        into,
    )
    assert [file.name for file in into.iterdir()] == ["small-x4.safetensors"]
    opened: Any = safe_open(into / "small-x4.safetensors", "pt")
    with opened as file:
        facts = file.metadata()
    assert facts["start"] == "small-x2"
    assert (facts["scale"], facts["variant"], facts["steps"], facts["seed"]) == ("4", "restore", "4 of 4", "2")
    assert facts["held_out"].endswith(" dB")
    assert {value.dtype for value in load_file(into / "small-x4.safetensors").values()} == {torch.float16}


def test_a_run_that_begins_with_another_s_weights_says_so_when_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "photographs").mkdir()
    late = Run("late-x2", "fidelity", Plan(scale=2, steps=1, seed=1), start="early-x2")
    with pytest.raises(SystemExit, match="early-x2 comes first"):
        train(late, tmp_path, tmp_path)

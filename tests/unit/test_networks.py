"""The networks that ship with the project: what they do, and what the model card and spandrel say of them."""

import io
import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

from training.__main__ import RUNS, Run
from training.drawings import dead_leaves
from training.network import make
from training.symmetry import Symmetry
from worker.upscaler import checkpoints
from worker.upscaler.checkpoints import OWN_DIR, import_spandrel
from worker.upscaler.picture import Levels
from worker.upscaler.plan import Size
from worker.upscaler.strips import Rows

SHIPPED = [run for run in RUNS if run.shipped]
NAMES = [run.name for run in SHIPPED]
MEGABYTE = 10**6


def facts(name: str) -> dict[str, str]:
    opened: Any = safe_open(OWN_DIR / f"{name}.safetensors", "pt")
    with opened as file:
        return file.metadata()


def test_the_networks_are_those_of_the_training_and_small_together() -> None:
    files = sorted(OWN_DIR.glob("*.safetensors"))
    assert [file.stem for file in files] == sorted(NAMES)
    assert sum(file.stat().st_size for file in files) <= 5 * MEGABYTE


@pytest.mark.parametrize("name", NAMES)
def test_spandrel_knows_our_networks(name: str) -> None:
    loader = import_spandrel().ModelLoader(torch.device("cpu"))
    found = loader.load_from_file(OWN_DIR / f"{name}.safetensors")
    assert (found.architecture.id, found.scale, found.purpose) == ("Compact", int(name[-1]), "SR")
    assert (found.input_channels, found.output_channels) == (3, 3)


def rows(name: str) -> list[list[str]]:
    """Give the cells of the rows that the model card's tables have of a network: of its training and its shape."""
    lines = (OWN_DIR / "README.md").read_text("utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith(f"| `{name}`")]


@pytest.mark.parametrize("name", NAMES)
def test_the_model_card_tells_what_the_file_tells(name: str) -> None:
    said, _ = rows(name)
    known = facts(name)
    assert said[1:4] == [f"×{known['scale']}", known["variant"], known["start"] or "noise"]
    assert [re.sub(r"\D", "", cell) for cell in said[4:7]] == [
        known["steps"].split(" of ")[0],
        known["seed"],
        str(round(int(known["seconds"]) / 60)),
    ]


@pytest.mark.parametrize("run", SHIPPED, ids=NAMES)
def test_the_model_card_tells_how_large_the_networks_are(run: Run) -> None:
    _, said = rows(run.name)
    count = sum(values.numel() for values in load_file(OWN_DIR / f"{run.name}.safetensors").values())
    assert said[1:] == [str(run.plan.convolutions), str(run.plan.features), f"{round(count, -3):,}"]


@pytest.mark.parametrize("run", SHIPPED, ids=NAMES)
def test_a_file_holds_a_symmetric_network_as_its_run_plans_it(run: Run) -> None:
    plan, known = run.plan, facts(run.name)
    assert known["steps"] == f"{plan.steps} of {plan.steps}"
    assert [known[name] for name in ("scale", "variant", "seed", "start")] == [
        str(plan.scale),
        run.variant,
        str(plan.seed),
        run.start or "",
    ]
    weights = load_file(OWN_DIR / f"{run.name}.safetensors")
    model = make(plan.scale, 0, plan.convolutions, plan.features)
    model.load_state_dict(weights)
    symmetry = Symmetry(model)
    for name, values in model.state_dict().items():
        rounding = float(values.abs().max()) * 2**-11  # of float16
        assert torch.allclose(symmetry.project(name, values), values, rtol=0, atol=rounding)


# What they have learnt ------------------------------------------------------------------------------------------------

SIDE = 192


@pytest.fixture(scope="module")
def truth() -> Levels:
    """Draw a picture that training does not: its seeds begin with 0."""
    return dead_leaves(np.random.default_rng([314159, 1]), SIDE)


def shrunk(truth: Levels, scale: int) -> Image.Image:
    return Image.fromarray(truth).resize((SIDE // scale, SIDE // scale), Image.Resampling.BICUBIC)


def compressed(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=75)
    return Image.open(file).convert("RGB")


def decibels(truth: Levels, made: Levels, scale: int) -> float:
    """Return the PSNR without a border as wide as the scale."""
    inner = slice(scale, -scale)
    difference = truth[inner, inner].astype(np.float64) - made[inner, inner]
    return float(20 * np.log10(255) - 10 * np.log10((difference**2).mean()))


@pytest.fixture
def enlarged(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(checkpoints, "OWN_DIR", OWN_DIR)

    def enlarged(variant: checkpoints.Variant, scale: int, picture: Image.Image) -> Levels:
        networks = checkpoints.load_own(variant, torch.device("cpu"), "fp32")
        network = next(network for network in networks if network.scale == scale)
        rows = Rows([np.asarray(picture)], Size(*picture.size))
        return np.concatenate(list(network.enlarge(rows, lambda: None, lambda _: None)))

    return enlarged


@pytest.mark.parametrize(("scale", "gain"), [(2, 4.0), (4, 2.5)])
def test_fidelity_comes_far_closer_to_a_drawing_than_bicubic(
    truth: Levels, enlarged: Any, scale: int, gain: float
) -> None:
    low = shrunk(truth, scale)
    bicubic = np.asarray(low.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    assert decibels(truth, enlarged("fidelity", scale, low), scale) > decibels(truth, bicubic, scale) + gain


@pytest.mark.parametrize(("scale", "gain"), [(2, 0.8), (4, 0.5)])
def test_restore_comes_closer_to_a_compressed_drawing_than_fidelity(
    truth: Levels, enlarged: Any, scale: int, gain: float
) -> None:
    low = compressed(shrunk(truth, scale))
    fidelity, restored = (enlarged(variant, scale, low) for variant in ("fidelity", "restore"))
    assert decibels(truth, restored, scale) > decibels(truth, fidelity, scale) + gain

"""The networks that ship with the project: what the model card and spandrel say of them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from training.__main__ import RUNS
from worker.upscaler.checkpoints import OWN_DIR, import_spandrel

NAMES = [run.name for run in RUNS if run.shipped]
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


@pytest.mark.parametrize("name", NAMES)
def test_the_model_card_tells_what_the_file_tells(name: str) -> None:
    card = Path(OWN_DIR / "README.md").read_text("utf-8")
    row = next(line for line in card.splitlines() if line.startswith(f"| `{name}`"))
    said = [cell.strip() for cell in row.strip("|").split("|")]
    known = facts(name)
    steps, planned = known["steps"].split(" of ")
    assert steps == planned
    assert said[1:4] == [f"×{known['scale']}", known["variant"], known["start"] or "noise"]
    assert [re.sub(r"\D", "", cell) for cell in said[4:7]] == [
        steps,
        known["seed"],
        str(round(int(known["seconds"]) / 60)),
    ]

"""Train the networks of the superres engine, in pieces: what was interrupted goes on where it was.

    .venv/bin/python -m training [--only NAME …] [--folder FOLDER] [--into FOLDER]

Photographs and checkpoints lie in --folder; what was learned is written into --into with each checkpoint, so that a
training can be judged before its end. The last two networks learn to repair, the others to undo exact shrinking.
"""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import (
    load_file,  # pyright: ignore[reportUnknownVariableType]
    save_file,  # pyright: ignore[reportUnknownVariableType]
)
from torch import Tensor

from training import degradation, photographs, pictures
from training.learning import Learner, Plan
from training.network import device, forward, grow, make
from training.pictures import Degrade, Pool
from worker.upscaler.picture import Levels

logger = logging.getLogger("training")


@dataclass(frozen=True)
class Run:
    """One network: what it learns, and whose weights it begins with."""

    name: str
    variant: str
    plan: Plan
    start: str | None = None
    shipped: bool = True
    """Else its weights stay with the checkpoints: others begin with them."""


RUNS = [
    Run("fidelity-x2", "fidelity", Plan(scale=2, steps=12_000, seed=5, convolutions=22)),
    Run("first-x4", "fidelity", Plan(scale=4, steps=17_000, seed=11, features=64, loss="squares"), shipped=False),
    Run(
        "fidelity-x4",
        "fidelity",
        Plan(
            scale=4,
            steps=30_000,
            seed=12,
            convolutions=22,
            features=64,
            rate=6e-4,
            muon=0.004,
            loss="squares",
            side=40,
        ),
        start="first-x4",
    ),
    Run("restore-x2", "restore", Plan(scale=2, steps=12_000, seed=3)),
    Run("restore-x4", "restore", Plan(scale=4, steps=5_000, seed=4, rate=6e-4, muon=0.004), start="restore-x2"),
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training")
    parser.add_argument("--only", nargs="+", choices=[run.name for run in RUNS])
    parser.add_argument("--folder", type=Path, default=Path(".upscaled/training"))
    parser.add_argument("--into", type=Path, default=Path("worker/upscaler/networks"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    photographs.fetch(arguments.folder / "photographs")
    for run in RUNS:
        if run.name in (arguments.only or [run.name]):
            train(run, arguments.folder, arguments.into)


def train(run: Run, folder: Path, into: Path) -> None:
    """Train one network, or go on with it, and write its weights."""
    plan, scale, file = run.plan, run.plan.scale, _file(run, folder, into)
    model = make(scale, plan.seed, plan.convolutions, plan.features)
    if run.start:
        model.load_state_dict(grow(_weights(run.start, folder, into), scale, plan.convolutions))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    learned, held_out = pictures.read(folder / "photographs")
    drawings = pictures.drawn(pictures.DRAWINGS, pictures.DRAWING_SIDE, seed=0)
    degrade = degradation.wear if run.variant == "restore" else degradation.shrink
    pools = [Pool(levels, scale, degrade) for levels in (learned, drawings)]
    learner = Learner(model, plan, folder / f"{run.name}.checkpoint")
    for loss in learner.learn(*pools):
        logger.info("%s: step %d, loss %.5f, %.0f s", run.name, learner.step, loss, learner.seconds)
        _write(learner, run, file)
    model.load_state_dict(learner.mean)
    decibels = _validate(model, held_out, scale, degrade)
    logger.info("%s: PSNR %.2f dB on photographs held out", run.name, decibels)
    _write(learner, run, file, held_out=f"{decibels:.2f} dB")


def _file(run: Run, folder: Path, into: Path) -> Path:
    return (into if run.shipped else folder) / f"{run.name}.safetensors"


def _weights(name: str, *folders: Path) -> dict[str, Tensor]:
    for folder in folders:
        if (file := folder / f"{name}.safetensors").exists():
            return load_file(file)
    raise SystemExit(f"{name} comes first: what is to be trained begins with its weights.")


def _validate(model: Any, held_out: list[Levels], scale: int, degrade: Degrade) -> float:
    """Give the mean PSNR over all channels of pictures that were not learned from, in dB."""
    ratios: list[float] = []
    for index, levels in enumerate(held_out):
        height, width = (length // scale * scale for length in levels.shape[:2])
        high = levels[:height, :width]
        low = degrade(high, scale, np.random.default_rng(index))
        with torch.inference_mode():
            made = forward(model, pictures.tensor([low]).to(device(model)))[0]
        error = made.clamp(0, 1).permute(1, 2, 0).cpu().numpy() - high / 255
        ratios.append(float(-10 * np.log10((error**2).mean())))
    return float(np.mean(ratios))


def _write(learner: Learner, run: Run, file: Path, **more: str) -> None:
    """Write the mean weights, in float16, which costs nothing that can be seen, and how they came to be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "scale": run.plan.scale,
        "variant": run.variant,
        "start": run.start or "",
        "steps": f"{learner.step} of {run.plan.steps}",
        "seconds": round(learner.seconds),
        "seed": run.plan.seed,
        **more,
    }
    tensors = {name: value.to(torch.float16).contiguous() for name, value in learner.mean.items()}
    save_file(tensors, file, {name: str(fact) for name, fact in facts.items()})
    file.chmod(0o644)  # the library writes it for its owner alone, and it is to be installed


if __name__ == "__main__":
    main()

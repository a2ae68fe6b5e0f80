"""One training: from pictures to a network's weights, in pieces that go on where the last one ended."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.network import forward
from training.pictures import Pool, batch

logger = logging.getLogger(__name__)

_LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue (ITU-R BT.601), of whose luma PSNR-Y speaks."""

_ROUNDED = 1e-3
"""Of the loss: about a quarter of a level."""

_PATCHES = 9
_SIDE = 64
"""Of a patch, in pixels of the input."""

_WARM_UP = 200
_DECAY = 0.4
"""Share of the steps, at the end, over which the learning rate falls to zero."""

_AVERAGED = 0.999
"""Share of the running mean of the weights that each step keeps."""

_SAVED_EVERY = 500


@dataclass(frozen=True)
class Plan:
    """How one network is trained."""

    scale: int
    steps: int
    rate: float
    seed: int


class Learner:
    """A network, the running mean of its weights, and what its optimiser remembers; kept in a file between pieces."""

    def __init__(self, model: Any, plan: Plan, file: Path) -> None:
        self.model = model
        self.plan = plan
        self.step = 0
        self.seconds = 0.0
        self.mean = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._file = file
        self._optimiser = torch.optim.Adam(model.parameters(), plan.rate, betas=(0.9, 0.99))
        if file.exists():
            self._restore()

    def learn(self, photographs: Pool, drawings: Pool) -> Iterator[float]:
        """Go on until all steps are done; gives the mean loss each time the state was saved."""
        losses: list[Tensor] = []
        began = time.monotonic()
        while self.step < self.plan.steps:
            losses.append(self._advance(*self._batch(photographs, drawings)))
            self.step += 1
            if self.step % _SAVED_EVERY == 0 or self.step == self.plan.steps:
                self.seconds += time.monotonic() - began
                began = time.monotonic()
                self._save()
                yield float(torch.stack(losses).mean())
                losses.clear()

    def _batch(self, photographs: Pool, drawings: Pool) -> tuple[Tensor, Tensor]:
        random = np.random.default_rng([self.plan.seed, self.step])
        return batch(photographs, drawings, _PATCHES, _SIDE, random, self.step)

    def _advance(self, low: Tensor, high: Tensor) -> Tensor:
        for group in self._optimiser.param_groups:
            group["lr"] = self.plan.rate * _pace(self.step, self.plan.steps)
        self._optimiser.zero_grad()
        loss = difference(forward(self.model, low), high)
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self._optimiser.step()  # pyright: ignore[reportUnknownMemberType]
        kept = min(_AVERAGED, self.step / (self.step + 10))
        for name, value in self.model.state_dict().items():
            self.mean[name].lerp_(value, 1 - kept)
        return loss.detach()

    def _save(self) -> None:
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "mean": self.mean,
            "optimiser": self._optimiser.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = self._file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._file)

    def _restore(self) -> None:
        state = torch.load(self._file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.mean = state["mean"]
        self._optimiser.load_state_dict(state["optimiser"])
        self.step, self.seconds = state["step"], state["seconds"]
        logger.info("goes on after step %d of %d", self.step, self.plan.steps)


def difference(made: Tensor, wanted: Tensor) -> Tensor:
    """Compare by the Charbonnier loss, of the colours and of their luma in equal parts."""
    error = made - wanted
    luma = (error * torch.tensor(_LUMA)[:, None, None]).sum(dim=1)
    return _charbonnier(error) + _charbonnier(luma)


def _charbonnier(error: Tensor) -> Tensor:
    """Charbonnier et al., 1994: the absolute error, rounded off where it is near zero."""
    return (error * error + _ROUNDED**2).sqrt().mean()


def _pace(step: int, steps: int) -> float:
    """Which share of the learning rate a step has: a short rise, a plain, a fall to zero."""
    return min(1.0, (step + 1) / _WARM_UP, (steps - step) / (_DECAY * steps))

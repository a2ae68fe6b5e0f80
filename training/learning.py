"""One training: from pictures to a network's weights, in pieces that go on where the last one ended."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from training.network import CONVOLUTIONS, FEATURES, device, forward, inner
from training.pictures import Pool, batch
from training.symmetry import Symmetry

logger = logging.getLogger(__name__)

_LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue (ITU-R BT.601), of whose luma PSNR-Y speaks."""

_ROUNDED = 1e-3
"""Of the Charbonnier loss: about a quarter of a level."""

_SQUARED = 10.0
"""By what squares are weighted: at scale 4 they are then about as much as the Charbonnier loss."""

_PATCHES = 8

_LONGEST_GRADIENT = 0.1
"""Longer ones are cut. Squares make some very long: most of photographs had 0.1, one of drawings 36."""

_WARM_UP = 200
_DECAY = 0.95
"""Share of the steps, at the end, over which the rates fall to zero."""

_AVERAGED = 0.999
"""Share of the running mean of the weights that each step keeps."""

_SAVED_EVERY = 500


@dataclass(frozen=True)
class Plan:
    """How one network is trained."""

    scale: int
    steps: int
    seed: int
    convolutions: int = CONVOLUTIONS
    features: int = FEATURES
    rate: float = 1e-3
    """Of Adam, at its highest."""
    muon: float = 0.006
    """The same of Muon, which trains the inner convolutions in Adam's place."""
    loss: Literal["charbonnier", "squares"] = "charbonnier"
    """Squares are what PSNR speaks of. Measured at scale 4, 500 steps from a trained network on: 0.013 dB better on the
    photographs held out, 0.025 on eight of the Kodak suite; at scale 2 no better."""
    side: int = 32
    """Of a patch, in pixels of the input. Smaller ones teach faster at first. Measured at scale 4, after 90 seconds
    from noise, on the photographs held out: 0.97 dB over bicubic with 48, 1.00 with 32."""


class Learner:
    """A network, the running mean of its weights, and what its optimiser remembers; kept in a file between pieces.

    Raises:
        ValueError: the network is not symmetric.
    """

    def __init__(self, model: Any, plan: Plan, file: Path) -> None:
        self.model = model
        self.plan = plan
        self.step = 0
        self.seconds = 0.0
        self.mean = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._file = file
        self._optimiser = _Optimiser(model, plan)
        self._symmetry = Symmetry(model)
        if file.exists():
            self._restore()
        self._symmetry.check(model)

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
        # Of seed and step alone: a training that was interrupted goes on as it would have.
        random = np.random.default_rng([self.plan.seed, self.step])
        return batch(photographs, drawings, _PATCHES, self.plan.side, random)

    def _advance(self, low: Tensor, high: Tensor) -> Tensor:
        self.model.zero_grad()
        where = device(self.model)
        loss = difference(forward(self.model, low.to(where)), high.to(where), _LOSSES[self.plan.loss])
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        for name, weight in self.model.named_parameters():
            weight.grad.copy_(self._symmetry.project(name, weight.grad))
        nn.utils.clip_grad_norm_(self.model.parameters(), _LONGEST_GRADIENT)
        self._optimiser.advance(_pace(self.step, self.plan))
        kept = min(_AVERAGED, self.step / (self.step + 10))
        for name, value in self.model.state_dict().items():
            value.copy_(self._symmetry.project(name, value))  # Adam takes each number's step alone, and Muon rounds
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
        state = torch.load(self._file, map_location=device(self.model), weights_only=True)
        self.model.load_state_dict(state["model"])
        self.mean = state["mean"]
        self._optimiser.load_state_dict(state["optimiser"])
        self.step, self.seconds = state["step"], state["seconds"]
        logger.info("goes on after step %d of %d", self.step, self.plan.steps)


class _Optimiser:
    """Muon (Jordan et al., 2024) for the inner convolutions, Adam (Kingma and Ba, 2015) for all else.

    Muon makes each step of a matrix orthogonal. A convolution is the matrix of its outputs by all that they are made
    of. Measured at scale 2 after 500 steps from noise, at a rate of 0.02 and before weights were symmetric, on eight
    photographs of the Kodak suite: 1.99 dB over bicubic, with Adam alone 1.87.
    """

    def __init__(self, model: Any, plan: Plan) -> None:
        self._weights = inner(model)
        apart = {id(weight) for weight in self._weights}
        rest = [weight for weight in model.parameters() if id(weight) not in apart]
        self._matrices = [nn.Parameter(_matrix(weight.data)) for weight in self._weights]
        self._rates = {"adam": plan.rate, "muon": plan.muon}
        self._parts: dict[str, torch.optim.Optimizer] = {
            "adam": torch.optim.Adam(rest, plan.rate, betas=(0.9, 0.99)),
            "muon": torch.optim.Muon(self._matrices, plan.muon, weight_decay=0),
        }

    def advance(self, pace: float) -> None:
        """Take a step along the gradients, at that share of the rates."""
        for matrix, weight in zip(self._matrices, self._weights, strict=True):
            if weight.grad is not None:
                matrix.grad = _matrix(weight.grad)
        for name, part in self._parts.items():
            for group in part.param_groups:
                group["lr"] = self._rates[name] * pace
            part.step()  # pyright: ignore[reportUnknownMemberType]

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts.items():
            part.load_state_dict(state[name])


def _matrix(values: Tensor) -> Tensor:
    """View (out, in, height, width), which lies in memory channels last, as (out, all the others)."""
    out = len(values)
    return values.permute(0, 2, 3, 1).view(out, -1)


def difference(made: Tensor, wanted: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Compare by the loss of the colours and of their luma in equal parts."""
    error = made - wanted
    luma = (error * torch.tensor(_LUMA, device=made.device)[:, None, None]).sum(dim=1)
    return loss(error) + loss(luma)


def charbonnier(error: Tensor) -> Tensor:
    """Charbonnier et al., 1994: the absolute error, rounded off where it is near zero."""
    return (error * error + _ROUNDED**2).sqrt().mean()


def squares(error: Tensor) -> Tensor:
    return (error * error).mean() * _SQUARED


_LOSSES = {"charbonnier": charbonnier, "squares": squares}


def _pace(step: int, plan: Plan) -> float:
    """Which share of its rate an optimiser has: a short rise, a short plain, a long fall to zero."""
    return min(1.0, (step + 1) / _WARM_UP, (plan.steps - step) / (_DECAY * plan.steps))

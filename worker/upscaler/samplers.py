"""The samplers: how noise is taken out of an image, step by step, and the noise that some of them put back.

All work on x = image + sigma × noise ("variance exploding"), where the way to the image is dx/dsigma = (x - D) / sigma
and D = denoise(x, sigma) is the network's estimate of the image. A step is a sum of x, estimates and noise; what they
are multiplied by is worked out in Python's floats, so that nobody ever waits for a GPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import factorial, log, sqrt
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from core.options import Sampler
from worker.upscaler.schedules import sigma_at, timestep

Denoise: TypeAlias = Callable[[Tensor, float], Tensor]
"""From x and its sigma to the estimate of the image."""

_TCD_GAMMA = 0.3
"""Share of the way back to the image, in timesteps, that TCD goes beyond its target before noise is added."""

_SCATTER = 0x85EBCA6B
"""An odd number of 32 irregular bits: numbers multiplied by it stay apart from each other, and from small ones."""


class Noise:
    """Standard normal noise that depends on the seed alone: not on the device, nor on how the canvas is tiled.

    Each call draws afresh; the first draw is the canvas's initial noise. Any seed from 0 to 2**63 - 1 will do.
    """

    def __init__(self, seed: int, shape: tuple[int, ...], device: torch.device) -> None:
        # The CPU's generator looks at the lower 32 bits only: the upper ones, if any, are mixed into them.
        self._generator = torch.Generator().manual_seed((seed ^ (seed >> 32) * _SCATTER) % 2**32)
        self._shape = shape
        self._device = device

    def __call__(self) -> Tensor:
        # Each draw has pinned memory of its own, which torch does not hand out again before the copy is done.
        pinned = self._device.type == "cuda"
        drawn = torch.randn(self._shape, generator=self._generator, dtype=torch.float32, pin_memory=pinned)
        return drawn.to(self._device, non_blocking=pinned)


def sample(
    sampler: Sampler, denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Callable[[], Tensor]
) -> Tensor:
    """Take the noise out of `x`, which has as much of it as `sigmas` begins with.

    `sigmas` fall strictly, and end with 0.0: what `denoise` makes of the last level before is the result. `x` is left
    as it is; shape, dtype and device stay. Only samplers that add noise call `noise`.
    """
    step = _STEPS[sampler]
    points: list[_Point] = []
    for sigma, target in pairwise(sigmas[:-1]):
        points = [_Point(sigma, x, denoise(x, sigma)), *points[:3]]
        x = step(_Step(points, target, denoise, noise))
    return denoise(x, sigmas[-2])


def count_evaluations(sampler: Sampler, sigmas: Sequence[float]) -> int:
    """Count how often `sample` will call `denoise`: once or, but for the last step, twice per step."""
    steps = len(sigmas) - 1
    return 2 * steps - 1 if sampler in _EVALUATING_TWICE else steps


class _Point(NamedTuple):
    """A place on the way to the image."""

    sigma: float
    x: Tensor
    denoised: Tensor

    @property
    def slope(self) -> Tensor:
        return (self.x - self.denoised) / self.sigma


@dataclass(frozen=True, slots=True)
class _Step:
    """What a sampler knows when it is asked for x at `target`."""

    points: list[_Point]
    """Where it has been, the newest first: the place to go on from, and up to three before."""
    target: float
    denoise: Denoise
    noise: Callable[[], Tensor]

    @property
    def here(self) -> _Point:
        return self.points[0]

    def renoised(self, x: Tensor, down: float) -> Tensor:
        """Add fresh noise to an `x` at `down`, so that it is at the target."""
        return _noised(x, down, self.target, self.noise)


_Down: TypeAlias = Callable[[float, float], float]
"""From sigma and target to the level that a step goes down to; fresh noise then makes up for what lies between."""


def _straight(_sigma: float, target: float) -> float:
    """Follow the ODE: no noise."""
    return target


def _ancestral(sigma: float, target: float) -> float:
    """Follow the SDE (eta = 1): the distribution at the target of all that x and D together may have come from."""
    return target**2 / sigma


def _to_image(_sigma: float, _target: float) -> float:
    """Go to the estimate itself (Luo et al., 2023)."""
    return 0.0


def _beyond(_sigma: float, target: float) -> float:
    """Go further than the target, but not all the way (Zheng et al., 2024)."""
    return min(target, sigma_at((1 - _TCD_GAMMA) * timestep(target)))


def _moved(point: _Point, denoised: Tensor, target: float) -> Tensor:
    """Go from `point` to `target` as if the estimate were `denoised` all along: the exact solution then."""
    return torch.lerp(denoised, point.x, target / point.sigma)


def _noised(x: Tensor, sigma: float, target: float, noise: Callable[[], Tensor]) -> Tensor:
    return x if sigma == target else x + sqrt((target - sigma) * (target + sigma)) * noise()


def _first_order(step: _Step, down: _Down) -> Tensor:
    """Trust the estimate for the whole step."""
    level = down(step.here.sigma, step.target)
    return step.renoised(_moved(step.here, step.here.denoised, level), level)


def _heun(step: _Step) -> Tensor:
    """Average the slopes at both ends (Karras et al., 2022)."""
    x, width = step.here.x, step.target - step.here.sigma
    guess = _moved(step.here, step.here.denoised, step.target)
    end = _Point(step.target, guess, step.denoise(guess, step.target))
    return x + width / 2 * (step.here.slope + end.slope)


def _dpm2(step: _Step, down: _Down) -> Tensor:
    """Take the slope in the middle of the step, by log sigma (Lu et al., 2022, DPM-Solver-2)."""
    here, level = step.here, down(step.here.sigma, step.target)
    middle = sqrt(here.sigma * level)
    guess = _moved(here, here.denoised, middle)
    halfway = _Point(middle, guess, step.denoise(guess, middle))
    return step.renoised(here.x + (level - here.sigma) * halfway.slope, level)


def _dpmpp_single(step: _Step, down: _Down) -> Tensor:
    """Take the estimate in the middle of the step, by log sigma (Lu et al., 2022, DPM-Solver++(2S)).

    With noise, what came in before the middle goes on to the target, where it shrinks as x does: both parts of the
    step then see one Brownian motion, in the SDE's own time 1 / sigma².
    """
    here, target = step.here, step.target
    middle = sqrt(here.sigma * target)
    level = down(here.sigma, middle)
    guess = _moved(here, here.denoised, level)
    noised = _noised(guess, level, middle, step.noise)
    denoised = step.denoise(noised, middle)
    x = _moved(here, denoised, down(here.sigma, target))
    if noised is guess:
        return x
    level = down(middle, target)
    return step.renoised(x + level / middle * (noised - guess), level)


def _dpmpp_multi(step: _Step, order: int, down: _Down) -> Tensor:
    """Extend the estimates so far by a polynomial in log sigma (Lu et al., 2022, DPM-Solver++(2M), and with noise).

    The weights are the published ones, k-diffusion's and diffusers', and not quite the polynomial's: order 2 rounds the
    change's to 1/2, order 3 counts the curvature half. Exact ones would make other images than everybody else's.
    """
    points = step.points[:order]
    level = down(step.here.sigma, step.target)
    moments = _moments(-log(step.here.sigma / level), len(points))
    if order == 2 and len(points) == 2:
        moments[1] = moments[0] / 2
    elif len(points) == 3:
        moments[2] /= 2
    return step.renoised(_integrated(step.here, points, step.target, level, moments), level)


def _unipc(step: _Step, order: int) -> Tensor:
    """Correct the step before by the estimate that it led to, then extend as above (Zhao et al., 2023, B2(h))."""
    if len(step.points) > 1:
        here, before, target = step.here, step.points[1], step.here.sigma
        step.points[0] = here._replace(x=_unipc_moved(before, step.points[: order + 1], target))
    return _unipc_moved(step.here, step.points[:order], step.target)


def _unipc_moved(start: _Point, points: list[_Point], target: float) -> Tensor:
    moments = _moments(-log(start.sigma / target), len(points))
    if len(points) == 2:
        moments[1] = moments[0] / 2
    return _integrated(start, points, target, target, moments)


def _lms(step: _Step) -> Tensor:
    """Extend four slopes by a polynomial in sigma."""
    sigma, width, points = step.here.sigma, step.target - step.here.sigma, step.points
    return _along(step, [(point.sigma - sigma) / width for point in points], _moments(0, len(points)))


def _deis(step: _Step) -> Tensor:
    """Extend three slopes by a polynomial in log sigma (Zhang and Chen, 2022, log-rho AB-DEIS)."""
    points = step.points[:3]
    moments = _moments(log(step.here.sigma / step.target), len(points))
    return _along(step, _places(step.here, points, step.target), moments)


def _ipndm(step: _Step) -> Tensor:
    """Extend four slopes as if all steps were equally long, by Adams and Bashforth (Zhang and Chen, 2022, iPNDM)."""
    return _along(step, [-float(age) for age in range(len(step.points))], _moments(0, len(step.points)))


def _along(step: _Step, places: list[float], moments: list[float]) -> Tensor:
    """Go along the slopes that lie at `places`."""
    width = (step.target - step.here.sigma) / moments[0]
    slopes = (point.slope for point in step.points)
    terms = (width * weight * slope for weight, slope in zip(_weights(places, moments), slopes, strict=False))
    return sum(terms, step.here.x)


def _integrated(start: _Point, points: list[_Point], target: float, down: float, moments: list[float]) -> Tensor:
    """Go from `start` down to `down` while the estimates follow a polynomial through `points`."""
    length = (1 - down / start.sigma) / moments[0]
    weights = _weights(_places(start, points, target), moments)
    terms = (length * weight * point.denoised for weight, point in zip(weights, points, strict=True))
    return sum(terms, start.x * (down / start.sigma))


def _places(start: _Point, points: list[_Point], target: float) -> list[float]:
    """Tell where points lie by log sigma: 0 is the start, 1 the target."""
    length = log(start.sigma / target)
    return [log(start.sigma / point.sigma) / length for point in points]


def _weights(places: list[float], moments: list[float]) -> list[float]:
    """Integrate the Lagrange polynomials of `places`, given the integrals of 1, u, u² and so on."""
    weights: list[float] = []
    for place in places:
        coefficients = [1.0]
        for other in places:
            if other != place:
                shifted = zip([0.0, *coefficients], [*coefficients, 0.0], strict=True)
                coefficients = [(below - other * here) / (place - other) for below, here in shifted]
        weights.append(sum(map(float.__mul__, coefficients, moments)))
    return weights


def _moments(rate: float, count: int) -> list[float]:
    """Integrate exp(rate × (1 - u)) × u**k over u from 0 to 1 for each k below `count`.

    By power series, which unlike the closed form is exact for short steps too; |rate| is up to 20.
    """
    return [sum(rate**power * factorial(k) / factorial(power + k + 1) for power in range(80)) for k in range(count)]


_STEPS: dict[Sampler, Callable[[_Step], Tensor]] = {
    Sampler.EULER: partial(_first_order, down=_straight),
    # Without eta DDIM keeps the direction of the noise, D + (x - D) * target / sigma: that is Euler's step.
    Sampler.DDIM: partial(_first_order, down=_straight),
    Sampler.EULER_ANCESTRAL: partial(_first_order, down=_ancestral),
    # Mean and variance of the posterior that DDPM draws from are those of Euler's ancestral step.
    Sampler.DDPM: partial(_first_order, down=_ancestral),
    Sampler.LCM: partial(_first_order, down=_to_image),
    Sampler.TCD: partial(_first_order, down=_beyond),
    Sampler.HEUN: _heun,
    Sampler.DPM2: partial(_dpm2, down=_straight),
    Sampler.DPM2_ANCESTRAL: partial(_dpm2, down=_ancestral),
    Sampler.DPMPP_2S: partial(_dpmpp_single, down=_straight),
    Sampler.DPMPP_SDE: partial(_dpmpp_single, down=_ancestral),
    Sampler.DPMPP_2M: partial(_dpmpp_multi, order=2, down=_straight),
    Sampler.DPMPP_2M_SDE: partial(_dpmpp_multi, order=2, down=_ancestral),
    Sampler.DPMPP_3M: partial(_dpmpp_multi, order=3, down=_straight),
    Sampler.DPMPP_3M_SDE: partial(_dpmpp_multi, order=3, down=_ancestral),
    Sampler.DEIS: _deis,
    Sampler.IPNDM: _ipndm,
    Sampler.LMS: _lms,
    Sampler.UNIPC_2M: partial(_unipc, order=2),
    Sampler.UNIPC_3M: partial(_unipc, order=3),
}

_EVALUATING_TWICE = frozenset({Sampler.HEUN, Sampler.DPM2, Sampler.DPM2_ANCESTRAL, Sampler.DPMPP_2S, Sampler.DPMPP_SDE})

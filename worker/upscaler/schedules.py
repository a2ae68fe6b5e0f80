"""Noise levels of Stable Diffusion 1.5 and the schedules through them: pure arithmetic."""

from bisect import bisect_right
from itertools import accumulate
from math import exp, log, sqrt
from operator import mul

from core.options import MAX_STRENGTH, Sampler, Spacing

_TRAINING_STEPS = 1000

_LAST = _TRAINING_STEPS - 1

_RHO = 7
"""Exponent of the schedule of Karras et al. (2022), equation 5."""

_BETA_SHAPE = 0.6
"""Both parameters of the Beta distribution after which Lee et al. (2024) place the steps."""

_DROPPING = frozenset({Sampler.DPMPP_3M_SDE, Sampler.DPM2, Sampler.DPM2_ANCESTRAL})
"""Samplers that go to 0 from the lowest noise level but one."""


def _training_levels() -> list[float]:
    """Return sqrt((1 - a) / a) for each step, a being the product of 1 - beta so far; the roots of beta are linear."""
    first, last = sqrt(0.00085), sqrt(0.012)
    betas = ((first + (last - first) * step / _LAST) ** 2 for step in range(_TRAINING_STEPS))
    return [sqrt((1 - kept) / kept) for kept in accumulate((1 - beta for beta in betas), mul)]


_LOG_LEVELS = [log(sigma) for sigma in _training_levels()]

SIGMA_MIN = exp(_LOG_LEVELS[0])
"""The least noise that the network was trained on, 0.0292."""

SIGMA_MAX = exp(_LOG_LEVELS[-1])
"""The most, 14.6146."""


def timestep(sigma: float) -> float:
    """Tell which training step, 0 to 999, has the noise level `sigma`; between two, by its logarithm."""
    if sigma <= SIGMA_MIN:
        return 0.0
    if sigma >= SIGMA_MAX:
        return float(_LAST)
    level = log(sigma)
    below = bisect_right(_LOG_LEVELS, level, hi=_LAST) - 1
    low, high = _LOG_LEVELS[below : below + 2]
    return below + (level - low) / (high - low)


def sigma_at(timestep: float) -> float:
    """Return the noise level of a training step, 0 to 999; the inverse of `timestep`."""
    below = min(int(timestep), _LAST - 1)
    low, high = _LOG_LEVELS[below : below + 2]
    return exp(low + (high - low) * (timestep - below))


def noise_levels(spacing: Spacing, count: int) -> list[float]:
    """Space `count` noise levels from `SIGMA_MAX` down to `SIGMA_MIN`; a single one is `SIGMA_MAX`."""
    shares = [index / max(count - 1, 1) for index in range(count)]
    match spacing:
        case Spacing.KARRAS:
            high, low = SIGMA_MAX ** (1 / _RHO), SIGMA_MIN ** (1 / _RHO)
            return [(high + share * (low - high)) ** _RHO for share in shares]
        case Spacing.EXPONENTIAL:
            return [SIGMA_MAX * (SIGMA_MIN / SIGMA_MAX) ** share for share in shares]
        case Spacing.UNIFORM:
            return [sigma_at(_LAST * (1 - share)) for share in shares]
        case Spacing.BETA:
            return [sigma_at(_LAST * _beta_quantile(1 - share)) for share in shares]


def sigmas(sampler: Sampler, spacing: Spacing, steps: int, strength: float) -> list[float]:
    """Return the noise levels that an image passes through, from the one it is given at the start down to 0.0.

    `steps` lead down from pure noise; as in the original, the last int(strength × steps) + 1 of them are taken, at
    most all. The list has one level more than there are steps to take.

    Raises:
        ValueError: `strength` is not above 0, so that there is nothing to do.
    """
    if strength <= 0:
        raise ValueError(f"strength must be above 0, not {strength}")
    levels = noise_levels(spacing, steps + 1)[:-1] if sampler in _DROPPING else noise_levels(spacing, steps)
    taken = int(min(strength, MAX_STRENGTH) * steps) + 1
    return [*levels[steps - taken :], 0.0]


def _beta_quantile(share: float) -> float:
    """Return the place in 0 to 1 below which `share` of the Beta distribution lies."""
    if share > 0.5:
        return 1 - _beta_quantile(1 - share)
    low, high = 0.0, 0.5
    for _ in range(50):
        middle = (low + high) / 2
        if _beta_integral(middle) > 2 * share * _BETA_HALF:
            high = middle
        else:
            low = middle
    return low


def _beta_integral(x: float) -> float:
    """Integrate (t (1 - t)) ** (shape - 1) over t from 0 to `x`, at most 1/2, by its binomial series."""
    total, coefficient = 0.0, x**_BETA_SHAPE
    for power in range(60):
        total += coefficient / (_BETA_SHAPE + power)
        coefficient *= x * (power + 1 - _BETA_SHAPE) / (power + 1)
    return total


_BETA_HALF = _beta_integral(0.5)

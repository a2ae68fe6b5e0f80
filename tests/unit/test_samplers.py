"""Samplers against closed forms: the denoiser of a Gaussian is known, linear, and so is the way to the image."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from math import exp, expm1, log, log2, sqrt
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from core.options import MAX_SEED, Sampler, Spacing
from worker.upscaler.samplers import Noise, count_evaluations, sample
from worker.upscaler.schedules import sigma_at, sigmas, timestep

DEVICE = torch.device("cpu")
STD = 0.5
CLARITY = [0.645, 0.447, 0.304, 0.202, 0.130, 0.082, 0.050, 0.0]
"""What the default options lead through."""

NOISY = (
    Sampler.EULER_ANCESTRAL,
    Sampler.DDPM,
    Sampler.DPM2_ANCESTRAL,
    Sampler.DPMPP_SDE,
    Sampler.DPMPP_2M_SDE,
    Sampler.DPMPP_3M_SDE,
    Sampler.LCM,
    Sampler.TCD,
)
QUIET = tuple(sampler for sampler in Sampler if sampler not in NOISY)

Denoise = Callable[[Tensor, float], Tensor]


def gaussian(x: Tensor, sigma: float) -> Tensor:
    """The best estimate of images of mean 0 and standard deviation STD."""
    return x * (STD**2 / (STD**2 + sigma**2))


def silence() -> Tensor:
    raise AssertionError("this sampler has no use for noise")


def basis(size: int) -> Iterator[Tensor]:
    """Independent normals, each written as a vector of its own: sums of them have their length as deviation."""
    return iter(torch.eye(size, dtype=torch.float64))


def length(x: Tensor) -> float:
    return sqrt(float(x @ x))


def geometric(start: float, end: float, steps: int) -> list[float]:
    return [start * (end / start) ** (index / steps) for index in range(steps + 1)] + [0.0]


def walk(sampler: Sampler, denoise: Denoise, levels: list[float], x: Tensor) -> list[tuple[float, Tensor]]:
    """Return what the denoiser was asked about, and last the result."""
    asked: list[tuple[float, Tensor]] = []

    def listening(x: Tensor, sigma: float) -> Tensor:
        asked.append((sigma, x))
        return denoise(x, sigma)

    draws = basis(2 * len(levels) + 2)
    next(draws)
    result = sample(sampler, listening, x, levels, lambda: next(draws))
    return [*asked, (0.0, result)]


def spread(sampler: Sampler, levels: list[float]) -> float:
    """Return the exact standard deviation of the images that a sampler makes."""
    start = next(basis(2 * len(levels) + 2)) * sqrt(STD**2 + levels[0] ** 2)
    return length(walk(sampler, gaussian, levels, start)[-1][1])


def right_spread(levels: list[float]) -> float:
    """Return the standard deviation of perfect steps: STD, but for the last one, which has one estimate only."""
    return STD**2 / sqrt(STD**2 + levels[-2] ** 2)


def error(sampler: Sampler, steps: int) -> float:
    """Return how far a sampler that adds no noise goes astray between two levels, where the exact way is known."""
    start, end = 2.0, 0.05
    x = torch.tensor([sqrt(STD**2 + start**2)], dtype=torch.float64)
    result = sample(sampler, gaussian, x, geometric(start, end, steps), silence)
    exact = STD**2 / sqrt(STD**2 + end**2)
    return abs(float(result) / exact - 1)


# The way of a Gaussian


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (Sampler.EULER, 0.95),
        (Sampler.DDIM, 0.95),
        (Sampler.HEUN, 1.9),
        (Sampler.DPM2, 1.9),
        (Sampler.DPMPP_2S, 1.9),
        (Sampler.DPMPP_2M, 1.9),
        (Sampler.DPMPP_3M, 2.0),
        (Sampler.DEIS, 2.0),
        (Sampler.LMS, 2.3),
        (Sampler.UNIPC_2M, 2.9),
        (Sampler.UNIPC_3M, 3.4),
    ],
)
def test_twice_the_steps_leave_the_share_of_the_error_that_the_order_promises(sampler: Sampler, order: float) -> None:
    assert log2(error(sampler, 40) / error(sampler, 80)) > order


def test_a_higher_order_is_closer_at_twenty_steps() -> None:
    ladder = [Sampler.EULER, Sampler.DPMPP_2M, Sampler.DPMPP_3M, Sampler.UNIPC_3M]
    assert all(error(better, 20) < error(worse, 20) / 2 for worse, better in pairwise(ladder))
    assert error(Sampler.IPNDM, 20) < error(Sampler.EULER, 20) / 100
    assert error(Sampler.UNIPC_2M, 20) < error(Sampler.DPMPP_2M, 20) / 2


@pytest.mark.parametrize("sampler", [sampler for sampler in Sampler if sampler not in (Sampler.LCM, Sampler.TCD)])
def test_images_get_the_spread_of_the_data_as_steps_grow(sampler: Sampler) -> None:
    schedules = [sigmas(sampler, Spacing.KARRAS, steps, 0.35) for steps in (18, 54, 216)]
    few, many, most = (abs(spread(sampler, levels) / right_spread(levels) - 1) for levels in schedules)
    assert most < few
    assert many < 0.05
    assert most < 0.015


def reference_3m_sde(levels: list[float], curvature: float) -> float:
    """Follow the published equations of 3M SDE by scalars, with `curvature` for the 1/2 of phi3; return the spread."""
    draws = basis(len(levels) + 1)
    x = next(draws) * sqrt(STD**2 + levels[0] ** 2)
    estimates: list[Tensor] = []
    widths: list[float] = []
    for sigma, target in pairwise(levels[:-1]):
        h = log(sigma / target)
        estimates.insert(0, gaussian(x, sigma))
        x = exp(-2 * h) * x - expm1(-2 * h) * estimates[0]
        phi2 = expm1(-2 * h) / (2 * h) + 1
        if len(widths) == 1:
            x += phi2 * (estimates[0] - estimates[1]) / (widths[0] / h)
        elif widths:
            r0, r1 = widths[0] / h, widths[1] / h
            newer, older = (estimates[0] - estimates[1]) / r0, (estimates[1] - estimates[2]) / r1
            first, second = newer + (newer - older) * r0 / (r0 + r1), (newer - older) / (r0 + r1)
            x += phi2 * first - (phi2 / (2 * h) - curvature) * second
        x += next(draws) * target * sqrt(-expm1(-2 * h))
        widths.insert(0, h)
    return length(gaussian(x, levels[-2]))


@pytest.mark.parametrize(("steps", "evaluations"), [(18, 7), (55, 20), (112, 40)])
def test_3m_sde_is_as_published_and_has_the_right_sign_before_the_curvature(steps: int, evaluations: int) -> None:
    levels = sigmas(Sampler.DPMPP_3M_SDE, Spacing.KARRAS, steps, 0.35)
    assert count_evaluations(Sampler.DPMPP_3M_SDE, levels) == evaluations
    ours = spread(Sampler.DPMPP_3M_SDE, levels)
    assert ours == pytest.approx(reference_3m_sde(levels, 0.5), rel=1e-9)
    assert ours == pytest.approx(STD, rel=0.01)
    assert reference_3m_sde(levels, -0.5) > 1.01 * STD


def test_real_draws_give_the_mean_and_spread_of_the_data() -> None:
    noise = Noise(7, (200_000,), DEVICE)
    x = 0.3 + noise() * sqrt(STD**2 + CLARITY[0] ** 2)
    images = sample(Sampler.DPMPP_3M_SDE, lambda x, sigma: 0.3 + gaussian(x - 0.3, sigma), x, CLARITY, noise)
    assert float(images.mean()) == pytest.approx(0.3, abs=0.005)
    assert float(images.std()) == pytest.approx(STD, rel=0.01)


# What each family promises


@pytest.mark.parametrize("sampler", Sampler)
def test_a_constant_estimate_is_the_result(sampler: Sampler) -> None:
    noise = Noise(3, (4, 8), DEVICE)
    image = torch.full((4, 8), 0.7)
    assert torch.equal(sample(sampler, lambda _x, _sigma: image, 5 * noise(), CLARITY, noise), image)


@pytest.mark.parametrize("sampler", QUIET)
def test_towards_a_constant_estimate_every_order_goes_straight(sampler: Sampler) -> None:
    levels = [7.0, 2.0, 1.9, 0.3, 0.1, 0.0]
    for sigma, x in walk(sampler, lambda x, _sigma: torch.full_like(x, 0.7), levels, torch.tensor([21.7]))[:-1]:
        assert float(x) == pytest.approx(0.7 + 3 * sigma, rel=1e-5)


@pytest.mark.parametrize("sampler", Sampler)
@pytest.mark.parametrize("levels", [[0.645, 0.0], [0.645, 0.05, 0.0], CLARITY])
def test_the_result_is_the_estimate_at_the_last_level(sampler: Sampler, levels: list[float]) -> None:
    estimates: list[tuple[float, Tensor]] = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        estimates.append((sigma, gaussian(x, sigma)))
        return estimates[-1][1]

    noise = Noise(1, (3,), DEVICE)
    assert sample(sampler, denoise, noise(), levels, noise) is estimates[-1][1]
    assert estimates[-1][0] == levels[-2]
    assert estimates[0][0] == levels[0]


@pytest.mark.parametrize("sampler", Sampler)
@pytest.mark.parametrize("count", range(2, 9))
def test_the_evaluations_are_those_that_were_counted(sampler: Sampler, count: int) -> None:
    levels = CLARITY[-count:]
    asked = walk(sampler, gaussian, levels, torch.ones(2 * count + 2, dtype=torch.float64))[:-1]
    assert len(asked) == count_evaluations(sampler, levels)


def cubic(sigma: float) -> float:
    return 4 * sigma**3 - sigma


def under_cubic(sigma: float) -> float:
    return sigma**4 - sigma**2 / 2


def log_square(sigma: float) -> float:
    return log(sigma) ** 2


def under_log_square(sigma: float) -> float:
    return sigma * (log(sigma) ** 2 - 2 * log(sigma) + 2)


@pytest.mark.parametrize(
    ("sampler", "levels", "slope", "integral", "start"),
    [
        # Four points carry a cubic, at any distance from each other ...
        (Sampler.LMS, CLARITY, cubic, under_cubic, 3),
        # ... or at equal ones; three carry a square of the logarithm.
        (Sampler.IPNDM, [0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.0], cubic, under_cubic, 3),
        (Sampler.DEIS, CLARITY, log_square, under_log_square, 2),
    ],
)
def test_slopes_that_the_polynomial_can_follow_are_followed_exactly(
    sampler: Sampler,
    levels: list[float],
    slope: Callable[[float], float],
    integral: Callable[[float], float],
    start: int,
) -> None:
    asked = walk(sampler, lambda x, sigma: x - sigma * slope(sigma), levels, torch.ones(1, dtype=torch.float64))[:-1]
    for (sigma, x), (target, after) in list(pairwise(asked))[start:]:
        assert float(after - x) == pytest.approx(integral(target) - integral(sigma), rel=1e-9)


def test_unipc_3m_follows_estimates_that_are_squares_of_the_logarithm_exactly() -> None:
    # With D = log(sigma)², x = D + 2 log(sigma) + 2 + c sigma solves dx/dsigma = (x - D) / sigma for any c.
    def level(sigma: float, x: Tensor) -> float:
        return (float(x) - log(sigma) ** 2 - 2 * log(sigma) - 2) / sigma

    asked = walk(
        Sampler.UNIPC_3M, lambda x, s: torch.full_like(x, log(s) ** 2), CLARITY, torch.ones(1, dtype=torch.float64)
    )
    constants = [level(sigma, x) for sigma, x in asked[:-1]]
    # The corrector alters what the predictor found by nothing once both are exact.
    assert constants[4:] == pytest.approx([constants[4]] * 3, rel=1e-9)


def test_heun_averages_the_slopes_of_both_ends() -> None:
    asked = walk(Sampler.HEUN, lambda x, sigma: x - sigma * sigma, [3.0, 1.0, 0.0], torch.zeros(1))
    assert [sigma for sigma, _ in asked] == [3.0, 1.0, 1.0, 0.0]
    assert [float(x) for _, x in asked[:3]] == pytest.approx([0, -6, -4])


@pytest.mark.parametrize(
    ("sampler", "middle"),
    [
        (Sampler.DPM2, 2.0),
        (Sampler.DPMPP_2S, 2.0),
        (Sampler.DPMPP_SDE, 2.0),
        # It goes down to 1 / 4 before noise brings it to 1.
        (Sampler.DPM2_ANCESTRAL, 1.0),
    ],
)
def test_the_second_estimate_is_taken_in_the_middle_by_logarithm(sampler: Sampler, middle: float) -> None:
    asked = walk(sampler, gaussian, [4.0, 1.0, 0.0], torch.ones(8, dtype=torch.float64))
    assert [sigma for sigma, _ in asked] == [4.0, middle, 1.0, 0.0]


# Noise that is added


@pytest.mark.parametrize("sampler", NOISY)
def test_what_noise_puts_back_makes_the_level_that_follows(sampler: Sampler) -> None:
    """Towards a constant estimate x is that and sigma × noise, at every level."""
    levels = [7.0, 2.0, 1.9, 0.3, 0.1, 0.0]
    start = 7.0 * next(basis(14))
    for sigma, x in walk(sampler, lambda x, _sigma: 0 * x, levels, start)[:-1]:
        if sigma in levels or sampler is Sampler.DPMPP_SDE:
            assert length(x) == pytest.approx(sigma, rel=1e-9)


@pytest.mark.parametrize(
    ("sampler", "kept"),
    [
        (Sampler.EULER_ANCESTRAL, 0.5**2),
        (Sampler.DDPM, 0.5**2),
        (Sampler.DPMPP_2M_SDE, 0.5**2),
        (Sampler.DPMPP_3M_SDE, 0.5**2),
        (Sampler.LCM, 0.0),
        (Sampler.TCD, sigma_at(0.7 * timestep(1.0)) / 2.0),
    ],
)
def test_the_share_of_old_noise_that_is_kept_is_the_methods_own(sampler: Sampler, kept: float) -> None:
    """The posterior of DDPM keeps (target / sigma)² of x; LCM nothing; TCD goes to 0.7 of the target's timestep."""
    x = walk(sampler, lambda x, _sigma: 0 * x, [2.0, 1.0, 0.0], 2.0 * next(basis(8)))[1][1]
    assert float(x[0]) == pytest.approx(2.0 * kept)
    assert float(x[1]) == pytest.approx(sqrt(1 - 4.0 * kept**2))


def test_tcd_does_not_go_beyond_levels_that_the_network_knows() -> None:
    x = walk(Sampler.TCD, lambda x, _sigma: 0 * x, [0.02, 0.01, 0.0], 0.02 * next(basis(8)))[1][1]
    assert float(x[0]) == pytest.approx(0.01)


def test_both_parts_of_an_sde_step_see_one_brownian_motion() -> None:
    """The noise at each level is sigma² times a Brownian motion in 1 / sigma², which fixes their covariance."""
    _, (middle, halfway), (target, after), _ = walk(
        Sampler.DPMPP_SDE, lambda x, _sigma: 0 * x, [4.0, 1.0, 0.0], torch.zeros(8, dtype=torch.float64)
    )
    assert (middle, target) == (2.0, 1.0)
    clock = 1 / middle**2 - 1 / 4.0**2
    assert float(halfway @ halfway) == pytest.approx(middle**4 * clock)
    assert float(halfway @ after) == pytest.approx(middle**2 * target**2 * clock)
    assert float(after @ after) == pytest.approx(target**4 * (1 / target**2 - 1 / 4.0**2))


@pytest.mark.parametrize("sampler", QUIET)
def test_a_sampler_without_noise_draws_none(sampler: Sampler) -> None:
    sample(sampler, gaussian, torch.ones(3), CLARITY, silence)


@pytest.mark.parametrize("sampler", NOISY)
def test_the_same_seed_gives_the_same_image_and_another_one_another(sampler: Sampler) -> None:
    def image(seed: int) -> Tensor:
        return sample(sampler, gaussian, torch.ones(3), CLARITY, Noise(seed, (3,), DEVICE))

    assert torch.equal(image(1), image(1))
    assert not torch.allclose(image(1), image(2), atol=1e-3)


@pytest.mark.parametrize("sampler", Sampler)
def test_an_image_keeps_shape_and_type_and_what_was_put_in_stays_as_it_was(sampler: Sampler) -> None:
    noise = Noise(5, (1, 4, 6, 5), DEVICE)
    x = noise()
    before = x.clone()
    image = sample(sampler, gaussian, x, CLARITY, noise)
    assert (image.shape, image.dtype) == (x.shape, torch.float32)
    assert bool(image.isfinite().all()) and torch.equal(x, before)


@pytest.mark.parametrize("sampler", Sampler)
@pytest.mark.parametrize("spacing", Spacing)
@pytest.mark.parametrize("steps", [1, 2, 3, 100])
def test_every_schedule_leads_to_a_finite_image(sampler: Sampler, spacing: Spacing, steps: int) -> None:
    noise = Noise(5, (64,), DEVICE)
    levels = sigmas(sampler, spacing, steps, 1.0)
    image = sample(sampler, gaussian, noise() * levels[0], levels, noise)
    assert bool(image.isfinite().all())


# The draws


def test_draws_are_standard_normal_and_the_cpus_own() -> None:
    noise, generator = Noise(42, (1, 4, 90, 70), DEVICE), torch.Generator().manual_seed(42)
    first = noise()
    assert (first.shape, first.dtype) == ((1, 4, 90, 70), torch.float32)
    assert torch.equal(first, torch.randn(1, 4, 90, 70, generator=generator))
    assert torch.equal(noise(), torch.randn(1, 4, 90, 70, generator=generator))
    assert abs(float(first.mean())) < 0.03 and abs(float(first.std()) - 1) < 0.03


def test_draws_neither_heed_nor_move_the_global_generator() -> None:
    state = torch.get_rng_state()
    first = Noise(42, (5,), DEVICE)()
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(3)
    assert torch.equal(Noise(42, (5,), DEVICE)(), first)


def test_every_bit_of_a_seed_counts() -> None:
    """torch's generator alone would drop the upper 32 bits."""
    seeds = [0, *(2**bit for bit in range(63)), MAX_SEED - 1, MAX_SEED, 2**32 - 1, 2**32 + 1]
    assert len({str(Noise(seed, (4,), DEVICE)()) for seed in seeds}) == len(seeds)


# Against diffusers


def asked_by(
    scheduler: Any, levels: list[float], x: Tensor, scale: Callable[[float], float]
) -> list[tuple[float, Tensor]]:
    """Return what a scheduler, made to follow `levels`, would ask a denoiser about; it holds x / `scale`."""
    scheduler.set_timesteps(len(levels) // 2)
    scheduler.sigmas = torch.tensor(levels, dtype=torch.float64)
    scheduler.timesteps = torch.arange(len(levels) - 1.0, 0, -1)
    asked: list[tuple[float, Tensor]] = []
    for time, (sigma, target) in zip(scheduler.timesteps, pairwise(levels), strict=True):
        asked.append((sigma, x))
        if target:
            x = scheduler.step(gaussian(x, sigma), time, x / scale(sigma)).prev_sample * scale(target)
    return asked


def exploding(_sigma: float) -> float:
    return 1.0


def preserving(sigma: float) -> float:
    return sqrt(1 + sigma**2)


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # within diffusers
@pytest.mark.parametrize(
    ("sampler", "scheduler", "scale", "settings"),
    [
        (Sampler.EULER, "EulerDiscreteScheduler", exploding, {}),
        (Sampler.HEUN, "HeunDiscreteScheduler", exploding, {}),
        (Sampler.DDIM, "DPMSolverMultistepScheduler", preserving, {"solver_order": 1}),
        (Sampler.DPMPP_2M, "DPMSolverMultistepScheduler", preserving, {"solver_order": 2}),
        # Its second step is a midpoint step unless called "heun"; ours is k-diffusion's.
        (Sampler.DPMPP_3M, "DPMSolverMultistepScheduler", preserving, {"solver_order": 3, "solver_type": "heun"}),
        (Sampler.UNIPC_2M, "UniPCMultistepScheduler", preserving, {"solver_order": 2}),
        (Sampler.UNIPC_3M, "UniPCMultistepScheduler", preserving, {"solver_order": 3}),
        (Sampler.DEIS, "DEISMultistepScheduler", preserving, {"solver_order": 3}),
    ],
)
def test_samplers_without_noise_go_where_diffusers_goes(
    sampler: Sampler, scheduler: str, scale: Callable[[float], float], settings: dict[str, Any]
) -> None:
    """Only that it lowers the order towards the end of a short way has to be switched off."""
    levels = sigmas(sampler, Spacing.KARRAS, 12, 1.0)
    asked = walk(sampler, gaussian, levels, torch.tensor([[3.0, -1.0]], dtype=torch.float64))[:-1]
    if scale is preserving:
        settings = {**settings, "lower_order_final": False}
    theirs = getattr(diffusers, scheduler)(prediction_type="sample", **settings)
    reached = asked_by(theirs, [sigma for sigma, _ in asked] + [0.0], asked[0][1], scale)
    for (sigma, ours), (_, x) in zip(asked, reached, strict=True):
        assert torch.allclose(ours, x, rtol=1e-6, atol=1e-7), sigma

"""The noise levels of Stable Diffusion 1.5 and the schedules through them."""

from itertools import pairwise
from math import exp, gamma, log, sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.options import Sampler, Spacing, UpscaleOptions
from worker.upscaler.schedules import SIGMA_MAX, SIGMA_MIN, noise_levels, sigma_at, sigmas, timestep

SAMPLERS = st.sampled_from(Sampler)
SPACINGS = st.sampled_from(Spacing)
STEPS = st.integers(1, 100)
STRENGTHS = st.floats(0.001, 1)


def as_printed(text: str) -> object:
    """A figure known to as many decimals as are printed, and to a thousandth."""
    decimals = len(text.partition(".")[2])
    return pytest.approx(float(text), abs=0.5 * 10**-decimals + 1e-3 * float(text))


def trained(step: int) -> float:
    """The noise level of a training step, by logarithms."""
    low, high = 0.00085**0.5, 0.012**0.5
    kept = exp(sum(log(1 - (low + (high - low) * index / 999) ** 2) for index in range(step + 1)))
    return sqrt(1 / kept - 1)


def test_the_noise_levels_end_where_those_of_stable_diffusion_do() -> None:
    assert pytest.approx(0.0291675, rel=1e-4) == SIGMA_MIN
    assert pytest.approx(14.6146, rel=1e-5) == SIGMA_MAX


@pytest.mark.parametrize("step", [0, 1, 230, 500, 998, 999])
def test_a_training_step_and_its_noise_level_find_each_other(step: int) -> None:
    assert sigma_at(step) == pytest.approx(trained(step), rel=1e-9)
    assert timestep(trained(step)) == pytest.approx(step, abs=1e-6)


def test_between_two_training_steps_the_logarithm_counts() -> None:
    assert timestep(sqrt(trained(400) * trained(401))) == pytest.approx(400.5, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 999))
def test_every_fraction_of_a_training_step_comes_back_from_its_noise_level(step: float) -> None:
    assert timestep(sigma_at(step)) == pytest.approx(step, abs=1e-6)


@pytest.mark.parametrize(("sigma", "step"), [(0, 0), (0.001, 0), (SIGMA_MIN, 0), (SIGMA_MAX, 999), (1000, 999)])
def test_noise_that_the_network_never_saw_counts_as_the_nearest_it_did(sigma: float, step: int) -> None:
    assert timestep(sigma) == step


@settings(max_examples=100, deadline=None)
@given(SPACINGS, st.integers(2, 101))
def test_noise_levels_fall_from_the_most_to_the_least(spacing: Spacing, count: int) -> None:
    levels = noise_levels(spacing, count)
    assert len(levels) == count
    assert all(before > after for before, after in pairwise(levels))
    assert (levels[0], levels[-1]) == pytest.approx((SIGMA_MAX, SIGMA_MIN))


@pytest.mark.parametrize("spacing", Spacing)
def test_a_single_noise_level_is_the_highest(spacing: Spacing) -> None:
    assert noise_levels(spacing, 1) == pytest.approx([SIGMA_MAX])


def test_karras_levels_are_even_in_the_seventh_root() -> None:
    steps = [before ** (1 / 7) - after ** (1 / 7) for before, after in pairwise(noise_levels(Spacing.KARRAS, 19))]
    assert steps == pytest.approx([(14.6146 ** (1 / 7) - 0.0291675 ** (1 / 7)) / 18] * 18, rel=1e-4)


def test_exponential_levels_fall_by_one_ratio() -> None:
    ratios = [before / after for before, after in pairwise(noise_levels(Spacing.EXPONENTIAL, 19))]
    assert ratios == pytest.approx([(SIGMA_MAX / SIGMA_MIN) ** (1 / 18)] * 18)


def test_uniform_levels_are_even_in_training_steps() -> None:
    assert [timestep(level) for level in noise_levels(Spacing.UNIFORM, 10)] == pytest.approx(list(range(999, -1, -111)))


def beta_share(x: float) -> float:
    """The share of the Beta(0.6, 0.6) distribution below `x`, by Simpson's rule.

    Put t = v ** (5 / 3): then t ** -0.4 dt = 5 / 3 dv, and what is left to integrate is smooth up to the middle.
    """
    if x > 0.5:
        return 1 - beta_share(1 - x)
    intervals = 400
    width = x**0.6 / intervals
    values = [(1 - (index * width) ** (5 / 3)) ** -0.4 for index in range(intervals + 1)]
    integral = width / 3 * (values[0] + 4 * sum(values[1::2]) + 2 * sum(values[2:-1:2]) + values[-1])
    return 5 / 3 * integral * gamma(1.2) / gamma(0.6) ** 2


@pytest.mark.parametrize("count", [2, 3, 8, 33, 101])
def test_beta_levels_lie_at_quantiles_of_the_distribution(count: int) -> None:
    shares = [beta_share(timestep(level) / 999) for level in noise_levels(Spacing.BETA, count)]
    assert shares == pytest.approx([1 - index / (count - 1) for index in range(count)], abs=1e-5)


def test_beta_levels_lie_mirrored_and_denser_at_both_ends() -> None:
    places = [timestep(level) / 999 for level in noise_levels(Spacing.BETA, 11)]
    assert places == pytest.approx([1 - place for place in reversed(places)], abs=1e-9)
    steps = [before - after for before, after in pairwise(places)]
    assert steps[0] < steps[1] < steps[4]
    # Quantiles by mpmath's betainc and findroot.
    assert places[1] == pytest.approx(0.9604155944, abs=1e-8)
    assert noise_levels(Spacing.BETA, 5)[3] == pytest.approx(sigma_at(999 * 0.1756803787), rel=1e-7)


def test_the_default_goes_through_the_originals_noise_levels() -> None:
    options = UpscaleOptions()
    levels = sigmas(options.sampler, options.spacing, options.steps, options.strength)
    assert levels == [*map(as_printed, [".645", ".447", ".304", ".202", ".130", ".082", ".050"]), 0.0]
    assert timestep(levels[0]) == pytest.approx(230, abs=0.5)


# Evaluations and first noise level at strengths of next to nothing, .1, .28, .35, .5, .75 and 1.
ORIGINAL = {
    10: "1 .074 | 2 .170 | 3 .355 | 4 .693 | 6 2.233 | 8 6.08 | 10 14.61",
    18: "1 .050 | 2 .082 | 6 .447 | 7 .645 | 10 1.750 | 14 5.48 | 18 14.61",
    20: "1 .047 | 3 .114 | 6 .355 | 8 .693 | 11 1.696 | 16 6.08 | 20 14.61",
    30: "1 .040 | 4 .099 | 9 .355 | 11 .559 | 16 1.544 | 23 5.20 | 30 14.61",
    50: "1 .036 | 6 .088 | 15 .355 | 18 .535 | 26 1.431 | 38 5.03 | 50 14.61",
}


@pytest.mark.parametrize("steps", ORIGINAL)
def test_strength_leads_to_the_evaluations_and_the_start_of_the_original(steps: int) -> None:
    expected = [cell.split() for cell in ORIGINAL[steps].split("|")]
    for strength, (evaluations, start) in zip((1e-9, 0.1, 0.28, 0.35, 0.5, 0.75, 1), expected, strict=True):
        levels = sigmas(Sampler.DPMPP_3M_SDE, Spacing.KARRAS, steps, strength)
        assert len(levels) - 1 == int(evaluations)
        assert levels[0] == as_printed(start)


@settings(max_examples=100, deadline=None)
@given(SAMPLERS, SPACINGS, STEPS, STRENGTHS)
def test_there_is_one_level_more_than_evaluations_and_they_fall_to_zero(
    sampler: Sampler, spacing: Spacing, steps: int, strength: float
) -> None:
    levels = sigmas(sampler, spacing, steps, strength)
    assert len(levels) == UpscaleOptions(steps=steps, strength=strength).evaluations + 1
    assert all(before > after for before, after in pairwise(levels))
    assert levels[0] <= SIGMA_MAX * (1 + 1e-12)
    assert levels[-1] == 0.0


@settings(max_examples=50, deadline=None)
@given(SAMPLERS, SPACINGS, STEPS, STRENGTHS, STRENGTHS)
def test_more_strength_never_means_less_noise_or_fewer_evaluations(
    sampler: Sampler, spacing: Spacing, steps: int, one: float, other: float
) -> None:
    weak, strong = (sigmas(sampler, spacing, steps, strength) for strength in sorted((one, other)))
    assert strong[-len(weak) :] == weak


@settings(max_examples=50, deadline=None)
@given(STEPS, STRENGTHS)
def test_more_steps_never_mean_fewer_evaluations(steps: int, strength: float) -> None:
    fewer, more = (sigmas(Sampler.EULER, Spacing.KARRAS, number, strength) for number in (steps, steps + 1))
    assert len(fewer) <= len(more)


@pytest.mark.parametrize("sampler", Sampler)
def test_three_samplers_leave_out_the_lowest_level_of_one_step_more(sampler: Sampler) -> None:
    if sampler in {Sampler.DPMPP_3M_SDE, Sampler.DPM2, Sampler.DPM2_ANCESTRAL}:
        expected = noise_levels(Spacing.KARRAS, 19)[:-1]
    else:
        expected = noise_levels(Spacing.KARRAS, 18)
    assert sigmas(sampler, Spacing.KARRAS, 18, 1) == [*expected, 0.0]


@pytest.mark.parametrize("sampler", Sampler)
@pytest.mark.parametrize("spacing", Spacing)
@pytest.mark.parametrize("strength", [0.35, 1])
def test_a_single_step_leads_from_pure_noise_to_none(sampler: Sampler, spacing: Spacing, strength: float) -> None:
    assert sigmas(sampler, spacing, 1, strength) == [pytest.approx(SIGMA_MAX), 0.0]


@pytest.mark.parametrize("strength", [0.0, -0.1])
def test_there_is_no_schedule_without_strength(strength: float) -> None:
    with pytest.raises(ValueError, match=f"above 0, not {strength}"):
        sigmas(Sampler.EULER, Spacing.KARRAS, 18, strength)

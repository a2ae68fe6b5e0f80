"""Scheduler names: all of Runware's 75 and A1111's 30, each with one meaning or one sentence of refusal."""

import pytest

from core.options import Sampler, Spacing, UpscaleOptions
from core.schedulers import NAMES, resolve

RUNWARE = """
    DDIM = ddim uniform
    DDIMScheduler = ddim uniform
    DDPMScheduler = ddpm uniform
    DEISMultistepScheduler = deis uniform
    Default = dpmpp_3m_sde karras
    DPM++ = dpmpp_2m uniform
    DPM++ 2M = dpmpp_2m uniform
    DPM++ 2M Beta = dpmpp_2m beta
    DPM++ 2M Exponential = dpmpp_2m exponential
    DPM++ 2M Karras = dpmpp_2m karras
    DPM++ 2M SDE = dpmpp_2m_sde uniform
    DPM++ 2M SDE Beta = dpmpp_2m_sde beta
    DPM++ 2M SDE Exponential = dpmpp_2m_sde exponential
    DPM++ 2M SDE Karras = dpmpp_2m_sde karras
    DPM++ 2M SDE Uniform = dpmpp_2m_sde uniform
    DPM++ 2M Uniform = dpmpp_2m uniform
    DPM++ 3M = dpmpp_3m uniform
    DPM++ 3M Beta = dpmpp_3m beta
    DPM++ 3M Exponential = dpmpp_3m exponential
    DPM++ 3M Karras = dpmpp_3m karras
    DPM++ 3M SDE Uniform = dpmpp_3m_sde uniform
    DPM++ 3M Uniform = dpmpp_3m uniform
    DPM++ Beta = dpmpp_2m beta
    DPM++ Exponential = dpmpp_2m exponential
    DPM++ Karras = dpmpp_2m karras
    DPM++ SDE = dpmpp_sde uniform
    DPM++ SDE Beta = dpmpp_sde beta
    DPM++ SDE Exponential = dpmpp_sde exponential
    DPM++ SDE Karras = dpmpp_sde karras
    DPM++ Uniform = dpmpp_2m uniform
    DPM++ Uniform Beta = dpmpp_2m beta
    DPM++ Uniform Exponential = dpmpp_2m exponential
    DPM++ Uniform Karras = dpmpp_2m karras
    DPMSolverMultistepInverse = refused
    DPMSolverMultistepScheduler = dpmpp_2m uniform
    DPMSolverSinglestepScheduler = dpmpp_2s uniform
    EDMDPMSolverMultistepScheduler = dpmpp_2m karras
    EDMEulerScheduler = euler karras
    Euler = euler uniform
    Euler a = euler_ancestral uniform
    Euler Beta = euler beta
    Euler Exponential = euler exponential
    Euler Karras = euler karras
    EulerAncestralDiscreteScheduler = euler_ancestral uniform
    EulerDiscreteScheduler = euler uniform
    FlowMatchEulerDiscreteScheduler = refused
    Heun = heun uniform
    HeunDiscreteScheduler = heun uniform
    Heun Karras = heun karras
    IPNDMScheduler = ipndm uniform
    IPNDM Uniform = ipndm uniform
    IPNDM Uniform Beta = ipndm beta
    IPNDM Uniform Exponential = ipndm exponential
    IPNDM Uniform Karras = ipndm karras
    KDPM2AncestralDiscreteScheduler = dpm2_ancestral uniform
    KDPM2DiscreteScheduler = dpm2 uniform
    LCM = lcm uniform
    LCMScheduler = lcm uniform
    LMS = lms uniform
    LMSDiscreteScheduler = lms uniform
    LMS Karras = lms karras
    PNDMScheduler = ipndm uniform
    TCDScheduler = tcd uniform
    UniPC = unipc_2m uniform
    UniPC 2M = unipc_2m uniform
    UniPC 2M Karras = unipc_2m karras
    UniPC 2M Uniform = unipc_2m uniform
    UniPC 3M = unipc_3m uniform
    UniPC 3M Karras = unipc_3m karras
    UniPC 3M Uniform = unipc_3m uniform
    UniPC Karras = unipc_2m karras
    UniPC Uniform = unipc_2m uniform
    UniPC Uniform Beta = unipc_2m beta
    UniPC Uniform Exponential = unipc_2m exponential
    UniPC Uniform Karras = unipc_2m karras
"""

A1111 = """
    DPM++ 2M Karras = dpmpp_2m karras
    DPM++ SDE Karras = dpmpp_sde karras
    DPM++ 2M SDE Exponential = dpmpp_2m_sde exponential
    DPM++ 2M SDE Karras = dpmpp_2m_sde karras
    Euler a = euler_ancestral uniform
    Euler = euler uniform
    LMS = lms uniform
    Heun = heun uniform
    DPM2 = dpm2 uniform
    DPM2 a = dpm2_ancestral uniform
    DPM++ 2S a = refused
    DPM++ 2M = dpmpp_2m uniform
    DPM++ SDE = dpmpp_sde uniform
    DPM++ 2M SDE = dpmpp_2m_sde uniform
    DPM++ 2M SDE Heun = refused
    DPM++ 2M SDE Heun Karras = refused
    DPM++ 2M SDE Heun Exponential = refused
    DPM++ 3M SDE = dpmpp_3m_sde uniform
    DPM++ 3M SDE Karras = dpmpp_3m_sde karras
    DPM++ 3M SDE Exponential = dpmpp_3m_sde exponential
    DPM fast = refused
    DPM adaptive = refused
    LMS Karras = lms karras
    DPM2 Karras = dpm2 karras
    DPM2 a Karras = dpm2_ancestral karras
    DPM++ 2S a Karras = refused
    Restart = refused
    DDIM = ddim uniform
    PLMS = ipndm uniform
    UniPC = unipc_2m uniform
"""


def _expected(table: str) -> dict[str, str]:
    lines = (line.split(" = ") for line in table.strip().splitlines())
    return {name.strip(): meaning for name, meaning in lines}


EXPECTED = _expected(RUNWARE) | _expected(A1111)
REFUSED = sorted(name for name, meaning in EXPECTED.items() if meaning == "refused")


def test_there_are_75_names_of_runware_and_30_of_a1111() -> None:
    assert (len(_expected(RUNWARE)), len(_expected(A1111))) == (75, 30)


def test_no_other_name_is_honoured() -> None:
    assert set(NAMES) == set(EXPECTED) - set(REFUSED)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_name_stands_for_a_sampler_and_a_spacing(name: str) -> None:
    sampler, spacing = EXPECTED[name].split()
    assert resolve(name) == (Sampler(sampler), Spacing(spacing))


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_cannot_be_honoured_is_refused_in_a_short_sentence_that_names_it(name: str) -> None:
    with pytest.raises(ValueError, match=r"is|chooses|turns") as caught:
        resolve(name)
    assert str(caught.value).startswith(f"{name} ")
    assert "no scheduler" not in str(caught.value)
    assert len(str(caught.value)) < 100


def test_what_is_suggested_instead_of_a_refused_name_is_honoured() -> None:
    for name in REFUSED:
        with pytest.raises(ValueError, match=r".") as caught:
            resolve(name)
        _, semicolon, advice = str(caught.value).partition("; ")
        if semicolon and advice.endswith("comes closest"):
            assert advice.removesuffix(" comes closest") in NAMES


@pytest.mark.parametrize("name", ["euler A", "Euler  a", "EULER A", "Eulera"])
def test_a_misspelt_name_is_refused_and_close_ones_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"is no scheduler; did you mean .*Euler a") as caught:
        resolve(name)
    assert repr(name) in str(caught.value)


def test_a_name_that_is_like_no_other_is_refused_without_suggestions() -> None:
    with pytest.raises(ValueError, match=r"^'2001' is no scheduler$"):
        resolve("2001")


def test_a_name_of_a_million_characters_gets_a_short_answer() -> None:
    with pytest.raises(ValueError, match="is no scheduler") as caught:
        resolve("DPM++ 2M" * 125_000)
    assert len(str(caught.value)) < 200


def test_default_is_what_a_request_without_a_scheduler_gets() -> None:
    options = UpscaleOptions()
    assert resolve("Default") == (options.sampler, options.spacing)


def test_every_sampler_can_be_asked_for() -> None:
    assert {sampler for sampler, _ in NAMES.values()} == set(Sampler)

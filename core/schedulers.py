"""Scheduler names: Runware's 75 and those of A1111 1.7, each as one of our samplers and a spacing."""

from collections.abc import Mapping
from difflib import get_close_matches

from core.options import Sampler, Spacing

_PLAIN = ("", "Beta", "Exponential", "Karras", "Uniform")
_DOUBLE = ("Uniform", "Uniform Beta", "Uniform Exponential", "Uniform Karras")

# A solver's name, our sampler, and the spacings that may follow the name. The last word tells the spacing; without one
# the steps are spread as the model was trained, uniformly.
_FAMILIES: tuple[tuple[str, Sampler, tuple[str, ...]], ...] = (
    ("DDIM", Sampler.DDIM, ("",)),
    ("DPM++", Sampler.DPMPP_2M, (*_PLAIN[:-1], *_DOUBLE)),
    ("DPM++ 2M", Sampler.DPMPP_2M, _PLAIN),
    ("DPM++ 2M SDE", Sampler.DPMPP_2M_SDE, _PLAIN),
    ("DPM++ 3M", Sampler.DPMPP_3M, _PLAIN),
    ("DPM++ 3M SDE", Sampler.DPMPP_3M_SDE, ("", "Exponential", "Karras", "Uniform")),
    ("DPM++ SDE", Sampler.DPMPP_SDE, ("", "Beta", "Exponential", "Karras")),
    ("DPM2", Sampler.DPM2, ("", "Karras")),
    ("DPM2 a", Sampler.DPM2_ANCESTRAL, ("", "Karras")),
    ("Euler", Sampler.EULER, ("", "Beta", "Exponential", "Karras")),
    ("Euler a", Sampler.EULER_ANCESTRAL, ("",)),
    ("Heun", Sampler.HEUN, ("", "Karras")),
    ("IPNDM", Sampler.IPNDM, _DOUBLE),
    ("LCM", Sampler.LCM, ("",)),
    ("LMS", Sampler.LMS, ("", "Karras")),
    ("UniPC", Sampler.UNIPC_2M, ("", "Karras", *_DOUBLE)),
    ("UniPC 2M", Sampler.UNIPC_2M, ("", "Karras", "Uniform")),
    ("UniPC 3M", Sampler.UNIPC_3M, ("", "Karras", "Uniform")),
)

# Names that say neither solver nor spacing in words: classes of diffusers, and two of their own kind.
_SINGLE: Mapping[str, tuple[Sampler, Spacing]] = {
    "DDIMScheduler": (Sampler.DDIM, Spacing.UNIFORM),
    "DDPMScheduler": (Sampler.DDPM, Spacing.UNIFORM),
    "DEISMultistepScheduler": (Sampler.DEIS, Spacing.UNIFORM),
    "DPMSolverMultistepScheduler": (Sampler.DPMPP_2M, Spacing.UNIFORM),
    "DPMSolverSinglestepScheduler": (Sampler.DPMPP_2S, Spacing.UNIFORM),
    # The spacing of Karras et al. is the one of their EDM.
    "EDMDPMSolverMultistepScheduler": (Sampler.DPMPP_2M, Spacing.KARRAS),
    "EDMEulerScheduler": (Sampler.EULER, Spacing.KARRAS),
    "EulerAncestralDiscreteScheduler": (Sampler.EULER_ANCESTRAL, Spacing.UNIFORM),
    "EulerDiscreteScheduler": (Sampler.EULER, Spacing.UNIFORM),
    "HeunDiscreteScheduler": (Sampler.HEUN, Spacing.UNIFORM),
    "IPNDMScheduler": (Sampler.IPNDM, Spacing.UNIFORM),
    "KDPM2AncestralDiscreteScheduler": (Sampler.DPM2_ANCESTRAL, Spacing.UNIFORM),
    "KDPM2DiscreteScheduler": (Sampler.DPM2, Spacing.UNIFORM),
    "LCMScheduler": (Sampler.LCM, Spacing.UNIFORM),
    "LMSDiscreteScheduler": (Sampler.LMS, Spacing.UNIFORM),
    # Both are the same linear multistep formula as IPNDM, of which it is the successor.
    "PNDMScheduler": (Sampler.IPNDM, Spacing.UNIFORM),
    "PLMS": (Sampler.IPNDM, Spacing.UNIFORM),
    "TCDScheduler": (Sampler.TCD, Spacing.UNIFORM),
    "Default": (Sampler.DPMPP_3M_SDE, Spacing.KARRAS),
}

_REFUSED: Mapping[str, str] = {
    "FlowMatchEulerDiscreteScheduler": "is for models that match flows; this one predicts noise",
    "DPMSolverMultistepInverse": "turns pictures into noise; an upscale goes the other way",
    **dict.fromkeys(("DPM++ 2S a", "DPM++ 2S a Karras"), "is not offered; DPM++ SDE comes closest"),
    **dict.fromkeys(
        ("DPM++ 2M SDE Heun", "DPM++ 2M SDE Heun Karras", "DPM++ 2M SDE Heun Exponential"),
        "is not offered; DPM++ 2M SDE comes closest",
    ),
    **dict.fromkeys(("DPM fast", "DPM adaptive", "Restart"), "chooses steps of its own and is not offered"),
}

NAMES: Mapping[str, tuple[Sampler, Spacing]] = {
    **{
        f"{name} {suffix}".strip(): (sampler, Spacing(suffix.rpartition(" ")[2].lower() or "uniform"))
        for name, sampler, suffixes in _FAMILIES
        for suffix in suffixes
    },
    **_SINGLE,
}
"""Every name that is honoured."""


def resolve(name: str) -> tuple[Sampler, Spacing]:
    """Return what a scheduler's name stands for; its spelling counts.

    Raises:
        ValueError: the name is unknown, or one that cannot be honoured; the sentence says which and why.
    """
    if name in NAMES:
        return NAMES[name]
    if name in _REFUSED:
        raise ValueError(f"{name} {_REFUSED[name]}")
    name = name[:60]  # longer than any name, and short enough to repeat in an answer
    by_lower = {known.lower(): known for known in NAMES}
    close = [by_lower[match] for match in get_close_matches(name.lower(), by_lower)]
    raise ValueError(f"{name!r} is no scheduler" + (f"; did you mean {' or '.join(close)}?" if close else ""))

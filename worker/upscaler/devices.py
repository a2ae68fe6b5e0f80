"""The devices that networks run on."""

from textwrap import shorten

import torch

from core.errors import DeploymentError

_EXHAUSTED = ("allocate memory", "out of memory")
"""What PyTorch says when it has no memory left and has no name for that: of a processor, or of Apple's GPUs."""


def choose_device(choice: str) -> torch.device:
    """Return a device that is there: auto takes the first of cuda, mps and cpu.

    Raises:
        DeploymentError: it cannot be used.
    """
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=choice).device
    except (RuntimeError, AssertionError) as error:
        reason = shorten(str(error), 200, placeholder=" …")
        raise DeploymentError(f"UPSCALED_DEVICE is {choice}, which cannot be used: {reason}") from error


def is_exhaustion(error: MemoryError | RuntimeError) -> bool:
    """Tell whether an error says that a device has no memory left."""
    named = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return named or any(words in str(error) for words in _EXHAUSTED)

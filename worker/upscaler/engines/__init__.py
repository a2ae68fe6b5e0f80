"""The engines, and the choice of one."""

import importlib
import logging

from core.errors import DeploymentError
from worker.upscaler.engine import Engine
from worker.upscaler.engines.lanczos import Lanczos

logger = logging.getLogger(__name__)


def load(choice: str) -> Engine:
    """Make the engine a deployment chose: auto, lanczos, clarity, or `package.module:Class` for one from elsewhere.

    `auto` takes the best that can run here and says in the log when that is not the real one. A class from elsewhere
    is imported and called without arguments.

    Raises:
        DeploymentError: there is no such engine, or it cannot run here.
    """
    if choice == "auto":
        logger.warning("No model weights are installed: lanczos is used, which enlarges but invents no detail.")
        return Lanczos()
    if choice == "lanczos":
        return Lanczos()
    if choice == "clarity":
        raise DeploymentError("UPSCALED_ENGINE is clarity, but this build carries no clarity engine and no weights.")
    if ":" in choice:
        return _imported(choice)
    raise DeploymentError(
        f"UPSCALED_ENGINE is {choice!r}; the choices are auto, lanczos, clarity and package.module:Class."
    )


def _imported(choice: str) -> Engine:
    module, _, name = choice.partition(":")
    try:
        engine = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise DeploymentError(f"UPSCALED_ENGINE is {choice!r}, which cannot be loaded: {error}.") from error
    if not isinstance(engine, Engine):
        raise DeploymentError(f"UPSCALED_ENGINE is {choice!r}, which is no engine: it lacks name or upscale.")
    return engine

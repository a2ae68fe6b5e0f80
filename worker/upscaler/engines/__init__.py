"""The engines, and the choice of one."""

import importlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core.errors import DeploymentError
from worker.upscaler import weights
from worker.upscaler.engine import Engine
from worker.upscaler.engines.lanczos import Lanczos

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a deployment decides about its engine; docs/settings.md explains each word."""

    models_dir: Path = Path(".upscaled/models")
    clarity_checkpoint: str = ""
    clarity_preset: Literal["quality", "compat"] = "quality"
    clarity_hint: Literal["input", "preupscaled"] = "input"
    clarity_batch: int = 0
    clarity_compile: bool = False
    superres_weights: str = ""
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"


DEFAULTS = Config()


def load(choice: str, config: Config = DEFAULTS) -> Engine:
    """Make the engine a deployment chose: auto, lanczos, clarity, or `package.module:Class` for one from elsewhere.

    `auto` takes the best that can run here and says in the log when that is not the real one. A class from elsewhere
    is imported and called without arguments.

    Raises:
        DeploymentError: there is no such engine, or it cannot run here.
    """
    if choice == "auto":
        if not weights.missing(config.models_dir, config.clarity_checkpoint):
            return _load_clarity(config)
        logger.warning(
            "No weights of the clarity engine are installed (`upscaled models pull` fetches them): lanczos is used, "
            "which enlarges but invents no detail."
        )
        return Lanczos()
    if choice == "lanczos":
        return Lanczos()
    if choice == "clarity":
        return _load_clarity(config)
    if ":" in choice:
        return _imported(choice)
    raise DeploymentError(
        f"UPSCALED_ENGINE is {choice!r}; the choices are auto, lanczos, clarity and package.module:Class."
    )


def _load_clarity(config: Config) -> Engine:
    weights.require(config.models_dir, config.clarity_checkpoint)  # before the seconds that the next line takes
    from worker.upscaler.engines import clarity  # it brings torch and diffusers, which no other engine needs

    return clarity.load(config)


def _imported(choice: str) -> Engine:
    module, _, name = choice.partition(":")
    try:
        engine = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise DeploymentError(f"UPSCALED_ENGINE is {choice!r}, which cannot be loaded: {error}.") from error
    if not isinstance(engine, Engine):
        raise DeploymentError(f"UPSCALED_ENGINE is {choice!r}, which is no engine: it lacks name or upscale.")
    return engine

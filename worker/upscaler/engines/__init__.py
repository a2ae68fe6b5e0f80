"""The engines, and the choice of one."""

import importlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core.errors import DeploymentError
from core.options import EngineName, UpscaleOptions
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
    superres_variant: Literal["fidelity", "restore"] = "restore"
    superres_weights: str = ""
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"


DEFAULTS = Config()


class Engines:
    """A deployment's own engine, and those that a job may ask for by name, made when one first does.

    With a network of the operator's, superres is made at once: a setting that is wrong is to end the start, not a job.
    """

    def __init__(self, own: Engine, config: Config = DEFAULTS) -> None:
        """Take the deployment's own engine.

        Raises:
            DeploymentError: the operator's network cannot be used.
        """
        self.own = own
        self._config = config
        self._named: dict[EngineName, Engine] = {}
        # Clarity and superres have read it already.
        if config.superres_weights and own.name not in {"clarity", "superres"}:
            self._named[EngineName.SUPERRES] = load(EngineName.SUPERRES, config)

    def choose(self, options: UpscaleOptions) -> Engine:
        """Return the engine that is to run a job.

        Raises:
            DeploymentError: the job asks for one that cannot run here; why, with its settings and files, is in the log.
        """
        name = options.engine
        if name is None or name == self.own.name:
            return self.own
        if name not in self._named:
            try:
                self._named[name] = load(name, self._config)
            except DeploymentError as error:
                logger.error("a job asks for %s, which cannot run here: %s", name, error)  # noqa: TRY400
                raise DeploymentError(f"The {name} engine cannot run here; the service's log says why.") from error
        return self._named[name]


def load(choice: str, config: Config = DEFAULTS) -> Engine:
    """Make the engine of a name: auto, clarity, superres, lanczos, or `package.module:Class` for one from elsewhere.

    `auto` takes Clarity where its weights are, else superres, and says so in the log. A class from elsewhere
    is imported and called without arguments.

    Raises:
        DeploymentError: there is no such engine, or it cannot run here.
    """
    if choice == "auto":
        if not weights.missing(config.models_dir, config.clarity_checkpoint):
            return _load_clarity(config)
        logger.warning(
            "No weights of the clarity engine are installed (`upscaled models pull` fetches them): superres is used, "
            "which enlarges but invents no detail."
        )
        return _load_superres(config)
    if choice == "lanczos":
        return Lanczos()
    if choice == "superres":
        return _load_superres(config)
    if choice == "clarity":
        return _load_clarity(config)
    if ":" in choice:
        return _imported(choice)
    raise DeploymentError(
        f"UPSCALED_ENGINE is {choice!r}; the choices are auto, superres, lanczos, clarity and package.module:Class."
    )


def _load_clarity(config: Config) -> Engine:
    weights.require(config.models_dir, config.clarity_checkpoint)  # before the seconds that the next line takes
    from worker.upscaler.engines import clarity  # it brings torch and diffusers, which no other engine needs

    return clarity.load(config)


def _load_superres(config: Config) -> Engine:
    try:
        from worker.upscaler.engines import superres  # it brings torch
    except ModuleNotFoundError as error:
        raise DeploymentError(f"superres needs what upscaled[worker] installs: {error}.") from error
    return superres.load(config)


def _imported(choice: str) -> Engine:
    module, _, name = choice.partition(":")
    try:
        engine = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise DeploymentError(f"UPSCALED_ENGINE is {choice!r}, which cannot be loaded: {error}.") from error
    if not isinstance(engine, Engine):
        raise DeploymentError(
            f"UPSCALED_ENGINE is {choice!r}, which is no engine: it lacks name, upscale or peak_bytes."
        )
    return engine

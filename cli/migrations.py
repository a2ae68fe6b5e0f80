"""Alembic from inside: the same scripts as `alembic upgrade head`, without a file of settings."""

from pathlib import Path

from alembic import command
from alembic.config import Config

import migrations
from core.sealing import Sealer


def config(database_url: str, sealer: Sealer | None = None) -> Config:
    """Return Alembic's configuration for a database; no ini and no pyproject is needed where we are installed.

    Args:
        sealer: seals and opens the secrets that a migration meets; none: what the environment's settings make.
    """
    config = Config(attributes={"database_url": database_url, "sealer": sealer})
    config.set_main_option("script_location", str(Path(migrations.__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def upgrade(database_url: str, sealer: Sealer | None = None) -> None:
    """Bring the schema up to date; several processes may do so at once."""
    command.upgrade(config(database_url, sealer), "head")

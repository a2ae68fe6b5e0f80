"""Alembic from inside: the same scripts as `alembic upgrade head`, without a file of settings."""

from pathlib import Path

from alembic import command
from alembic.config import Config

import migrations


def config(database_url: str) -> Config:
    """Return Alembic's configuration for a database; no ini and no pyproject is needed where we are installed."""
    config = Config(attributes={"database_url": database_url})
    config.set_main_option("script_location", str(Path(migrations.__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def upgrade(database_url: str) -> None:
    """Bring the schema up to date; several processes may do so at once."""
    command.upgrade(config(database_url), "head")

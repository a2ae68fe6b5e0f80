"""`upscaled secrets`: the keys that seal secrets in the database."""

import asyncio

import click

from cli.keys import connected
from core.errors import DeploymentError
from core.sealing import Sealer, new_key
from core.settings import Settings
from db import sealed
from db.sealed import Resealed


def show_new_key() -> None:
    click.echo(new_key())


def rotate(settings: Settings) -> None:
    """Put every secret under the first encryption key and say how many there were.

    Raises:
        DeploymentError: the database cannot be reached; or some were sealed with a key that the settings do not name:
            they are left as they are.
    """
    resealed = asyncio.run(_reseal(settings))
    click.echo(f"Sealed {resealed.sealed} anew; {resealed.current} were under the first key already.")
    if resealed.lost:
        raise DeploymentError(
            f"{resealed.lost} could not be opened: name the key that sealed them in UPSCALED_ENCRYPTION_KEYS, after "
            "the first, and run this again."
        )


async def _reseal(settings: Settings) -> Resealed:
    async with connected(settings) as connection:
        return await sealed.reseal(connection, Sealer(settings))

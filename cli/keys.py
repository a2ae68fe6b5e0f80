"""`upscaled keys`: API keys, made, shown, limited and revoked in the settings' database."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import click
from sqlalchemy.ext.asyncio import AsyncConnection

from core.apiframe import timestamp
from core.errors import DatabaseUnavailable, DeploymentError
from core.settings import Settings
from db import keys
from db.keys import DEFAULT_SCOPES, NO_LIMITS, KeyListing, Limits
from db.models import Scope
from db.session import Database

MAX_NAME_CHARACTERS = 100

_UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def read_lifetime(given: str | None) -> timedelta | None:
    """Return how long a key shall live: `30m`, `12h` or `90d`.

    Raises:
        click.BadParameter: it is none of that.
    """
    if given is None:
        return None
    parts = re.fullmatch("([1-9][0-9]{0,4})([mhd])", given)
    if parts is None:
        raise click.BadParameter("must be a time such as 30m, 12h or 90d", param_hint="--expires")
    return timedelta(**{_UNITS[parts[2]]: int(parts[1])})


def check_name(name: str) -> str:
    """Return the name of a key.

    Raises:
        click.BadParameter: it would spoil the list of keys.
    """
    if not (name.isprintable() and 1 <= len(name) <= MAX_NAME_CHARACTERS):
        raise click.BadParameter(f"must be 1 to {MAX_NAME_CHARACTERS} printable characters", param_hint="NAME")
    return name


async def create_key(
    settings: Settings,
    name: str,
    limits: Limits = NO_LIMITS,
    scopes: Collection[Scope] = DEFAULT_SCOPES,
    lifetime: timedelta | None = None,
) -> str:
    """Make an API key in the settings' database and return it."""
    async with connected(settings) as connection:
        return await keys.create(connection, name, limits, scopes, lifetime)


async def is_working_key(settings: Settings, key: str) -> bool:
    """Tell whether the settings' database knows the key: the environment may name another one than last time."""
    async with connected(settings) as connection:
        record = await keys.find(connection, key) if keys.is_well_formed(key) else None
        return record is not None and record.active


async def limit_key(settings: Settings, which: str, limits: Limits) -> KeyListing:
    """Set what an API key may ask for, and return the key as it was.

    Raises:
        click.BadParameter: `which` is neither the id nor the prefix of one key.
    """
    async with connected(settings) as connection:
        chosen = await _choose(connection, which)
        await keys.set_limits(connection, chosen.id, limits)
        return chosen


async def revoke_key(settings: Settings, which: str) -> KeyListing:
    """Revoke an API key, if it is not, and return it as it was.

    Raises:
        click.BadParameter: as `limit_key`.
    """
    async with connected(settings) as connection:
        chosen = await _choose(connection, which)
        await keys.revoke(connection, chosen.id)
        return chosen


def show_keys(settings: Settings, as_json: bool) -> None:
    """Print all API keys, the oldest first: as a table, or as a JSON array."""
    listed = asyncio.run(_browse(settings))
    if as_json:
        click.echo(json.dumps([_described(key) for key in listed], indent=2))
        return
    rows = [("PREFIX", "NAME", "SCOPES", "STATE", "CREATED", "EXPIRES", "LAST USED", "LIMITS", "PIXELS TODAY")]
    rows += [
        (
            *(key.prefix, key.name, ",".join(key.scopes), key.state),
            *(_minute(moment) for moment in (key.created_at, key.expires_at, key.last_used_at)),
            *(_in_words(key.limits), str(key.pixels_today)),
        )
        for key in listed
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


async def _browse(settings: Settings) -> Sequence[KeyListing]:
    async with connected(settings) as connection:
        return await keys.browse(connection)


async def _choose(connection: AsyncConnection, which: str) -> KeyListing:
    found = await keys.browse(connection, which) if which.isascii() else []
    if not found:
        raise click.BadParameter("there is no API key of this prefix or id", param_hint="PREFIX|ID")
    if len(found) > 1:
        ids = ", ".join(str(key.id) for key in found)
        raise click.BadParameter(f"several API keys begin like this; name one by its id: {ids}", param_hint="PREFIX|ID")
    return found[0]


@asynccontextmanager
async def connected(settings: Settings) -> AsyncGenerator[AsyncConnection]:
    """Lend a connection to the settings' database; raises DeploymentError where it cannot be reached."""
    database = Database(settings)
    try:
        async with database.connection() as connection:
            yield connection
    except DatabaseUnavailable as error:
        raise DeploymentError(str(error)) from error
    finally:
        await database.close()


def _described(key: KeyListing) -> dict[str, Any]:
    moments = {
        "createdAt": key.created_at,
        "expiresAt": key.expires_at,
        "lastUsedAt": key.last_used_at,
        "revokedAt": key.revoked_at,
    }
    return {
        "id": str(key.id),
        "prefix": key.prefix,
        "name": key.name,
        "scopes": key.scopes,
        "state": key.state,
        **{name: moment and timestamp(moment) for name, moment in moments.items()},
        "weight": key.limits.weight,
        "maxConcurrent": key.limits.max_concurrent,
        "maxQueued": key.limits.max_queued,
        "requestsPerMinute": key.limits.requests_per_minute,
        "dailyPixels": key.limits.daily_pixels,
        "pixelsToday": key.pixels_today,
    }


def _minute(moment: datetime | None) -> str:
    return "-" if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M}Z"


def _in_words(limits: Limits) -> str:
    words = {
        "weight {:g}": None if limits.weight == NO_LIMITS.weight else limits.weight,
        "{} running": limits.max_concurrent,
        "{} waiting": limits.max_queued,
        "{}/min": limits.requests_per_minute,
        "{} px/day": limits.daily_pixels,
    }
    return ", ".join(form.format(value) for form, value in words.items() if value is not None) or "-"

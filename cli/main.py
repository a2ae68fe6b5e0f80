"""The `upscaled` command. Each subcommand imports what it needs when it runs: the API image has no numpy."""

import asyncio
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from core.errors import DeploymentError
from core.settings import Settings, load_model_settings, load_settings
from core.telemetry import configure_logging

DEFAULT_FOLDER = Path(".upscaled")

_folder = click.option(
    "--folder", type=click.Path(file_okay=False, path_type=Path), default=DEFAULT_FOLDER, show_default=True
)


def main() -> None:
    """Run the command line; a wrong deployment ends it with one clear line and exit status 2."""
    try:
        cli()
    except DeploymentError as error:
        click.echo(f"upscaled: {error}", err=True)
        sys.exit(2)


@click.group()
@click.version_option(package_name="upscaled")
def cli() -> None:
    """Upscale images on your own machines."""


def _start(settings: Settings | None = None) -> Settings:
    settings = settings or load_settings()
    configure_logging(settings.log_level)
    return settings


@cli.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True)
def api(host: str, port: int) -> None:
    """Serve the HTTP API."""
    import api.server

    api.server.serve(_start(), host, port)


@cli.command()
def worker() -> None:
    """Upscale: run one worker process, on one GPU."""
    import worker.app

    worker.app.run(_start())


@cli.command()
def dispatcher() -> None:
    """Deliver webhooks, and sweep."""
    import worker.dispatcher

    worker.dispatcher.run(_start())


@cli.command()
def migrate() -> None:
    """Bring the database's schema up to date."""
    from cli.migrations import upgrade
    from core.sealing import Sealer

    settings = _start()
    upgrade(settings.database_url, Sealer(settings))


@cli.group()
def keys() -> None:
    """API keys."""


def _limits(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for each field of db.keys.Limits."""
    options = {
        "--weight": (click.FloatRange(min=0.001, max=1000), "Its share of the workers while others wait too."),
        "--max-concurrent": (click.IntRange(min=1, max=10_000), "How many of its jobs may run."),
        "--max-queued": (click.IntRange(min=1, max=2**31 - 1), "How many of its jobs may wait."),
        "--requests-per-minute": (click.IntRange(min=1, max=2**31 - 1), "How many requests it may make."),
        "--daily-pixels": (click.IntRange(min=1, max=2**63 - 1), "How many pixels may be made for it in a day."),
    }
    for name, (kind, help) in reversed(options.items()):
        default = 1.0 if name == "--weight" else None
        shown = default is not None
        option = click.option(name, type=kind, default=default, show_default=shown, help=help, callback=_refuse_nan)
        command = option(command)
    return command


def _refuse_nan(_context: click.Context, _option: click.Parameter, value: float | None) -> float | None:
    if value is not None and math.isnan(value):  # it is in every range, as click compares
        raise click.BadParameter("must be a number")
    return value


@keys.command()
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(["jobs:write", "jobs:read", "admin"]),
    multiple=True,
    default=["jobs:write", "jobs:read"],
    show_default=True,
    help="What it may be used for; may be given several times. admin includes the others.",
)
@click.option("--expires", metavar="TIME", help="After how long it stops working, such as 90d, 12h or 30m.")
@_limits
@_folder
def create(name: str, scopes: Sequence[str], expires: str | None, folder: Path, **limits: Any) -> None:
    """Make an API key and print it: the only time that it is shown.

    Works on the database of UPSCALED_DATABASE_URL, or else on that of a running `upscaled serve`; so do all of these.
    """
    from cli.keys import check_name, create_key, read_lifetime
    from cli.stack import read_environment
    from db.keys import Limits
    from db.models import Scope

    name, lifetime, limited = check_name(name), read_lifetime(expires), Limits(**limits)
    settings = load_settings(**read_environment(folder))
    click.echo(asyncio.run(create_key(settings, name, limited, [Scope(scope) for scope in scopes], lifetime)))


@keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="As JSON, with all that is known of each.")
@_folder
def list_keys(as_json: bool, folder: Path) -> None:
    """Show all API keys, what they may do, and what was made for them today; never the keys themselves."""
    from cli.keys import show_keys
    from cli.stack import read_environment

    show_keys(load_settings(**read_environment(folder)), as_json)


@keys.command()
@click.argument("key", metavar="PREFIX|ID")
@_limits
@_folder
def limit(key: str, folder: Path, **limits: Any) -> None:
    """Set all limits of an API key, named as `keys list` shows it; what is not given, is lifted."""
    from cli.keys import limit_key
    from cli.stack import read_environment
    from db.keys import Limits

    limited = asyncio.run(limit_key(load_settings(**read_environment(folder)), key, Limits(**limits)))
    click.echo(f"Limits of {limited.name} ({limited.prefix}) set.")


@keys.command()
@click.argument("key", metavar="PREFIX|ID")
@_folder
def revoke(key: str, folder: Path) -> None:
    """Let an API key, named as `keys list` shows it, work no more.

    Its jobs go on, and are delivered. To revoke it again does no harm.
    """
    from cli.keys import revoke_key
    from cli.stack import read_environment

    revoked = asyncio.run(revoke_key(load_settings(**read_environment(folder)), key))
    before = " It was revoked before." if revoked.revoked_at else " It works for five more seconds at most."
    click.echo(f"Revoked {revoked.name} ({revoked.prefix}, {revoked.id}).{before}")


@cli.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True)
@_folder
def serve(host: str, port: int, folder: Path) -> None:
    """Run the whole service on this machine until Ctrl-C, keeping its data in one folder.

    PostgreSQL and Redis are started too, unless UPSCALED_DATABASE_URL and UPSCALED_REDIS_URL name others.
    """
    from cli.processes import exit_on_signals
    from cli.stack import Stack

    exit_on_signals()
    configure_logging("WARNING")
    with Stack(folder, host=host, port=port) as stack, suppress(KeyboardInterrupt):
        click.echo(f"upscaled is up on {stack.url}, its API key is {stack.key}, its data is in {folder.resolve()}")
        click.echo("Ctrl-C stops it.")
        stack.wait()


@cli.command()
@click.argument("image", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--model",
    type=click.Choice(["clarity-upscale", "superres"]),
    default="clarity-upscale",
    show_default=True,
    help="clarity-upscale is done by whatever engine the service has.",
)
@click.option("--scale", type=click.FloatRange(1, 8), default=2, show_default=True, callback=_refuse_nan)
@click.option("--format", "output_format", type=click.Choice(["png", "jpg", "webp"]), default="png", show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out"), show_default=True)
def upscale(image: Path, model: str, scale: float, output_format: str, out: Path) -> None:
    """Upscale one IMAGE through the whole service, started for it and stopped after it."""
    from cli.processes import exit_on_signals
    from cli.upscale import upscale_file

    exit_on_signals()
    upscale_file(image, model, scale, output_format, out)


@cli.group()
def secrets() -> None:
    """The keys that seal secrets in the database."""


@secrets.command("new-key")
def new_key() -> None:
    """Print a new key for UPSCALED_ENCRYPTION_KEYS."""
    from cli.secrets import show_new_key

    show_new_key()


@secrets.command()
@_folder
def rotate(folder: Path) -> None:
    """Seal every secret anew with the first of UPSCALED_ENCRYPTION_KEYS; the service may run meanwhile."""
    from cli.secrets import rotate
    from cli.stack import read_environment

    rotate(load_settings(**read_environment(folder)))


@cli.group()
def models() -> None:
    """Model weights, in the folder of UPSCALED_MODELS_DIR (.upscaled/models)."""


@models.command("list")
def list_models() -> None:
    """Show which weights there are, what they may be used for, and which are installed."""
    from cli.models import show

    show(load_model_settings().models_dir)


@models.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
def pull(names: tuple[str, ...]) -> None:
    """Fetch the weights of each NAME, or all that upscaling needs, from the Hugging Face Hub."""
    from cli.models import pull

    pull(load_model_settings().models_dir, names)


@models.command()
def verify() -> None:
    """Compare the installed weights, byte for byte, with what they should be; status 1 if they differ."""
    from cli.models import verify

    verify(load_model_settings().models_dir)


if __name__ == "__main__":
    main()

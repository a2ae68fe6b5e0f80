"""The `upscaled` command. Each subcommand imports what it needs when it runs: the API image has no numpy."""

import asyncio
import sys
from contextlib import suppress
from pathlib import Path

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

    upgrade(_start().database_url)


@cli.group()
def keys() -> None:
    """API keys."""


_weight = click.option(
    "--weight",
    type=click.FloatRange(min=0.001, max=1000, clamp=False),
    default=1.0,
    show_default=True,
    help="Its share of the workers while others wait too.",
)
_max_concurrent = click.option(
    "--max-concurrent", type=click.IntRange(min=1, max=10_000), help="How many of its jobs may run."
)
_max_queued = click.option("--max-queued", type=click.IntRange(min=1), help="How many of its jobs may wait.")


@keys.command()
@click.argument("name")
@_weight
@_max_concurrent
@_max_queued
@_folder
def create(name: str, weight: float, max_concurrent: int | None, max_queued: int | None, folder: Path) -> None:
    """Make an API key and print it: the only time that it is shown.

    Works on the database of UPSCALED_DATABASE_URL, or else on that of a running `upscaled serve`.
    """
    from cli.stack import create_key, read_environment
    from db.keys import Limits

    limits = Limits(weight=weight, max_concurrent=max_concurrent, max_queued=max_queued)
    click.echo(asyncio.run(create_key(load_settings(**read_environment(folder)), name, limits)))


@keys.command()
@click.argument("prefix")
@_weight
@_max_concurrent
@_max_queued
@_folder
def limit(prefix: str, weight: float, max_concurrent: int | None, max_queued: int | None, folder: Path) -> None:
    """Set all limits of the API key whose first ten characters are PREFIX; what is not given, is lifted."""
    from cli.stack import limit_key, read_environment
    from db.keys import Limits

    limits = Limits(weight=weight, max_concurrent=max_concurrent, max_queued=max_queued)
    names = asyncio.run(limit_key(load_settings(**read_environment(folder)), prefix, limits))
    if not names:
        raise click.BadParameter("no API key begins like this", param_hint="PREFIX")
    click.echo(f"Limits of {', '.join(names)} set.")


@cli.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True)
@_folder
def serve(host: str, port: int, folder: Path) -> None:
    """Run the whole service on this machine until Ctrl-C, keeping its data in one folder.

    PostgreSQL and Redis are started too, unless UPSCALED_DATABASE_URL and UPSCALED_REDIS_URL name others.
    """
    from cli.processes import exit_on_sigterm
    from cli.stack import Stack

    exit_on_sigterm()
    configure_logging("WARNING")
    with Stack(folder, host=host, port=port) as stack, suppress(KeyboardInterrupt):
        click.echo(f"upscaled is up on {stack.url}, its API key is {stack.key}, its data is in {folder.resolve()}")
        click.echo("Ctrl-C stops it.")
        stack.wait()


@cli.command()
@click.argument("image", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--scale", type=click.Choice(["1", "2", "4", "8"]), default="2", show_default=True)
@click.option("--format", "output_format", type=click.Choice(["png", "jpg", "webp"]), default="png", show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out"), show_default=True)
def upscale(image: Path, scale: str, output_format: str, out: Path) -> None:
    """Upscale one IMAGE through the whole service, started for it and stopped after it."""
    from cli.processes import exit_on_sigterm
    from cli.upscale import upscale_file

    exit_on_sigterm()
    upscale_file(image, int(scale), output_format, out)


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

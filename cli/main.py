"""The `upscaled` command. Each subcommand imports what it needs when it runs: the API image has no numpy."""

import asyncio
import sys
from pathlib import Path

import click

from core.errors import DeploymentError
from core.settings import Settings, load_settings
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
    import uvicorn

    from api.app import create_app

    settings = _start()
    uvicorn.run(create_app(settings), host=host, port=port, access_log=False, log_config=None, date_header=False)


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


@keys.command()
@click.argument("name")
@_folder
def create(name: str, folder: Path) -> None:
    """Make an API key and print it: the only time that it is shown.

    Works on the database of UPSCALED_DATABASE_URL, or else on that of a running `upscaled serve`.
    """
    from cli.stack import create_key, read_environment

    click.echo(asyncio.run(create_key(load_settings(**read_environment(folder)), name)))


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
    with Stack(folder, host=host, port=port) as stack:
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


if __name__ == "__main__":
    main()

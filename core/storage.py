"""Storage of inputs and results, and the layout of its keys.

    uploads/{upload_id}.{png|jpg|webp}             what callers sent
    results/{job_id}/{attempt}.{png|jpg|webp}      what an attempt made; the attempt in the key keeps zombies apart

A key is made of our own ids and an extension of our own choosing, never of a caller's words.
"""

import os
import re
import secrets
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import parse_qs, urlencode
from uuid import UUID

import anyio.to_thread

from core import failpoints, signing
from core.errors import NotFound, StorageUnavailable
from core.options import OutputFormat
from core.settings import Settings

FILES_PATH = "/v2/files"
"""Where the API serves the objects of a local folder."""

_KEY = re.compile(r"(uploads|results)/[0-9a-f-]{36}(/[0-9]+)?\.(png|jpg|webp)")

CONTENT_TYPES = {f".{format}": format.content_type for format in OutputFormat}
"""The only content types we ever serve, by the extension that we gave the key."""


def sniff(head: bytes) -> OutputFormat | None:
    """Tell the format from the first 12 bytes of a file; None when it is none that we read."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return OutputFormat.PNG
    if head.startswith(b"\xff\xd8\xff"):
        return OutputFormat.JPG
    return OutputFormat.WEBP if head.startswith(b"RIFF") and head[8:12] == b"WEBP" else None


def upload_key(upload_id: UUID, format: OutputFormat) -> str:
    return f"uploads/{upload_id}.{format}"


def result_key(job_id: UUID, attempt: int, format: OutputFormat) -> str:
    return f"results/{job_id}/{attempt}.{format}"


class Storage(Protocol):
    """Objects by key. Every method raises StorageUnavailable when the place itself fails."""

    async def write(self, key: str, data: bytes) -> None:
        """Store all of `data` under `key`, or nothing."""
        ...

    async def read(self, key: str) -> bytes:
        """Return the object's bytes; raises NotFound when there is none."""
        ...

    async def delete(self, key: str) -> None:
        """Remove the object; an absent one is no error."""
        ...

    def url(self, key: str, expires_at: datetime) -> str:
        """Return a URL that anyone may GET until `expires_at`; the same arguments give the same URL."""
        ...

    def key_of(self, url: str) -> str | None:
        """Return the key when `url` is one that `url()` made and that still holds, else None."""
        ...


class LocalStorage:
    """A folder; its URLs are signed and served by the API under FILES_PATH."""

    def __init__(self, folder: Path, public_url: str, secret: bytes) -> None:
        self._folder = folder.resolve()
        self._base_url = public_url + FILES_PATH
        self._secret = secret

    async def write(self, key: str, data: bytes) -> None:
        await anyio.to_thread.run_sync(self._write, self.path(key), data)

    async def read(self, key: str) -> bytes:
        return await anyio.to_thread.run_sync(self._read, self.path(key))

    async def delete(self, key: str) -> None:
        await anyio.to_thread.run_sync(self._delete, self.path(key))

    def url(self, key: str, expires_at: datetime) -> str:
        expires = int(expires_at.timestamp())
        query = urlencode({"expires": expires, "signature": signing.sign_object(self._secret, key, expires)})
        return f"{self._base_url}/{key}?{query}"

    def key_of(self, url: str) -> str | None:
        if not url.startswith(self._base_url + "/"):
            return None
        key, _, query = url[len(self._base_url) + 1 :].partition("?")
        given = parse_qs(query)
        expires, signature = given.get("expires", [""])[0], given.get("signature", [""])[0]
        return key if self.allows(key, expires, signature) else None

    def allows(self, key: str, expires: str, signature: str) -> bool:
        """Tell whether this signature lets `key` be read now."""
        if not (expires.isascii() and expires.isdecimal() and len(expires) <= 12):
            return False
        return signing.verify_object(self._secret, key, int(expires), signature) and time.time() < int(expires)

    def path(self, key: str) -> Path:
        """Return where `key` lies. Keys are ours or carry our signature, yet none may lead out of the folder."""
        if not _KEY.fullmatch(key):
            raise NotFound("There is no such object.")
        return self._folder / key

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        # Written beside its place and renamed into it: a reader sees all of it or nothing. Synced before the rename,
        # because the row that names it is about to be committed.
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        try:
            with _open_new(part) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            failpoints.reach("during_upload")
            part.replace(path)
        except OSError as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise StorageUnavailable("The storage could not be written to.") from error

    @staticmethod
    def _read(path: Path) -> bytes:
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            raise NotFound("There is no such object.") from error
        except OSError as error:
            raise StorageUnavailable("The storage could not be read.") from error

    @staticmethod
    def _delete(path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageUnavailable("The storage could not be written to.") from error
        if path.parent.parent.name == "results":
            with suppress(OSError):
                for part in path.parent.glob(f".{path.name}.*.part"):  # of a process that was killed while it wrote
                    part.unlink(missing_ok=True)
                path.parent.rmdir()  # the folder of a job goes with the last object in it


def _open_new(path: Path) -> BinaryIO:
    """Create a file, and its folder unless that is there; whoever removes an empty folder may come in between."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("xb")
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("xb")


def open_storage(settings: Settings) -> LocalStorage:
    """Return the storage that the settings name."""
    return LocalStorage(settings.storage_dir, settings.public_url, settings.secret_key.get_secret_value().encode())

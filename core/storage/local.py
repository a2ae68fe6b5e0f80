"""A local folder: its objects are served, and taken in, by the API under FILES_PATH, by signed URLs."""

import os
import re
import secrets
import time
from collections.abc import AsyncIterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qs, urlencode

import anyio.to_thread

from core import failpoints, signing
from core.errors import NotFound, StorageUnavailable
from core.storage.objects import ObjectHead, SignedPut

FILES_PATH = "/v2/files"
"""Where the API serves the objects of a local folder."""

_KEY = re.compile(r"(uploads|results)/[0-9a-f-]{36}(/[0-9]+)?\.(png|jpg|webp)")


class LocalStorage:
    """A folder; its URLs are signed and served by the API under FILES_PATH."""

    def __init__(self, folder: Path, public_url: str, secret: bytes) -> None:
        self._folder = folder.resolve()
        self._base_url = public_url + FILES_PATH
        self._secret = secret

    async def write(self, key: str, data: bytes) -> None:
        await anyio.to_thread.run_sync(self._write, self.path(key), data)

    async def write_stream(self, key: str, chunks: AsyncIterable[bytes]) -> None:
        raise NotImplementedError

    async def read(self, key: str, max_bytes: int | None = None) -> bytes:
        del max_bytes
        return await anyio.to_thread.run_sync(self._read, self.path(key))

    async def look(self, key: str) -> ObjectHead:
        raise NotImplementedError

    async def delete(self, key: str) -> None:
        await anyio.to_thread.run_sync(self._delete, self.path(key))

    async def url(self, key: str, expires_at: datetime) -> str:
        expires = int(expires_at.timestamp())
        query = urlencode({"expires": expires, "signature": signing.sign_object(self._secret, key, expires)})
        return f"{self._base_url}/{key}?{query}"

    async def sign_put(self, key: str, content_type: str, size_bytes: int, expires_at: datetime) -> SignedPut:
        raise NotImplementedError

    async def key_of(self, url: str) -> str | None:
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

"""A local folder: its objects are served, and taken in, by the API under FILES_PATH, by signed URLs."""

import os
import secrets
import time
from collections.abc import AsyncIterable, Generator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qs, urlencode

import anyio
import anyio.to_thread

from core import failpoints, signing
from core.errors import InputTooLarge, NotFound, StorageUnavailable, UploadExists
from core.storage.objects import SNIFFED_BYTES, ObjectHead, SignedPut, check_key, gather, is_upload

FILES_PATH = "/v2/files"
"""Where the API serves the objects of a local folder, and takes uploads."""

_BLOCK_BYTES = 1024 * 1024
"""How much of a stream is handed to a thread at once."""


class LocalStorage:
    """A folder; its URLs are signed and served by the API under FILES_PATH."""

    def __init__(self, folder: Path, public_url: str, secret: bytes) -> None:
        self._folder = folder.resolve()
        self._base_url = public_url + FILES_PATH
        self._secret = secret

    async def write(self, key: str, chunks: AsyncIterable[bytes]) -> None:
        await self._write(key, chunks, overwrite=True)

    async def create(self, key: str, chunks: AsyncIterable[bytes]) -> None:
        """Do as `write`, but raise UploadExists when there is such an object already."""
        if await anyio.to_thread.run_sync(self.path(key).exists):
            raise UploadExists("This upload was stored before.")  # before anything is read
        await self._write(key, chunks, overwrite=False)

    async def _write(self, key: str, chunks: AsyncIterable[bytes], *, overwrite: bool) -> None:
        part = await anyio.to_thread.run_sync(_Part, self.path(key))
        try:
            async for block in gather(chunks, _BLOCK_BYTES):
                await anyio.to_thread.run_sync(part.write, block)
            await anyio.to_thread.run_sync(part.settle, overwrite)
        except BaseException:  # a cancellation, too
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(part.discard)
            raise

    async def read(self, key: str, max_bytes: int | None = None) -> bytes:
        return await anyio.to_thread.run_sync(self._read, self.path(key), max_bytes)

    async def look(self, key: str) -> ObjectHead:
        return await anyio.to_thread.run_sync(self._look, self.path(key))

    async def delete(self, key: str) -> None:
        await anyio.to_thread.run_sync(self._delete, self.path(key))

    async def url(self, key: str, expires_at: datetime) -> str:
        expires = int(expires_at.timestamp())
        query = urlencode({"expires": expires, "signature": signing.sign_object(self._secret, key, expires)})
        return f"{self._base_url}/{key}?{query}"

    async def sign_put(self, key: str, content_type: str, size_bytes: int, expires_at: datetime) -> SignedPut:
        self.path(key)
        expires = int(expires_at.timestamp())
        signature = signing.sign_put(self._secret, key, content_type, size_bytes, expires)
        query = urlencode({"type": content_type, "size": size_bytes, "expires": expires, "signature": signature})
        headers = {"Content-Type": content_type, "Content-Length": str(size_bytes), "If-None-Match": "*"}
        return SignedPut(f"{self._base_url}/{key}?{query}", headers)

    async def key_of(self, url: str) -> str | None:
        if not url.startswith(self._base_url + "/"):
            return None
        key, _, query = url[len(self._base_url) + 1 :].partition("?")
        given = parse_qs(query)
        expires, signature = given.get("expires", [""])[0], given.get("signature", [""])[0]
        return key if self.allows(key, expires, signature) else None

    def allows(self, key: str, expires: str, signature: str) -> bool:
        """Tell whether this signature lets `key` be read now."""
        if not _is_number(expires):
            return False
        return signing.verify_object(self._secret, key, int(expires), signature) and time.time() < int(expires)

    def allows_put(self, key: str, content_type: str, size: str, expires: str, signature: str) -> bool:
        """Tell whether this signature lets an upload of that type and size be put under `key` now."""
        if not (is_upload(key) and _is_number(size) and _is_number(expires)):
            return False
        signed = signing.verify_put(self._secret, key, content_type, int(size), int(expires), signature)
        return signed and time.time() < int(expires)

    def path(self, key: str) -> Path:
        """Return where `key` lies. Keys are ours or carry our signature, yet none may lead out of the folder."""
        check_key(key)
        return self._folder / key

    @staticmethod
    def _read(path: Path, max_bytes: int | None) -> bytes:
        with _reading(), path.open("rb") as file:
            if max_bytes is not None and os.fstat(file.fileno()).st_size > max_bytes:
                raise InputTooLarge(f"The image file is larger than {max_bytes} bytes.")
            return file.read()

    @staticmethod
    def _look(path: Path) -> ObjectHead:
        with _reading(), path.open("rb") as file:
            return ObjectHead(os.fstat(file.fileno()).st_size, file.read(SNIFFED_BYTES))

    @staticmethod
    def _delete(path: Path) -> None:
        with _writing():
            path.unlink(missing_ok=True)
        with suppress(OSError):
            for part in path.parent.glob(f".{path.name}.*.part"):  # of a process that was killed while it wrote
                part.unlink(missing_ok=True)
            if path.parent.parent.name == "results":
                path.parent.rmdir()  # the folder of a job goes with the last object in it


class _Part:
    """An object on its way, beside its place: a reader sees all of it there or nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        with _writing():
            self._file = _open_new(self._part)

    def write(self, data: bytes) -> None:
        with _writing():
            self._file.write(data)

    def settle(self, overwrite: bool) -> None:
        """Take the place; synced before that, because the row that names the object is about to be committed."""
        with _writing():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            failpoints.reach("during_upload")
            if overwrite:
                self._part.replace(self._path)
                return
            try:
                os.link(self._part, self._path)  # unlike a rename, it never overwrites
            except FileExistsError as error:
                raise UploadExists("This upload was stored before.") from error
            self._part.unlink()

    def discard(self) -> None:
        with suppress(OSError):  # what could not be written will not be written by close() either
            self._file.close()
        with suppress(OSError):
            self._part.unlink(missing_ok=True)


@contextmanager
def _writing() -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise StorageUnavailable("The storage could not be written to.") from error


@contextmanager
def _reading() -> Generator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound("There is no such object.") from error
    except OSError as error:
        raise StorageUnavailable("The storage could not be read.") from error


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 12


def _open_new(path: Path) -> BinaryIO:
    """Create a file, and its folder unless that is there; whoever removes an empty folder may come in between."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("xb")
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("xb")

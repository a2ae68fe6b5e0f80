"""What a storage is, and the layout of its keys.

    uploads/{upload_id}.{png|jpg|webp}             what callers sent
    results/{job_id}/{attempt}.{png|jpg|webp}      what an attempt made; the attempt in the key keeps zombies apart

A key is made of our own ids and an extension of our own choosing, never of a caller's words.
"""

import re
from collections.abc import AsyncGenerator, AsyncIterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from core.errors import NotFound
from core.options import OutputFormat

_KEY = re.compile(r"(uploads|results)/[0-9a-f-]{36}(/[0-9]{1,10})?\.(png|jpg|webp)")

CONTENT_TYPES = {f".{format}": format.content_type for format in OutputFormat}
"""The only content types we ever serve, by the extension that we gave the key."""

CACHE_CONTROL = "private, max-age=3600, immutable"
"""What everybody who reads an object is told: it never changes under its key."""

SNIFFED_BYTES = 12
"""How many bytes from its beginning tell the format of a file."""


def sniff(head: bytes) -> OutputFormat | None:
    """Tell the format from the first SNIFFED_BYTES of a file; None when it is none that we read."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return OutputFormat.PNG
    if head.startswith(b"\xff\xd8\xff"):
        return OutputFormat.JPG
    return OutputFormat.WEBP if head.startswith(b"RIFF") and head[8:12] == b"WEBP" else None


def upload_key(upload_id: UUID, format: OutputFormat) -> str:
    return f"uploads/{upload_id}.{format}"


def is_upload(key: str) -> bool:
    """Tell whether the object came from a caller."""
    return key.startswith("uploads/")


def result_key(job_id: UUID, attempt: int, format: OutputFormat) -> str:
    return f"results/{job_id}/{attempt}.{format}"


def check_key(key: str) -> None:
    """Raise NotFound for what can be no key of ours, whoever signed it."""
    if not _KEY.fullmatch(key):
        raise NotFound("There is no such object.")


async def gather(chunks: AsyncIterable[bytes], size_bytes: int) -> AsyncGenerator[bytes]:
    """Yield the same bytes in blocks of that size, the last one smaller; nothing where nothing comes."""
    rest = bytearray()
    async for chunk in chunks:
        rest += chunk
        while len(rest) >= size_bytes:
            yield bytes(rest[:size_bytes])
            del rest[:size_bytes]
    if rest:
        yield bytes(rest)


@dataclass(frozen=True, slots=True)
class ObjectHead:
    """What can be told of an object without reading all of it."""

    size_bytes: int
    head: bytes
    """Its first SNIFFED_BYTES, or all of it when it has fewer."""


@dataclass(frozen=True, slots=True)
class SignedPut:
    """A URL to which whoever holds it may PUT one object, with these very headers."""

    url: str
    headers: Mapping[str, str]


class Storage(Protocol):
    """Objects by key.

    Every method raises StorageUnavailable when the place itself fails, and all but `delete` StorageRefused when it does
    not let us: jobs fail by that, and the operator has to mend it.
    """

    async def write(self, key: str, chunks: AsyncIterable[bytes]) -> None:
        """Store all that comes, or nothing; what `chunks` raises is raised, and nothing is kept.

        Holds a few megabytes in memory at most, however long the object becomes.
        """
        ...

    async def read(self, key: str, max_bytes: int | None = None) -> bytes:
        """Return the object's bytes.

        Raises:
            NotFound: there is no such object.
            InputTooLarge: it has more than `max_bytes`; no more than that was read.
        """
        ...

    async def look(self, key: str) -> ObjectHead:
        """Return the object's size and its first bytes; raises NotFound when there is none."""
        ...

    async def delete(self, key: str) -> None:
        """Remove the object; an absent one is no error."""
        ...

    async def url(self, key: str, expires_at: datetime) -> str:
        """Return a URL that anyone may GET until `expires_at`.

        The same arguments give the same URL for some minutes at least, so that caches and ETags hold.
        """
        ...

    async def sign_put(self, key: str, content_type: str, size_bytes: int, expires_at: datetime) -> SignedPut:
        """Return a URL to which anyone may PUT an object of that type and size, until `expires_at`."""
        ...

    async def key_of(self, url: str) -> str | None:
        """Return the key when `url` is one that `url()` made and that still holds, else None."""
        ...

"""A finished picture's file on this machine, until it is where it belongs."""

import io
import os
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import BinaryIO

import anyio.to_thread

from core.errors import StorageUnavailable

_BLOCK_BYTES = 1 << 20


class Draft:
    """A file without a name: it is gone when it is closed, or its process has ended, however that came about.

    Raises:
        StorageUnavailable: there is no place for it.
    """

    def __init__(self) -> None:
        try:
            self.file: BinaryIO = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - `close` closes it
        except OSError as error:
            raise StorageUnavailable("There is no place for a temporary file.") from error

    @property
    def size_bytes(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    def open(self) -> io.BufferedReader:
        """Open it to be read from its beginning, whoever else reads it."""
        # On Linux this opens it anew; a copy of the descriptor, which others make of it, shares its position.
        reader = Path(f"/dev/fd/{self.file.fileno()}").open("rb")  # noqa: SIM115 - whoever asked closes it
        reader.seek(0)
        return reader

    async def blocks(self) -> AsyncGenerator[bytes]:
        """Read it in blocks."""
        with self.open() as reader:
            while block := await anyio.to_thread.run_sync(reader.read, _BLOCK_BYTES):
                yield block

    def close(self) -> None:
        self.file.close()

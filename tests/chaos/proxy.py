"""A TCP proxy on loopback that loses what passes through it."""

import asyncio
import socket
import struct
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress

from cli.processes import LOOPBACK, free_port

_CHUNK_BYTES = 64 * 1024
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Proxy:
    """Passes connections on to a port, in a thread of its own; to be told things from other threads."""

    def __init__(self, upstream_port: int) -> None:
        self.port = free_port()
        self.loses_answers = False
        """Drop what the server says: what it was asked to do is done, and nobody hears of it."""
        self.ready = threading.Event()
        self._upstream_port = upstream_port
        self._lines: set[asyncio.StreamWriter] = set()
        self._runner = asyncio.Runner()
        self._ended = asyncio.Event()

    def cut_all(self) -> None:
        """Reset every connection."""
        self._runner.get_loop().call_soon_threadsafe(self._cut_all)

    def run(self) -> None:
        """Serve until stopped."""
        with self._runner:
            self._runner.run(self._serve())

    def stop(self) -> None:
        self._runner.get_loop().call_soon_threadsafe(self._ended.set)

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connect, LOOPBACK, self.port)
        self.ready.set()
        await self._ended.wait()
        server.close()
        self._cut_all()
        await asyncio.sleep(0.1)  # until the lines know

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answers, upstream = await asyncio.open_connection(LOOPBACK, self._upstream_port)
        except OSError:
            _reset(writer)
            return
        self._lines |= {writer, upstream}
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pass(reader, upstream, answering=False))
                tasks.create_task(self._pass(answers, writer, answering=True))
        finally:
            self._lines -= {writer, upstream}

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answering: bool) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                if answering and self.loses_answers:
                    continue
                writer.write(data)
                await writer.drain()
        writer.close()

    def _cut_all(self) -> None:
        for writer in list(self._lines):
            _reset(writer)


@contextmanager
def open_proxy(upstream_port: int) -> Generator[Proxy]:
    proxy = Proxy(upstream_port)
    thread = threading.Thread(target=proxy.run, daemon=True)
    thread.start()
    proxy.ready.wait(timeout=5)
    try:
        yield proxy
    finally:
        proxy.stop()
        thread.join(timeout=5)


def _reset(writer: asyncio.StreamWriter) -> None:
    line: socket.socket | None = writer.get_extra_info("socket")
    if line is not None:
        with suppress(OSError):
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()

"""A real bucket for tests, and a server that only pretends to have one."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import boto3.session
from botocore.config import Config
from botocore.exceptions import ClientError

from cli.processes import LOOPBACK, die_with_parent, free_port, stop
from tests.web import Reply, Seen

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

START_SECONDS = 20.0


@dataclass(frozen=True)
class Bucket:
    """Where a bucket is, what opens it, and which place in it is ours."""

    endpoint: str
    name: str
    access_key_id: str
    secret_access_key: str
    region: str = "us-east-1"
    public_endpoint: str = ""
    prefix: str = ""

    def settings(self) -> dict[str, Any]:
        """Return what our settings say of it."""
        return {
            "s3_bucket": self.name,
            "s3_prefix": self.prefix,
            "s3_endpoint": self.endpoint,
            "s3_public_endpoint": self.public_endpoint,
            "s3_region": self.region,
            "s3_access_key_id": self.access_key_id,
            "s3_secret_access_key": self.secret_access_key,
            "s3_addressing": "path",
        }

    def names(self) -> list[str]:
        """List the objects in our place, past our code, without the prefix."""
        found = self._client.list_objects_v2(Bucket=self.name, Prefix=self.prefix).get("Contents", [])
        return [object.get("Key", "").removeprefix(self.prefix) for object in found]

    def begun(self) -> list[tuple[str, str]]:
        """List key and id of the multipart uploads to our place that are neither complete nor aborted."""
        try:
            begun = self._client.list_multipart_uploads(Bucket=self.name, Prefix=self.prefix).get("Uploads", [])
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") == "NoSuchUpload":  # rclone, where there was never one
                return []
            raise
        return [(upload.get("Key", ""), upload.get("UploadId", "")) for upload in begun]

    def empty(self) -> None:
        """Delete all that lies in our place, and all that was begun there."""
        for name in self.names():
            self._client.delete_object(Bucket=self.name, Key=self.prefix + name)
        for key, id in self.begun():
            self._client.abort_multipart_upload(Bucket=self.name, Key=key, UploadId=id)

    @cached_property
    def _client(self) -> "S3Client":
        session = boto3.session.Session(self.access_key_id, self.secret_access_key, region_name=self.region)
        config = Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        return session.client("s3", endpoint_url=self.endpoint, config=config)  # pyright: ignore[reportUnknownMemberType]


@contextmanager
def open_bucket(folder: Path) -> Generator[Bucket]:
    """Start rclone's S3 server on a folder, unless TEST_S3_ENDPOINT and what goes with it name another server."""
    prefix = f"tests/{uuid4()}/"
    if endpoint := os.environ.get("TEST_S3_ENDPOINT"):
        yield Bucket(
            endpoint,
            os.environ["TEST_S3_BUCKET"],
            os.environ["TEST_S3_ACCESS_KEY_ID"],
            os.environ["TEST_S3_SECRET_ACCESS_KEY"],
            os.environ.get("TEST_S3_REGION", "us-east-1"),
            os.environ.get("TEST_S3_PUBLIC_ENDPOINT", ""),
            prefix,
        )
        return
    port = free_port()
    # The same server under another name, which is another host to whoever signs.
    bucket = Bucket(
        f"http://{LOOPBACK}:{port}",
        "pictures",
        "upscaled-tests",
        "a secret of nobody",
        public_endpoint=f"http://localhost:{port}",
        prefix=prefix,
    )
    (folder / bucket.name).mkdir(parents=True)
    server = [
        str(Path(sys.executable).with_name("rclone")),
        "serve",
        "s3",
        "--config",
        os.devnull,
        "--log-level",
        "ERROR",
    ]
    keys = f"{bucket.access_key_id},{bucket.secret_access_key}"
    command = [*server, "--auth-key", keys, "--addr", f"{LOOPBACK}:{port}", str(folder)]
    with (folder.parent / "rclone.log").open("wb") as log:
        process = subprocess.Popen(die_with_parent(command), stdout=log, stderr=log)
    try:
        _await_port(port, process)
        yield bucket
    finally:
        stop([process], patience_seconds=5)


def _await_port(port: int, process: subprocess.Popen[bytes]) -> None:
    give_up_at = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up_at and process.poll() is None:
        with suppress(OSError), socket.create_connection((LOOPBACK, port)):
            return
        time.sleep(0.02)
    raise RuntimeError("rclone did not start")


class Pretender:
    """A server without a bucket: it answers as a test says, and remembers what it was asked."""

    def __init__(self, port: int) -> None:
        self.bucket = Bucket(f"http://{LOOPBACK}:{port}", "pictures", "upscaled-tests", "a secret of nobody")
        self.answer: Callable[[Seen], Reply] = lambda _seen: Reply(200, b"", {"ETag": '"tag"'})
        self.seen: list[Seen] = []


@contextmanager
def open_pretender() -> Generator[Pretender]:
    """Start a Pretender on a free port and stop it in the end."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            seen = Seen(self.command, self.path, dict(self.headers), body)
            pretender.seen.append(seen)
            reply = pretender.answer(seen)
            reply.before()
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("Connection", "close")  # which ends it here, too; unsaid, the next request would meet that
            self.end_headers()
            self.wfile.write(reply.body)

        do_GET = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815 - the base class's own names

        def log_message(self, format: str, *args: object) -> None:
            """Keep quiet."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64  # many knock at once

    with Server((LOOPBACK, 0), Handler) as server:
        pretender = Pretender(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield pretender
        finally:
            server.shutdown()
            thread.join()


def refusal(status: int, code: str) -> Reply:
    """Return what S3 answers when it refuses."""
    body = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"
    return Reply(status, body.encode(), {"Content-Type": "application/xml"})

"""Logs: one line per event, and no secret in any."""

import io
import logging
import subprocess
import sys
import time
from collections.abc import Generator

import pytest
from celery.app.log import Logging
from cryptography.fernet import Fernet

from core.queue import make_celery
from core.settings import Settings, load_settings
from core.telemetry import LineFormatter, configure_logging, redact

# Made up, and cut in two so that nobody who looks for secrets finds any here.
SECRET = "s3cr3tValue123456789"

ID = "31b9a3c7-5d55-407e-a7ec-f6d76866ddd5"


@pytest.fixture
def log() -> Generator[io.StringIO]:
    """What a logger of its own writes."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(LineFormatter())
    logger = logging.getLogger("tests.telemetry")
    logger.addHandler(handler)
    logger.propagate = False
    yield written
    logger.removeHandler(handler)
    logger.propagate = True


@pytest.mark.parametrize(
    "line",
    [
        f"key upk_{SECRET}{SECRET}abc is good",
        "secret whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        f"Authorization: Bearer {SECRET}",
        f"authorization: Basic {SECRET}==",
        f"headers {{'Authorization': 'Bearer {SECRET}', 'Accept': '*/*'}}",
        f"headers [(b'x-api-key', b'{SECRET}'), (b'accept', b'*/*')]",
        f'{{"X-API-Key": "{SECRET}"}}',
        f"X-Api-Key={SECRET}",
        f"sent Bearer {SECRET}",
        f"Cookie: session={SECRET}",
        f"https://example.com/v2/files/a.png?expires=1&signature={SECRET}&x=1",
        f"https://b.example/k?X-Amz-Credential={SECRET}%2F20261121&X-Amz-Date=2",
        f"https://b.example/k?X-Amz-Expires=9&X-Amz-Signature={SECRET}",
        f"https://b.example/k?X-Amz-Security-Token={SECRET}",
        f"https://b.example/k?AWSAccessKeyId=x&Signature={SECRET}",
        f"https://account.example/c/b?sv=2022&sig={SECRET}",
        f"https://hook.example/?token={SECRET}",
        f"GET /?u=https%3A%2F%2Fb%2Fk%3FX-Amz-Signature%3D{SECRET}",
        f"AWS4-HMAC-SHA256 Credential={SECRET}/20261121/r/s3, SignedHeaders=host, Signature={SECRET}",
        f"postgresql+asyncpg://me:{SECRET}@db.example:5432/upscaled",
        f"redis://:{SECRET}@redis.example/0",
        f"redis://:p@{SECRET}@redis.example/0",
        f"aws_secret_access_key='{SECRET}'",
        f"password={SECRET}",
        f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n{SECRET}\n-----END RSA PRIVATE KEY----- and more",
        f"-----BEGIN PRIVATE KEY-----\\n{SECRET}, cut off",
    ],
)
def test_secrets_are_hidden(line: str) -> None:
    assert "[redacted]" in redact(line)
    assert SECRET not in redact(line)
    assert "MfKQ9r8" not in redact(line)


def test_keys_that_seal_and_what_they_sealed_are_hidden() -> None:
    key = Fernet.generate_key()
    token = Fernet(key).encrypt(b"a secret").decode()
    assert redact(f"with {key.decode()}: {token}.") == "with [redacted]: [redacted]."
    access_key = "AKIAIOSFODNN7EXAMPLE"
    assert redact(f"as {access_key}.") == "as [redacted]."


@pytest.mark.parametrize(
    "line",
    [
        f"job {ID} attempt 1: done, 4096x4096 png in 12.3 s",
        f"delivery {ID} of job {ID}: attempt 2, 503",
        f"results/{ID}/1.png: The storage could not be written to.",
        "key upk_aB3dE6gH was revoked",
        "https://example.com:8443/a.png?size=2&expires=1795262400",
        "http://[::1]:8000/healthz",
        "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "worker host-1.example:4711 fell silent; 3 tokens, max_tokens=77, design=2",
        "bearer of news, an API, a signature and a secret",
        'File "/srv/app/api/errors.py", line 12, in answer',
    ],
)
def test_what_is_no_secret_stays(line: str) -> None:
    assert redact(line) == line


def test_what_is_beside_a_secret_stays() -> None:
    url = "https://me:hidden@example.com/a.png?expires=1&signature=abcdef&size=2 was fetched"
    expected = "https://me:[redacted]@example.com/a.png?expires=1&signature=[redacted]&size=2 was fetched"
    assert redact(url) == expected


def test_secrets_in_arguments_traces_and_stacks_are_hidden(log: io.StringIO) -> None:
    logger = logging.getLogger("tests.telemetry")
    logger.warning("caller sent %s", {"X-API-Key": SECRET})
    try:
        raise ValueError(f"cannot connect to redis://:{SECRET}@redis.example")  # noqa: TRY301
    except ValueError:
        logger.exception("bug", stack_info=True)
    written = log.getvalue()
    assert SECRET not in written
    assert "redis.example" in written


@pytest.mark.parametrize("new_line", ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x85", "\u2028"])
def test_a_message_cannot_forge_a_line(log: io.StringIO, new_line: str) -> None:
    logging.getLogger("tests.telemetry").warning(
        "host %s", f"x{new_line}2026-11-21T00:00:00.000Z INFO core all is well"
    )
    (line,) = log.getvalue().splitlines()
    assert "x\\" in line


def test_a_message_cannot_steer_a_terminal(log: io.StringIO) -> None:
    logging.getLogger("tests.telemetry").warning("host %s", "\x1b[2J\x07\x9b")
    assert log.getvalue().endswith("host \\x1b[2J\\x07\\x9b\n")


def test_a_trace_keeps_its_lines_and_cannot_forge_one(log: io.StringIO) -> None:
    try:
        raise ValueError("first\n2026-11-21T00:00:00.000Z INFO core all is well\x1b")  # noqa: TRY301
    except ValueError:
        logging.getLogger("tests.telemetry").exception("bug")
    first, *rest = log.getvalue().splitlines()
    assert first.endswith("ERROR tests.telemetry bug")
    assert len(rest) > 3
    assert all(line.startswith("    ") for line in rest)
    assert "\x1b" not in log.getvalue()


@pytest.mark.parametrize("piece", ["://", "a://:", "token ", "bearer ", "-----BEGIN A-----", "-----BEGIN ", "a", "A_"])
@pytest.mark.parametrize("beginning", ["", "-----BEGIN ", "password", "bearer ", "://a:"])
def test_no_line_takes_long_to_look_through(beginning: str, piece: str) -> None:
    began = time.process_time()
    redact(beginning + piece * 20_000)
    # Milliseconds, or a second on a slow machine; what grows with the square of the length takes minutes.
    assert time.process_time() - began < 5


def test_the_loggers_of_libraries_write_as_ours_do(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import logging, core.telemetry, uvicorn
core.telemetry.configure_logging("INFO")
uvicorn.Config("app:app", log_config=None, access_log=False)
for name in ("uvicorn.error", "celery.worker", "botocore.auth", "asyncio", "sqlalchemy.engine"):
    logging.getLogger(name).warning("one\\ntwo signature=abcdef")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True, timeout=60)
    lines = ran.stderr.splitlines()
    assert len(lines) == 5
    assert all(line.endswith("one\\ntwo signature=[redacted]") for line in lines)


def test_celery_leaves_the_root_logger_to_us() -> None:
    settings: Settings = load_settings(
        database_url="postgresql://localhost/db", redis_url="redis://localhost/0", secret_key="x" * 32
    )
    celery = make_celery(settings)
    assert celery.conf.worker_hijack_root_logger is False
    root = logging.getLogger()
    before = root.handlers[:]
    try:
        configure_logging("WARNING")
        Logging(celery).setup_logging_subsystem("WARNING")
        assert [type(handler.formatter) for handler in root.handlers] == [LineFormatter]
    finally:
        root.handlers[:] = before

"""Images that callers send, through the API or past it."""

import asyncio
import http.client
import tempfile
import threading
import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import anyio.to_thread
import pytest
from PIL import Image
from starlette.testclient import TestClient

from api.app import create_app
from api.inputs import Inputs
from cli.keys import create_key
from core.errors import RequestTooSlow
from core.settings import Settings
from core.storage import open_storage
from db.keys import Scope
from db.session import Database
from tests.apis import Api, open_apis, until
from tests.documented import DocumentedClient
from tests.queues import Queue
from tests.requests import body_of, encoded, png, submit

Sql = Callable[..., list[Any]]

BOUNDARY = "limit"
BEFORE = b'--limit\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
AFTER = b"\r\n--limit--\r\n"

_NO_UPLOAD = "names an upload that does not exist or has expired"


@pytest.fixture
def stored(settings: Settings) -> Callable[[], list[Path]]:
    """Tell what lies in the storage, unfinished objects included."""
    folder = settings.storage_dir / "uploads"
    return lambda: list(folder.iterdir()) if folder.exists() else []


def _send(client: TestClient, data: bytes, key: str | None = None) -> Any:
    return client.post("/v2/uploads", files={"file": data}, headers={"Idempotency-Key": key} if key else {})


def test_an_upload_can_be_named_by_its_id_and_by_its_url(client: TestClient, sql: Sql) -> None:
    upload = client.post("/v2/uploads", files={"file": ("anything.txt", png(30, 20), "text/plain")})
    assert upload.status_code == 201
    assert upload.json()["contentType"] == "image/png"
    assert upload.json()["byteSize"] == len(png(30, 20))
    for image in (f"upload://{upload.json()['id']}", upload.json()["id"], upload.json()["url"]):
        submit(client, image)
    assert len({row["image_key"] for row in sql("SELECT image_key FROM jobs")}) == 1
    (row,) = sql("SELECT size_bytes, stored_at = created_at AS at_once, expires_at > now() AS usable FROM uploads")
    assert (row["size_bytes"], row["at_once"], row["usable"]) == (len(png(30, 20)), False, True)


def test_what_is_no_image_is_refused_whatever_its_name_and_nothing_is_kept(
    client: TestClient, sql: Sql, stored: Callable[[], list[Path]]
) -> None:
    no_image = "is not a PNG, JPEG or WebP image"
    for data, complaint in [(b"To whom it may concern", no_image), (b"RIFF", no_image), (b"", "is empty")]:
        response = client.post("/v2/uploads", files={"file": ("photo.png", data, "image/png")})
        assert (response.status_code, response.json()["details"]) == (400, {"file": [complaint]})
    response = client.post("/v2/uploads", content=b"")
    assert (response.status_code, list(response.json()["details"])) == (400, ["body"])
    assert (stored(), sql("SELECT count(*) FROM uploads")[0]["count"]) == ([], 0)


def test_the_api_s_description_tells_that_the_file_is_binary(client: TestClient) -> None:
    document = client.get("/openapi.json").json()["paths"]["/v2/uploads"]["post"]
    form = document["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["properties"]["file"] == {"type": "string", "format": "binary"}
    assert form["required"] == ["file"]


def test_a_key_that_may_not_submit_may_not_upload(anonymous: TestClient, settings: Settings) -> None:
    anonymous.headers["X-API-Key"] = asyncio.run(create_key(settings, "reads", scopes=[Scope.JOBS_READ]))
    assert _send(anonymous, png(2, 2)).status_code == 403
    assert _presign(anonymous).status_code == 403


def test_an_upload_that_is_repeated_is_the_same_upload(client: TestClient, stored: Callable[[], list[Path]]) -> None:
    first, second, other = (_send(client, data, "photo") for data in (png(2, 2), png(2, 2), png(2, 2) + b"\0"))
    assert second.json() == first.json()
    assert "Idempotent-Replayed" not in first.headers
    assert second.headers["Idempotent-Replayed"] == "true"
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_key_reused")
    assert [path.name for path in stored()] == [f"{first.json()['id']}.png"]


def test_the_same_upload_many_times_at_once_is_one_upload(client: TestClient, stored: Callable[[], list[Path]]) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = [sent.result() for sent in [pool.submit(_send, client, png(2, 2), "photo") for _ in range(24)]]
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 1
    assert len(stored()) == 1


def test_the_same_idempotency_key_of_two_callers_are_two(client: TestClient, settings: Settings, key: str) -> None:
    sent: dict[str, set[str]] = {key: set(), asyncio.run(create_key(settings, "other")): set()}
    for _ in range(2):
        for client.headers["X-API-Key"], ids in sent.items():
            ids.add(_send(client, png(2, 2), "photo").json()["id"])
    mine, theirs = sent.values()
    assert (len(mine), len(theirs), mine & theirs) == (1, 1, set())


def test_an_idempotency_key_is_used_up_by_what_was_stored_and_while_it_lasts(client: TestClient, sql: Sql) -> None:
    assert _send(client, b"no image", "photo").status_code == 400
    first = _send(client, png(2, 2), "photo")
    assert first.status_code == 201
    sql("UPDATE uploads SET expires_at = now()")
    again = _send(client, png(3, 2), "photo")
    assert (again.status_code, "Idempotent-Replayed" in again.headers) == (201, False)
    assert again.json()["id"] != first.json()["id"]


@pytest.mark.anyio
async def test_an_upload_is_kept_from_when_it_has_arrived_unless_that_takes_too_long(
    settings: Settings, sql_async: Any, stored: Callable[[], list[Path]]
) -> None:
    async def arrive(left: str) -> AsyncGenerator[bytes]:
        yield png(2, 2)
        await sql_async("UPDATE uploads SET expires_at = now() + $1::text::interval", left)
        yield b"\0"

    database = Database(settings)
    inputs, owner = Inputs(settings, database, open_storage(settings)), await Queue(database).add_key()
    received = await inputs.receive(owner, arrive("1 minute"), "file")
    kept = received.expires_at - datetime.now(UTC)
    assert abs(kept - timedelta(seconds=settings.upload_ttl_seconds)) < timedelta(seconds=30)
    with pytest.raises(RequestTooSlow, match="longer to arrive"):
        await inputs.receive(owner, arrive("0"), "file")
    await database.close()
    assert [path.name for path in stored()] == [f"{received.id}.png"]


def _presign(client: TestClient, content_type: object = "image/png", byte_size: object = len(png(8, 8))) -> Any:
    return client.post("/v2/uploads/presign", json={"contentType": content_type, "byteSize": byte_size})


def _submit(client: TestClient, image: str) -> Any:
    return client.post("/v2/images/upscale", json=body_of(image))


def _complaint(response: Any) -> str:
    assert response.status_code == 400
    return response.json()["details"]["clarityUpscaleParams.image"][0]


def test_an_image_can_be_put_into_the_storage_directly_and_then_be_used(
    client: TestClient, sql: Sql, work: Callable[[], int]
) -> None:
    response = _presign(client)
    assert response.status_code == 201
    upload = response.json()
    assert (upload["image"], upload["method"]) == (f"upload://{upload['id']}", "PUT")
    assert "has not arrived yet" in _complaint(_submit(client, upload["image"]))
    key = client.headers.pop("X-API-Key")
    assert client.put(upload["url"], content=png(8, 8), headers=upload["headers"]).status_code == 200
    client.headers["X-API-Key"] = key
    job_id = submit(client, upload["image"])
    assert work() == 1
    assert client.get(f"/v2/jobs/{job_id}").json()["status"] == "COMPLETED"


def test_what_was_put_is_looked_at_when_it_is_first_used_and_never_again(
    client: TestClient, settings: Settings, sql: Sql
) -> None:
    upload, other = _presign(client).json(), _presign(client).json()
    place = settings.storage_dir / f"uploads/{upload['id']}.png"
    place.parent.mkdir(parents=True)
    jpeg = encoded(Image.new("L", (1, 1)), "JPEG")
    for wrong, complaint in [
        (png(8, 8) + b"\0", f"has {len(png(8, 8)) + 1} bytes, not {len(png(8, 8))} as declared"),
        (jpeg.ljust(len(png(8, 8)), b"\0")[: len(png(8, 8))], "is not image/png as declared"),
    ]:
        place.write_bytes(wrong)
        assert complaint in _complaint(_submit(client, upload["image"]))
        assert sql("SELECT count(stored_at) FROM uploads")[0]["count"] == 0
    place.write_bytes(png(8, 8))
    submit(client, upload["image"])
    assert sql("SELECT id FROM uploads WHERE stored_at IS NULL")[0]["id"] == UUID(other["id"])
    place.unlink()
    submit(client, upload["image"])


def test_a_presigned_url_is_for_the_declared_type_and_for_a_while(client: TestClient, sql: Sql) -> None:
    for content_type, extension in [("image/jpeg", "jpg"), ("image/webp", "webp")]:
        upload = _presign(client, content_type, 9).json()
        (row,) = sql("SELECT *, now() FROM uploads WHERE id = $1", UUID(upload["id"]))
        assert (row["key"], row["size_bytes"], row["stored_at"]) == (f"uploads/{upload['id']}.{extension}", 9, None)
        assert upload["headers"]["Content-Type"] == content_type
        ends, usable = datetime.fromisoformat(upload["expiresAt"]), datetime.fromisoformat(upload["imageExpiresAt"])
        assert timedelta(minutes=14) < ends - row["now"] <= timedelta(minutes=15)
        assert abs(usable - row["expires_at"]) < timedelta(seconds=1)


def test_a_presigned_url_does_not_outlive_its_upload(settings: Settings, key: str) -> None:
    with DocumentedClient(create_app(settings.model_copy(update={"upload_ttl_seconds": 60}))) as client:
        client.headers["X-API-Key"] = key
        upload = _presign(client).json()
        assert upload["expiresAt"] == upload["imageExpiresAt"]


def test_what_could_never_be_used_is_not_presigned(client: TestClient, settings: Settings, sql: Sql) -> None:
    for content_type in ("image/gif", None):
        response = _presign(client, content_type)
        assert (response.status_code, list(response.json()["details"])) == (400, ["contentType"])
    for size in (0, "9", settings.max_input_bytes + 1, 10**30):
        response = _presign(client, byte_size=size)
        assert (response.status_code, list(response.json()["details"])) == (400, ["byteSize"])
    assert sql("SELECT count(*) FROM uploads")[0]["count"] == 0
    assert _presign(client, byte_size=settings.max_input_bytes).status_code == 201


def test_an_upload_that_is_not_the_caller_s_or_has_expired_is_like_none(
    client: TestClient, settings: Settings, sql: Sql
) -> None:
    expired = _send(client, png(3, 2)).json()["id"]
    sql("UPDATE uploads SET expires_at = now()")
    assert _complaint(_submit(client, expired)) == _complaint(_submit(client, str(uuid4()))) == _NO_UPLOAD
    others = [_send(client, png(3, 2)).json()["id"], _presign(client).json()["id"]]
    client.headers["X-API-Key"] = asyncio.run(create_key(settings, "other"))
    assert {_complaint(_submit(client, f"upload://{other}")) for other in others} == {_NO_UPLOAD}


def test_an_upload_that_never_came_in_whole_cannot_be_used(client: TestClient, sql: Sql) -> None:
    coming = _send(client, png(2, 2)).json()["id"]
    sql("UPDATE uploads SET stored_at = NULL, size_bytes = NULL")  # as when the API dies before it can answer
    assert "has not arrived yet" in _complaint(_submit(client, f"upload://{coming}"))


# What only a real server and a real connection show


@contextmanager
def _sending(api: Api, key: str | None, claimed_bytes: int) -> Generator[http.client.HTTPConnection]:
    """Begin an upload; the body is left to the caller."""
    url = api.client.base_url
    connection = http.client.HTTPConnection(url.host, url.port or 80, timeout=20)
    connection.putrequest("POST", "/v2/uploads")
    connection.putheader("Content-Type", f"multipart/form-data; boundary={BOUNDARY}")
    connection.putheader("Content-Length", str(claimed_bytes))
    if key is not None:
        connection.putheader("X-API-Key", key)
    connection.endheaders()
    try:
        yield connection
    finally:
        connection.close()


def test_the_answer_does_not_wait_for_a_body_that_is_refused_anyway(
    settings: Settings, key: str, sql: Sql, stored: Callable[[], list[Path]]
) -> None:
    small = settings.model_copy(update={"max_input_bytes": 100_000})
    with open_apis(small, key, 1) as (api,):
        with _sending(api, None, 500_000) as stranger:
            assert stranger.getresponse().status == 401
        with _sending(api, key, 500_000) as writer:
            writer.send(BEFORE + b"To whom it may concern")
            assert writer.getresponse().status == 400
        assert sql("SELECT count(*) FROM uploads")[0]["count"] == 0
        with _sending(api, key, 500_000) as hoarder:
            hoarder.send(BEFORE + png(2, 2) + b"\0" * 100_000)
            assert hoarder.getresponse().status == 413
    assert stored() == []


def test_a_form_that_is_wrong_after_its_file_leaves_nothing(
    settings: Settings, key: str, sql: Sql, stored: Callable[[], list[Path]]
) -> None:
    second = b"\r\n" + BEFORE + png(2, 2) + AFTER
    with open_apis(settings, key, 1) as (api,), _sending(api, key, 100_000 + len(BEFORE + second)) as connection:
        connection.send(BEFORE + png(2, 2).ljust(100_000, b"\0"))
        until(lambda: len(stored()) == 1, 5)
        connection.send(second)
        response = connection.getresponse()
        assert (response.status, b'"was sent more than once"' in response.read()) == (400, True)
    assert stored() == []
    assert [row["stored_at"] for row in sql("SELECT stored_at FROM uploads")] == [None]


def test_a_client_that_breaks_off_leaves_nothing_behind(
    settings: Settings, key: str, sql: Sql, stored: Callable[[], list[Path]], caplog: pytest.LogCaptureFixture
) -> None:
    with open_apis(settings, key, 1) as (api,):
        with _sending(api, key, 4_000_000) as connection:
            connection.send(BEFORE + png(2, 2) + b"\0" * 2_000_000)
            until(lambda: len(stored()) == 1, 5)
        until(lambda: stored() == [], 5)
    assert [row["stored_at"] for row in sql("SELECT stored_at FROM uploads")] == [None]
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


def test_a_large_upload_is_neither_gathered_nor_hurried_past_a_slow_storage(
    settings: Settings, key: str, monkeypatch: pytest.MonkeyPatch, stored: Callable[[], list[Path]]
) -> None:
    image = png(2, 2) + b"\0" * (24 * 1024 * 1024)
    body, sent_bytes, ready = memoryview(BEFORE + image + AFTER), 0, threading.Event()
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")

    def send(connection: http.client.HTTPConnection) -> None:
        nonlocal sent_bytes
        while sent_bytes < len(body):
            sent_bytes += connection.sock.send(body[sent_bytes : sent_bytes + 65536])

    with open_apis(settings, key, 1) as (api,), _sending(api, key, len(body)) as connection:
        _slow_down(api, monkeypatch, ready)
        sender = threading.Thread(target=send, args=[connection])
        tracemalloc.start()
        try:
            sender.start()
            until(lambda: _stands(lambda: sent_bytes), 10)
            stood_at = sent_bytes
            ready.set()
            response = connection.getresponse()
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            ready.set()
            tracemalloc.stop()
            sender.join()
        assert response.status == 201, response.read()
    assert 0 < stood_at < 12 * 1024 * 1024
    assert peak_bytes < 6 * 1024 * 1024
    assert [path.stat().st_size for path in stored()] == [len(image)]


def _slow_down(api: Api, monkeypatch: pytest.MonkeyPatch, ready: threading.Event) -> None:
    """Let the storage take nothing until it is ready."""
    write = api.parts.storage.write

    async def wait_and_write(key: str, chunks: AsyncIterable[bytes]) -> None:
        await anyio.to_thread.run_sync(ready.wait)
        await write(key, chunks)

    monkeypatch.setattr(api.parts.storage, "write", wait_and_write)


def _stands(read: Callable[[], int]) -> bool:
    """Tell whether a number has begun to grow and does so no more."""
    before = read()
    threading.Event().wait(0.3)
    return 0 < before == read()

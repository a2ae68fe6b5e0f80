"""What a storage promises, held against a local folder and a real bucket.

TEST_S3_ENDPOINT and its like (tests/buckets.py) name another server than rclone's. Nothing here depends on which it is.
"""

import hashlib
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import anyio
import pytest

from core import failpoints
from core.errors import InputTooLarge, NotFound, StorageUnavailable
from core.storage import SNIFFED_BYTES, LocalStorage, ObjectHead, Storage, open_storage
from core.storage.s3 import WINDOW_SECONDS
from tests.storages import PART, chunks, later, some_result, some_upload, storage_settings

pytestmark = pytest.mark.anyio

FOREIGN_KEYS = [
    "",
    "/etc/passwd",
    "uploads/../../secret.png",
    "uploads/00000000-0000-0000-0000-000000000000.html",
    "elsewhere/00000000-0000-0000-0000-000000000000.png",
    "results/00000000-0000-0000-0000-000000000000/1.png\n",
    "results/a caller's own words/1.png",
]


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "bucket":
        return request.getfixturevalue("s3")
    return open_storage(storage_settings(storage_dir=tmp_path))


@pytest.fixture
def left(request: pytest.FixtureRequest, storage: Storage, tmp_path: Path) -> Callable[[], Sequence[object]]:
    """List all that the storage holds now: objects, and what was begun."""

    def look() -> Sequence[object]:
        if isinstance(storage, LocalStorage):
            return _files(tmp_path)
        bucket = request.getfixturevalue("bucket")
        return [*bucket.names(), *bucket.begun()]

    return look


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def test_what_is_written_can_be_read_looked_at_and_deleted(storage: Storage) -> None:
    key, data = some_result(), bytes(range(256)) * 100
    await storage.write(key, chunks(data))
    assert await storage.read(key) == data
    assert await storage.look(key) == ObjectHead(25_600, data[:SNIFFED_BYTES])
    await storage.delete(key)
    with pytest.raises(NotFound):
        await storage.read(key)


async def test_what_is_not_there_cannot_be_read_but_may_be_deleted(storage: Storage) -> None:
    with pytest.raises(NotFound):
        await storage.read(some_upload())
    with pytest.raises(NotFound):
        await storage.look(some_upload())
    await storage.delete(some_upload())


async def test_a_second_writing_replaces_the_first(storage: Storage) -> None:
    key = some_upload()
    await storage.write(key, chunks(b"a long first writing"))
    await storage.write(key, chunks(b"short"))
    assert await storage.read(key) == b"short"


@pytest.mark.parametrize("data", [b"", b"few"])
async def test_an_object_shorter_than_what_is_looked_at_is_seen_whole(storage: Storage, data: bytes) -> None:
    key = some_upload()
    await storage.write(key, chunks(data))
    assert await storage.look(key) == ObjectHead(len(data), data)


async def test_no_more_is_read_than_is_allowed(storage: Storage) -> None:
    key = some_upload()
    await storage.write(key, chunks(bytes(100)))
    assert len(await storage.read(key, max_bytes=100)) == 100
    with pytest.raises(InputTooLarge):
        await storage.read(key, max_bytes=99)


@pytest.mark.parametrize(
    "sizes",
    [(), (10,), (PART,), (PART - 1, 1, 1), (2 * PART + 1,), (PART // 3,) * 7],
    ids=["nothing", "little", "one part", "a byte more", "parts at once", "chunks beside parts"],
)
async def test_a_stream_is_stored_as_it_came(
    storage: Storage, left: Callable[[], Sequence[object]], sizes: tuple[int, ...]
) -> None:
    key, data = some_upload(), [bytes([number]) * size for number, size in enumerate(sizes)]
    await storage.write(key, chunks(*data))
    whole = b"".join(data)
    assert hashlib.sha256(await storage.read(key)).digest() == hashlib.sha256(whole).digest()
    assert (await storage.look(key)).size_bytes == len(whole)
    assert len(left()) == 1


@pytest.mark.parametrize("size", [10, 2 * PART + 10], ids=["early", "after parts were sent"])
async def test_of_a_stream_that_fails_nothing_is_left_and_its_own_error_comes_out(
    storage: Storage, left: Callable[[], Sequence[object]], size: int
) -> None:
    with pytest.raises(ConnectionResetError, match="the caller"):
        await storage.write(some_upload(), chunks(bytes(size), error=ConnectionResetError("the caller hung up")))
    assert left() == []


async def test_a_stream_that_fails_leaves_what_was_there_before(storage: Storage) -> None:
    key = some_upload()
    await storage.write(key, chunks(b"before"))
    with pytest.raises(ValueError, match="bad"):
        await storage.write(key, chunks(bytes(2 * PART), error=ValueError("bad")))
    assert await storage.read(key) == b"before"


async def test_of_a_stream_whose_task_is_cancelled_nothing_is_left(
    storage: Storage, left: Callable[[], Sequence[object]]
) -> None:
    stuck = anyio.Event()

    async def get_stuck() -> AsyncGenerator[bytes]:
        yield bytes(2 * PART)
        stuck.set()
        await anyio.sleep_forever()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(storage.write, some_upload(), get_stuck())
        await stuck.wait()
        assert len(left()) == 1  # it was on its way
        tasks.cancel_scope.cancel()
    assert left() == []


@pytest.mark.parametrize("size", [10, PART + 1], ids=["whole", "in parts"])
async def test_each_writing_comes_by_its_fail_point_once_before_anybody_can_see_it(
    storage: Storage, left: Callable[[], Sequence[object]], size: int
) -> None:
    key, reached = some_upload(), list[str]()

    def fail() -> None:
        raise RuntimeError("here")

    try:
        failpoints.arm("during_upload", lambda: reached.append(key))
        await storage.write(key, chunks(b"before", bytes(size)))
        assert reached == [key]
        failpoints.arm("during_upload", fail)
        with pytest.raises(RuntimeError, match="here"):
            await storage.write(key, chunks(b"after", bytes(size)))
    finally:
        failpoints.disarm()
    assert (await storage.read(key)).startswith(b"before")
    assert len(left()) == 1


@pytest.mark.parametrize("key", FOREIGN_KEYS)
async def test_a_key_that_is_not_of_our_making_names_nothing(
    storage: Storage, left: Callable[[], Sequence[object]], key: str
) -> None:
    with pytest.raises(NotFound):
        await storage.write(key, chunks(b"x"))
    with pytest.raises(NotFound):
        await storage.read(key)
    with pytest.raises(NotFound):
        await storage.delete(key)
    with pytest.raises(NotFound):
        await storage.sign_put(key, "image/png", 1, later())
    assert left() == []


async def test_a_url_of_ours_is_known_again_and_no_other(storage: Storage) -> None:
    key = some_result()
    url = await storage.url(key, later())
    assert await storage.key_of(url) == key
    altered = [
        url.replace(key, some_result()),
        url.partition("?")[0],
        url[:-1] + ("0" if url[-1] != "0" else "1"),
        url.replace("xpires=", "xpires=9"),
        url.replace("://", "://evil.example/"),
        url.replace("/results/", "/../results/"),
        url + "ü",
        "https://example.com/a.png",
        "",
    ]
    assert [await storage.key_of(other) for other in altered] == [None] * len(altered)
    promise = await storage.sign_put(some_upload(), "image/png", 1, later())
    assert await storage.key_of(promise.url) is None


async def test_a_url_of_ours_that_has_expired_is_not_known(storage: Storage) -> None:
    assert await storage.key_of(await storage.url(some_result(), later(-1))) is None


async def test_an_object_has_the_same_url_for_some_time(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    key, expires_at = some_result(), later(3600)
    urls = {await storage.url(key, expires_at)}
    await anyio.sleep(1.1)  # signatures know whole seconds
    urls.add(await storage.url(key, expires_at))
    if datetime.now(UTC).timestamp() % WINDOW_SECONDS > 5:  # or a window has just ended
        assert len(urls) == 1
    assert await storage.url(key, later(1800)) not in urls


async def test_what_a_folder_could_not_take_leaves_nothing_in_it(tmp_path: Path) -> None:
    key, storage = some_upload(), open_storage(storage_settings(storage_dir=tmp_path))
    (tmp_path / key).mkdir(parents=True)  # a place that no file can take
    with pytest.raises(StorageUnavailable):
        await storage.write(key, chunks(b"x"))
    assert _files(tmp_path) == []


def test_who_has_no_bucket_does_not_load_boto3() -> None:
    code = "import sys, core.storage; print([name for name in sys.modules if name.startswith('boto')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

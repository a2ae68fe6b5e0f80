"""Strips to files: what happens when one side fails the other, or is told to stop."""

import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from core.errors import OutOfMemory, OutputTooLarge, Stopped, StorageUnavailable
from core.options import OutputFormat
from tests.encoding import cut, noise, photo, unnamed, written
from worker.upscaler import encoding
from worker.upscaler.encoding import encode
from worker.upscaler.libvips import pyvips
from worker.upscaler.picture import Levels, Picture
from worker.upscaler.plan import Size


def _encoders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("encoder")]


def _wait_for(holds: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < give_up_at, "it did not come about in time"
        time.sleep(0.01)


@pytest.mark.parametrize("output_format", OutputFormat)
@pytest.mark.parametrize("strips", [0, 1, 5])
def test_an_error_among_the_strips_is_raised_as_it_is_and_leaves_no_thread(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, output_format: OutputFormat, strips: int
) -> None:
    def failing() -> Iterator[Picture]:
        yield from cut(Picture(noise(strips * 8, 64, 3)), 8) if strips else ()
        raise stopped

    stopped = Stopped("Enough.")
    with unnamed() as file, pytest.raises(Stopped) as raised:
        encode(failing(), Size(width=64, height=800), output_format, 90, file)
    assert raised.value is stopped
    _wait_for(lambda: not _encoders())
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_nothing_is_written_any_more_when_an_error_among_the_strips_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    save, ended = vars(encoding)["_save"], threading.Event()

    def save_slowly(*arguments: Any) -> None:
        try:
            save(*arguments)
        finally:
            time.sleep(0.1)
            ended.set()

    def failing() -> Iterator[Picture]:
        yield Picture(noise(8, 64, 3))
        raise Stopped("Enough.")

    monkeypatch.setattr(encoding, "_save", save_slowly)
    with unnamed() as file:
        with pytest.raises(Stopped):
            encode(failing(), Size(width=64, height=800), OutputFormat.PNG, 90, file)
        assert ended.is_set()
        file.seek(0)
        assert b"IEND" not in file.read()


@pytest.mark.parametrize("output_format", OutputFormat)
def test_a_disk_that_is_full_is_unavailable_storage(
    capfd: pytest.CaptureFixture[str], output_format: OutputFormat
) -> None:
    size = Size(width=64, height=64)
    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(StorageUnavailable) as raised:
        encode(iter([Picture(noise(64, 64, 3))]), size, output_format, 90, full).result()
    assert isinstance(raised.value.__cause__, pyvips.Error)
    _wait_for(lambda: not _encoders())
    assert capfd.readouterr() == ("", "")


def test_a_disk_that_is_full_ends_the_making_of_strips() -> None:
    given: list[int] = []

    def strips() -> Iterator[Picture]:
        try:
            for number in range(1000):
                given.append(number)
                yield Picture(noise(16, 2048, 3))
        finally:
            given.append(-1)

    making = strips()
    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(StorageUnavailable):
        encode(making, Size(width=2048, height=16_000), OutputFormat.PNG, 90, full)
    assert given[-1] == -1
    assert len(given) < 100


@pytest.mark.parametrize("output_format", OutputFormat)
@pytest.mark.parametrize("rows", [24, 31, 33, 40, 3200])
def test_strips_of_another_height_than_the_picture_s_are_a_bug_that_is_told(
    output_format: OutputFormat, rows: int
) -> None:
    with unnamed() as file, pytest.raises(ValueError, match="rows, and not 32"):
        encode(cut(Picture(noise(rows, 9, 3)), 8), Size(width=9, height=32), output_format, 90, file).result()


def test_strips_of_another_width_than_the_picture_s_are_a_bug_that_is_told() -> None:
    with unnamed() as file, pytest.raises(ValueError, match="broadcast"):
        encode(cut(Picture(noise(32, 9, 3)), 8), Size(width=8, height=32), OutputFormat.PNG, 90, file).result()


@pytest.mark.parametrize("output_format", OutputFormat)
@pytest.mark.parametrize("first", [0, 1])
def test_strips_of_which_only_some_have_alpha_are_a_bug_that_is_told(
    capfd: pytest.CaptureFixture[str], output_format: OutputFormat, first: int
) -> None:
    strips = [Picture(noise(8, 9, 3)), Picture(noise(8, 9, 3), noise(8, 9))] * 2
    with unnamed() as file, pytest.raises(ValueError, match=r"^Some strips have alpha and some have none\.$"):
        encode(iter(strips[first : first + 2]), Size(width=9, height=16), output_format, 90, file).result()
    assert capfd.readouterr() == ("", "")


def test_no_failure_of_what_libvips_calls_is_lost(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise ZeroDivisionError

    picture = Picture(noise(1024, 256, 3))
    size = Size(width=256, height=1024)
    with unnamed() as file, pytest.raises(ZeroDivisionError):
        encode(iter([picture]), size, OutputFormat.PNG, 90, file, fail).result()
    monkeypatch.setattr(encoding.zlib, "crc32", fail)
    with pytest.raises(ZeroDivisionError):
        written(picture, OutputFormat.PNG)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("output_format", OutputFormat)
@pytest.mark.parametrize("alpha", [False, True])
def test_the_encoder_stops_at_its_next_step(
    capfd: pytest.CaptureFixture[str], output_format: OutputFormat, *, alpha: bool
) -> None:
    asked, stopped = list[bool](), threading.Event()

    def should_stop() -> bool:
        asked.append(len(asked) == 1)
        if asked[-1]:
            stopped.set()
        return asked[-1]

    def strips() -> Iterator[Picture]:
        *others, last = cut(photo(500, 400, alpha=alpha), 50)
        yield from others
        assert stopped.wait(5)
        yield last

    with unnamed() as file, pytest.raises(Stopped, match="encoding was told to stop"):
        encode(strips(), Size(width=400, height=500), output_format, 90, file, should_stop).result()
    assert asked == [False, True]
    assert capfd.readouterr() == ("", "")


def test_the_encoder_asks_as_it_gets_on_to_the_end_and_never_while_it_waits() -> None:
    asked, made, stop_after = 0, 0, 1000

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return bool(made) and asked > made + stop_after

    def rests() -> bool:
        before = asked
        time.sleep(0.05)
        return asked == before

    def strips() -> Iterator[Picture]:
        nonlocal made
        for strip in cut(photo(500, 400, alpha=False), 100):
            _wait_for(rests)
            yield strip
        made = asked

    def run(file: BinaryIO) -> None:
        encode(strips(), Size(width=400, height=500), OutputFormat.WEBP, 90, file, should_stop).result()

    with unnamed() as file:
        run(file)
    assert asked - made > 25  # a WebP is begun when all strips are there; two of them were still to be read
    asked, made, stop_after = 0, 0, 20
    with unnamed() as file:
        with pytest.raises(Stopped):
            run(file)
        assert file.seek(0, 2) == 0


def test_a_picture_that_its_format_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputTooLarge, match="16384 x 1 pixels; a webp file holds at most 16383"):
        written(Picture(np.zeros((1, 16384, 3), np.uint8)), OutputFormat.WEBP)

    def fail(saying: str) -> Callable[..., None]:
        def save(*_: object, **__: object) -> None:
            raise pyvips.Error("unable to call webpsave_target", saying)

        return save

    monkeypatch.setattr(pyvips.Image, "webpsave_target", fail("webpsave: unable to encode\n"), raising=False)
    with pytest.raises(OutputTooLarge, match="A webp file cannot hold so large a picture; a png file can"):
        written(Picture(noise(2, 2, 3)), OutputFormat.WEBP)
    monkeypatch.setattr(pyvips.Image, "webpsave_target", fail("vips_tracked: out of memory --- size == 48MB\n"))
    with pytest.raises(OutOfMemory):
        written(Picture(noise(2, 2, 3)), OutputFormat.WEBP)


def test_memory_that_runs_out_on_the_way_to_the_encoder_is_no_truncated_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> Levels:
        raise MemoryError

    monkeypatch.setattr(encoding, "to_levels", full)
    with pytest.raises(MemoryError):
        written(photo(9, 9, alpha=True), OutputFormat.JPG)


def test_a_strip_is_made_while_the_one_before_waits_for_the_one_that_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    third, seen = threading.Event(), list[bool]()
    pack = zlib.crc32

    def wait(*arguments: Any) -> int:
        seen.append(third.wait(5))
        return pack(*arguments)

    def strips() -> Iterator[Picture]:
        yield Picture(noise(4, 9, 3))
        yield Picture(noise(4, 9, 3))
        third.set()
        yield Picture(noise(4, 9, 3))

    monkeypatch.setattr(encoding.zlib, "crc32", wait)
    with unnamed() as file:
        encode(strips(), Size(width=9, height=12), OutputFormat.PNG, 90, file).result()
    assert set(seen) == {True}

"""The decoder's process: what it gives back, what it may not do, and how it ends."""

import json
import logging
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Generator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from core.errors import DeploymentError, InputNotImage, InputTooLarge, OutOfMemory, OutputTooLarge, UpscaledError
from worker.upscaler import decoding
from worker.upscaler.decoder import Decoder
from worker.upscaler.decoding import Header, Limits
from worker.upscaler.memory import machine_bytes

LIMITS = Limits(pixels=40_000_000, side=32_768)


@pytest.fixture(scope="module")
def decoder() -> Generator[Decoder]:
    with Decoder(30) as decoder:
        yield decoder


def _file(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


SMALL = _file(Image.new("RGB", (3, 2), "red"))


def _slow(side: int) -> bytes:
    """Draw a progressive JPEG whose first scan, over the whole picture, comes 200 times more."""
    data = _file(Image.new("L", (side, side), 77), "JPEG", progressive=True)
    start = data.index(b"\xff\xda")
    stop = data.index(b"\xff", data.index(b"\0", start + 8) + 1)
    return data[:start] + data[start:stop] * 200 + data[start:]


def _told(decoder: Decoder, tell: Callable[[int], object]) -> Callable[[Header], None]:
    """Do something to the child while it waits with a picture half done."""

    def approve(_: Header) -> None:
        assert decoder.pid is not None
        tell(decoder.pid)

    return approve


# What it gives back ---------------------------------------------------------------------------------------------------


def test_a_picture_is_the_same_as_if_it_were_decoded_here(decoder: Decoder) -> None:
    rgba = Image.effect_noise((70, 50), 90).convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize((70, 50)))
    for data in (_file(rgba), _file(rgba.convert("RGB"), "JPEG"), _file(rgba, "WEBP", lossless=True)):
        here, there = decoding.decode(data, LIMITS), decoder.decode(data, LIMITS)
        assert np.array_equal(there.rgb, here.rgb)
        assert (there.alpha is None) == (here.alpha is None)
        assert there.alpha is None or np.array_equal(there.alpha, np.asarray(here.alpha))
        assert there.rgb.flags.writeable


def test_errors_and_warnings_arrive_as_they_were(decoder: Decoder, caplog: pytest.LogCaptureFixture) -> None:
    for data, limits in ((b"no picture", LIMITS), (SMALL[:50], LIMITS), (SMALL, Limits(pixels=5))):
        with pytest.raises(UpscaledError) as here:
            decoding.decode(data, limits)
        with pytest.raises(type(here.value)) as there:
            decoder.decode(data, limits)
        assert str(there.value) == str(here.value)
    caplog.clear()
    decoder.decode(_file(Image.new("RGB", (3, 2)), icc_profile=b"garbage" * 30), LIMITS)
    assert [(record.levelno, "colour profile" in record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, True)
    ]


def test_what_the_header_says_is_approved_here_before_a_pixel_is_decoded(decoder: Decoder) -> None:
    seen: list[Header] = []

    def refuse(header: Header) -> None:
        seen.append(header)
        raise OutputTooLarge("The output would be too large.")

    before = decoder.pid
    bomb = _file(Image.new("RGBA", (5000, 5000)), compress_level=1)
    with pytest.raises(OutputTooLarge, match="would be too large"):
        decoder.decode(bomb, LIMITS, refuse)
    assert [(header.width, header.height, header.alpha) for header in seen] == [(5000, 5000, True)]
    assert decoder.pid == before
    assert decoder.decode(SMALL, LIMITS).width == 3
    assert decoder.pid is not None
    assert psutil.Process(decoder.pid).memory_info().rss < 100 << 20


# What it may not do ---------------------------------------------------------------------------------------------------


def test_a_picture_whose_memory_is_not_there_is_refused_by_its_header(decoder: Decoder) -> None:
    data = _file(Image.new("L", (5000, 4000)))
    for decode in (decoding.decode, decoder.decode):
        with pytest.raises(InputTooLarge, match=r"5000 x 4000 pixels would take 171 MiB of memory; the limit is 170\."):
            decode(data, Limits(pixels=40_000_000, memory_bytes=170 << 20))


def test_a_file_that_hides_what_it_needs_is_stopped_at_what_it_said(decoder: Decoder) -> None:
    data = _file(Image.new("L", (5000, 5000)))
    key, end = _chunk(b"tRNS", b"\0\7"), _chunk(b"IEND", b"")
    hidden, honest = data.replace(end, key + end), data[:33] + key + data[33:]
    assert decoder.decode(honest, LIMITS).alpha is not None
    before = decoder.pid
    with pytest.raises(InputTooLarge, match="takes far more memory than its size"):
        decoder.decode(hidden, LIMITS)
    assert decoder.pid == before
    assert decoder.decode(SMALL, LIMITS).width == 3


def test_what_one_picture_was_allowed_does_not_bound_the_next(decoder: Decoder) -> None:
    assert decoder.decode(SMALL, LIMITS).width == 3
    assert decoder.decode(SMALL + bytes(90_000_000), LIMITS).width == 3


def test_a_picture_that_takes_too_long_is_stopped_by_the_processor_s_clock() -> None:
    with Decoder(0.001) as decoder:
        assert decoder.decode(SMALL, LIMITS).width == 3
        began, before = time.monotonic(), decoder.pid
        with pytest.raises(InputTooLarge, match=r"^The picture takes too long to decode\.$"):
            decoder.decode(_slow(5000), LIMITS)
        assert time.monotonic() - began < 20
        assert decoder.pid != before
        assert decoder.decode(SMALL, LIMITS).width == 3


def test_a_decoder_that_hangs_is_stopped_by_the_clock_before_the_watchdog_would_end_the_worker() -> None:
    with Decoder(30, stall_seconds=1) as decoder:
        began = time.monotonic()
        with pytest.raises(InputTooLarge, match="takes too long"):
            decoder.decode(SMALL, LIMITS, _told(decoder, lambda pid: os.kill(pid, signal.SIGSTOP)))
        assert time.monotonic() - began < 5
        assert decoder.decode(SMALL, LIMITS).width == 3


def test_the_child_knows_no_secret_and_can_open_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPSCALED_SECRET_KEY", "what nobody may know")
    with Decoder(30) as decoder:
        decoder.decode(SMALL, LIMITS)
        child = psutil.Process(decoder.pid)
        assert set(child.environ()) <= {
            *("OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "LD_LIBRARY_PATH", "LC_CTYPE"),
        }
        none = (0, 0)
        assert child.rlimit(psutil.RLIMIT_CORE) == child.rlimit(psutil.RLIMIT_FSIZE) == none
        assert child.rlimit(psutil.RLIMIT_NPROC) == none
        numbers = [int(name.name) for name in Path(f"/proc/{child.pid}/fd").iterdir()]
        assert child.rlimit(psutil.RLIMIT_NOFILE) == (max(numbers) + 1,) * 2
        assert not any(
            "torch" in mapped.path or "pydantic" in mapped.path for mapped in child.memory_maps(grouped=True)
        )
        assert Path(f"/proc/{child.pid}/oom_score_adj").read_text(encoding="ascii").strip() == "1000"


# How it ends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signal_number", "error"),
    [(signal.SIGSEGV, InputNotImage), (signal.SIGABRT, InputNotImage), (signal.SIGKILL, OutOfMemory)],
)
def test_a_child_that_dies_ends_one_picture_and_the_next_has_another(
    decoder: Decoder, signal_number: int, error: type[UpscaledError]
) -> None:
    before = decoder.pid
    with pytest.raises(error):
        decoder.decode(SMALL, LIMITS, _told(decoder, lambda pid: os.kill(pid, signal_number)))
    assert decoder.pid not in (before, None)
    assert decoder.decode(SMALL, LIMITS).width == 3


def test_a_child_that_died_while_idle_costs_no_picture(decoder: Decoder) -> None:
    decoder.decode(SMALL, LIMITS)
    child = psutil.Process(decoder.pid)
    child.kill()
    while child.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.001)
    assert decoder.decode(SMALL, LIMITS).width == 3


def test_signals_to_the_worker_s_whole_group_break_no_picture(decoder: Decoder) -> None:
    decoder.decode(SMALL, LIMITS)
    assert decoder.pid is not None
    assert os.getsid(decoder.pid) == decoder.pid

    def interrupt(pid: int) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)

    assert decoder.decode(SMALL, LIMITS, _told(decoder, interrupt)).width == 3


@pytest.mark.parametrize("busy", [False, True])
def test_the_child_does_not_outlive_a_worker_that_is_killed(busy: bool, tmp_path: Path) -> None:
    (tmp_path / "slow.jpg").write_bytes(_slow(7000) if busy else SMALL)
    code = (
        "import sys, pathlib\nfrom worker.upscaler.decoder import Decoder, Limits\n"
        "decoder = Decoder(60).__enter__()\n"
        "say = lambda *_: print(decoder.pid, flush=True)\n"
        f"decoder.decode(pathlib.Path({str(tmp_path / 'slow.jpg')!r}).read_bytes(), Limits(10**9), say)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.1)
        parent.kill()
    _, alive = psutil.wait_procs([child], timeout=1.5)  # half of what the slow picture takes
    assert not alive or child.status() == psutil.STATUS_ZOMBIE


def test_nothing_is_left_when_the_decoder_is_closed() -> None:
    with Decoder(30) as decoder:
        assert decoder.decode(SMALL, LIMITS).width == 3
        child = decoder.pid
        assert child is not None
    assert not psutil.pid_exists(child)


def _replaced_by(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    """Have another program run as the child."""
    program = tmp_path / "child"
    program.write_text(f"#!{sys.executable}\nimport sys, time\n{code}", encoding="utf-8")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))


@pytest.mark.parametrize(
    "lie",
    [
        b"no frame at all",
        struct.pack("<Q", 1 << 60),
        *(
            struct.pack("<Q", len(told)) + told
            for told in (
                b"nonsense",
                b"[]",
                json.dumps({"picture": {"width": 60_000, "height": 60_000, "alpha": False, "peak_bytes": 0}}).encode(),
                json.dumps({"picture": {"width": -3, "height": -2, "alpha": False, "peak_bytes": 0}}).encode(),
            )
        ),
    ],
)
def test_a_child_that_was_taken_over_is_not_believed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lie: bytes
) -> None:
    hello = struct.pack("<Q", 2) + b"{}"
    _replaced_by(
        monkeypatch,
        tmp_path,
        f"sys.stdout.buffer.write({hello + lie!r}); sys.stdout.flush(); sys.stdin.read()",
    )
    with Decoder(30) as decoder, pytest.raises(InputNotImage, match="could not be decoded"):
        decoder.decode(SMALL, LIMITS)


def test_a_child_that_does_not_start_is_the_operator_s_to_mend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _replaced_by(monkeypatch, tmp_path, "sys.exit(1)")
    with Decoder(30) as decoder, pytest.raises(DeploymentError, match="does not start"):
        decoder.decode(SMALL, LIMITS)


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "limits", "bytes_there"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "5000000\n"}, 5_000_000),
        ("0::/\n", {"memory.max": "7000000\n"}, 7_000_000),
        ("4:cpu:/a\n7:memory:/docker/x\n", {"memory/memory.limit_in_bytes": "6000000\n"}, 6_000_000),
        ("4:cpu:/a\n", {"cpu/a/memory.max": "1\n"}, None),
        ("7:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
    ],
)
def test_the_smallest_of_all_limits_on_memory_counts(
    tmp_path: Path, group: str, limits: dict[str, str], bytes_there: int | None
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(group, encoding="utf-8")
    for name, limit in limits.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(limit, encoding="utf-8")
    assert machine_bytes(tmp_path) == (bytes_there or psutil.virtual_memory().total)

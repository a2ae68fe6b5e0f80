"""Damaged files of pictures, thousands of them, through the real decoder: each is a picture or a clean refusal."""

from collections import Counter
from pathlib import Path

from core.errors import InputNotImage, InputTooLarge
from tests.mutations import files
from worker.upscaler.decoder import Decoder
from worker.upscaler.decoding import Limits

SEED, COUNT = 5, 5_400
LIMITS = Limits(pixels=250_000, side=4_000, memory_bytes=64 << 20)


def _peak_bytes(pid: int | None) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def test_every_damaged_file_ends_as_a_picture_or_a_refusal_and_the_decoder_lives_on_in_bounded_memory() -> None:
    outcomes: Counter[str] = Counter()
    with Decoder(10) as decoder:
        pid = decoder.pid
        for data in files(SEED, COUNT):
            try:
                picture = decoder.decode(data, LIMITS)
            except (InputNotImage, InputTooLarge) as refusal:
                outcomes[refusal.code] += 1
            else:
                assert picture.width * picture.height <= LIMITS.pixels
                assert max(picture.width, picture.height) <= LIMITS.side
                outcomes["picture"] += 1
        assert decoder.pid == pid
        assert _peak_bytes(pid) < 160 << 20
    assert outcomes["picture"] > COUNT // 10
    assert outcomes["input_not_image"] > COUNT // 10
    assert outcomes["input_too_large"] > COUNT // 100

"""The file of a finished picture: read as often as need be, and never left lying about."""

import tempfile
from pathlib import Path

import pytest

from core.errors import StorageUnavailable
from worker.drafts import Draft

DATA = bytes(range(256)) * 8192


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.anyio
async def test_a_draft_is_read_from_its_beginning_each_time_whoever_else_reads_it() -> None:
    draft = Draft()
    draft.file.write(DATA)
    assert draft.size_bytes == len(DATA)
    with draft.open() as first, draft.open() as second:
        assert first.read(1000) == DATA[:1000]
        assert second.read() == DATA
        assert first.read() == DATA[1000:]
        assert b"".join([block async for block in draft.blocks()]) == DATA
    draft.close()


def test_a_draft_has_no_name_under_which_a_killed_process_could_leave_it(folder: Path) -> None:
    draft = Draft()
    draft.file.write(DATA)
    with draft.open():
        assert list(folder.iterdir()) == []
    draft.close()


def test_no_place_for_a_draft_is_unavailable_storage(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "missing"))
    with pytest.raises(StorageUnavailable):
        Draft()

"""What the jobs themselves wrote down: when each began and ended, and in which process."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LOOK_SECONDS = 0.02


@dataclass(frozen=True)
class Entry:
    """One line of the journal: `event` is begin, end or stopped."""

    event: str
    tag: str
    pid: int
    at: float
    """Seconds of the wall clock, as time.time() tells them."""


class Journal:
    """The file that `models/job.py` writes: the only witness that no server can talk round."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> Sequence[Entry]:
        if not self.path.exists():
            return []
        fields = (line.split() for line in self.path.read_text().splitlines())
        return [Entry(event, tag, int(pid), float(at)) for event, tag, pid, at in fields]

    def count(self, event: str, tag: str) -> int:
        return sum(entry.event == event and entry.tag == tag for entry in self.entries())

    def done_twice(self) -> int:
        """Count the jobs that were carried to their end more than once."""
        ended = [entry.tag for entry in self.entries() if entry.event == "end"]
        return len({tag for tag in ended if ended.count(tag) > 1})

    async def wait(self, tag: str, events: Sequence[str], seconds: float) -> Entry | None:
        """Return the first entry of one of the events, or None when there is none within the time."""
        give_up_at = time.monotonic() + seconds
        while time.monotonic() < give_up_at:
            for entry in self.entries():
                if entry.tag == tag and entry.event in events:
                    return entry
            await asyncio.sleep(LOOK_SECONDS)
        return None

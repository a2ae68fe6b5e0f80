"""What a world is made of: keys, orders, processes, and what attempts make."""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum, auto
from uuid import UUID

from core.options import OutputFormat
from core.storage import result_key
from db.jobs import Attempt, Result
from db.models import JobStatus, WebhookEvent
from db.queue import NewJob
from db.records import OVER

BEGINNING = datetime(2030, 1, 1, tzinfo=UTC)
EVENTS = (WebhookEvent.COMPLETED, WebhookEvent.FAILED, WebhookEvent.CANCELLED)
ENDS = frozenset(status.value for status in OVER)


@dataclass(frozen=True)
class Owner:
    """An API key with its limits."""

    id: UUID
    weight: float
    max_concurrent: int | None
    max_queued: int | None


OWNERS = (Owner(UUID(int=1), 1, 1, None), Owner(UUID(int=2), 2, 2, 2), Owner(UUID(int=3), 1, None, None))


class Death(Enum):
    """How an attempt ends that was about to complete."""

    NOT = auto()
    BEFORE_UPLOAD = auto()
    AFTER_UPLOAD = auto()
    AFTER_COMMIT = auto()
    ANSWER_LOST = auto()
    """The process lives, but does not learn that its commit was one; it will say it again."""


@dataclass(frozen=True)
class Order:
    """A job as its caller knows it."""

    new: NewJob
    owner: Owner
    poison: bool
    """It kills every worker that takes it."""
    submitted_at: datetime

    @property
    def deadline_at(self) -> datetime | None:
        return None if self.new.cancel_after is None else self.submitted_at + self.new.cancel_after


@dataclass(eq=False)
class Process:
    """A worker process; one that dies is replaced by a fresh one."""

    id: UUID | None = None
    awake: bool = False
    """It took a hint, and has not yet found the queue empty."""
    silent: bool = False
    """Stopped, or cut off: it does not beat, but may come back."""
    heard_at: datetime = BEGINNING
    attempt: Attempt | None = None
    claimed_as: UUID | None = None
    ended: JobStatus | None = None
    """What it made of the attempt, when it was not told that this is committed."""


def object_of(job_id: UUID, number: int) -> tuple[str, bytes]:
    """Return the key and the content of what an attempt makes."""
    return result_key(job_id, number, OutputFormat.PNG), f"{job_id} {number}".encode()


def result_of(content: bytes) -> Result:
    return Result(
        engine="none",
        format=OutputFormat.PNG,
        width=1,
        height=1,
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        seed=0,
    )

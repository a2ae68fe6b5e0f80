"""The schema. ORM classes for Alembic and for naming columns; the hot paths speak Core statements."""

from datetime import date, datetime
from enum import StrEnum
from typing import Any, ClassVar
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    ColumnElement,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Text,
    Uuid,
    func,
    literal_column,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class JobStatus(StrEnum):
    """The states of a job; Apiframe shows the same words."""

    QUEUED = "QUEUED"
    PROCESSING = "PROCESSING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


# Spelled out in statements and no parameters: only so can a plan that is kept know which partial index holds.
QUEUED: ColumnElement[str] = literal_column(f"'{JobStatus.QUEUED}'", String())
PROCESSING: ColumnElement[str] = literal_column(f"'{JobStatus.PROCESSING}'", String())


class DeliveryStatus(StrEnum):
    """The states of a delivery; Apiframe's `webhookStatus` shows the same words."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


class Scope(StrEnum):
    """What an API key may be used for."""

    JOBS_WRITE = "jobs:write"
    """To submit, upload and cancel, and to manage what webhooks are signed with."""
    JOBS_READ = "jobs:read"
    """To read its own jobs and deliveries."""
    ADMIN = "admin"
    """All of that, to list everybody's jobs, and to read the metrics."""


class WebhookEvent(StrEnum):
    """What a caller can ask to be told."""

    PROGRESS = "progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


def _one_of(column: str, states: type[StrEnum]) -> CheckConstraint:
    # A varchar with a CHECK and not a native enum: adding a state then needs no ALTER TYPE.
    listed = ", ".join(f"'{state}'" for state in states)
    return CheckConstraint(f"{column} IN ({listed})", name=column)


class Model(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "pk": "%(table_name)s_pkey",
            "fk": "%(table_name)s_%(column_0_name)s_fkey",
            "uq": "%(table_name)s_%(column_0_name)s_key",
            "ck": "%(table_name)s_%(constraint_name)s_check",
            "ix": "%(table_name)s_%(column_0_name)s_idx",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: DateTime(timezone=True),
        UUID: Uuid(),
        str: Text(),
        bytes: LargeBinary(),
        float: Double(),
        dict[str, Any]: JSONB(),
    }


class ApiKey(Model):
    """Who may call. The key itself is shown once and never stored."""

    __tablename__ = "api_keys"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str]
    prefix: Mapped[str]
    """The first characters of the key, for people to recognise it by."""
    hash: Mapped[bytes] = mapped_column(unique=True)
    scopes: Mapped[list[str]] = mapped_column(ARRAY(Text), server_default=text("'{jobs:write,jobs:read}'"))
    """What it may be used for: see Scope."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime | None]
    """From then on it is as good as revoked."""
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    """To the minute: not every request writes it."""

    requests_per_minute: Mapped[int | None]
    """NULL: as many as the settings say."""
    daily_pixels: Mapped[int | None] = mapped_column(BigInteger)
    """How many pixels may be made for it in a day, by UTC; NULL: any number."""
    weight: Mapped[float] = mapped_column(server_default=text("1"))
    """Its share of the workers while others wait too: a key of weight 2 gets twice as much as one of weight 1."""
    max_concurrent: Mapped[int | None]
    """How many of its jobs may run at a time; NULL: as many as there are workers."""
    max_queued: Mapped[int | None]
    """How many of its jobs may wait; NULL: as many as the settings say."""
    next_tag: Mapped[float] = mapped_column(server_default=text("0"))
    """The start-time fair tag at which its next job may start: see db.queue.submit."""
    apiframe_digest: Mapped[bytes | None]
    """SHA-256 of the bare key, with which Apiframe signs webhooks; stored only where the settings ask for that. Sealed:
    see core.sealing."""

    __table_args__ = (
        CheckConstraint("requests_per_minute > 0", name="requests_per_minute"),
        CheckConstraint("daily_pixels > 0", name="daily_pixels"),
        CheckConstraint("weight BETWEEN 0.001 AND 1000", name="weight"),
        CheckConstraint("max_concurrent BETWEEN 1 AND 10000", name="max_concurrent"),
        CheckConstraint("max_queued > 0", name="max_queued"),
        # Every submit moves next_tag: with room on the page that touches no index.
        {"postgresql_with": {"fillfactor": "50"}},
    )


class Usage(Model):
    """What was made for an API key on a day, by UTC, counted in the statement that completes a job.

    Each day is spread over several rows, so that workers seldom wait for one another's count; their sum is the usage.
    """

    __tablename__ = "usage"

    api_key_id: Mapped[UUID] = mapped_column(ForeignKey("api_keys.id"), primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    shard: Mapped[int] = mapped_column(SmallInteger, primary_key=True)
    jobs: Mapped[int]
    pixels: Mapped[int] = mapped_column(BigInteger)
    """Of the results: width times height."""

    __table_args__ = ({"postgresql_with": {"fillfactor": "50"}},)


class Job(Model):
    """One request to upscale one image."""

    __tablename__ = "jobs"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    api_key_id: Mapped[UUID] = mapped_column(ForeignKey("api_keys.id"))
    status: Mapped[str] = mapped_column(String(16), server_default=JobStatus.QUEUED.value)
    model: Mapped[str]
    input: Mapped[dict[str, Any]]
    """The request in the caller's own words, with image data replaced by the upload that holds it."""
    options: Mapped[dict[str, Any]]
    """UpscaleOptions."""
    image_url: Mapped[str | None]
    image_key: Mapped[str | None]
    """Where the input lies: a URL to fetch, or the key of a stored object; exactly one of the two."""
    webhook_url: Mapped[str | None]
    webhook_events: Mapped[list[str]] = mapped_column(ARRAY(Text), server_default=text("'{}'"))
    upload_url: Mapped[str | None]
    """Where the caller wants the result put; whoever knows it can write there, so it goes with the job's end."""

    priority: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))
    """Among the jobs of one key, higher goes first; between keys it means nothing."""
    cost: Mapped[float] = mapped_column(server_default=text("1"))
    """How much work the job is expected to be: see UpscaleOptions.cost."""
    tag: Mapped[float] = mapped_column(server_default=text("0"))
    """The job's place in start-time fair order: the lowest goes first."""
    idempotency_key: Mapped[str | None]
    """Unique within its API key; the sweep frees it after a day."""
    fingerprint: Mapped[bytes | None]
    """SHA-256 of the request that came with the idempotency key."""

    attempt: Mapped[int] = mapped_column(server_default=text("0"))
    """How many times the job was claimed; the number of the current claim is the fence."""
    strikes: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))
    """How many attempts were lost to a fault; a drain costs none."""
    worker: Mapped[str | None]
    """Who holds, or held, the current attempt: host and process id, for people."""
    worker_id: Mapped[UUID | None]
    """The row of the worker that holds, or held, the current attempt; that row may be gone."""
    slot: Mapped[int | None]
    """Which of its key's max_concurrent places the running job takes; NULL where the key has no limit."""

    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    due_at: Mapped[datetime | None]
    """Before this time a job that waits for another attempt is not claimed."""
    deadline_at: Mapped[datetime | None]
    """When the caller loses interest."""
    cancel_requested_at: Mapped[datetime | None]
    """When the caller asked to cancel a job that was running."""
    started_at: Mapped[datetime | None]
    """When the current attempt began; NULL while there is none."""
    completed_at: Mapped[datetime | None]
    """When the job reached its last state, whichever that is."""
    expires_at: Mapped[datetime | None]
    """Until when the result can be read."""
    purge_at: Mapped[datetime | None]
    """When the sweep deletes the objects that the job's attempts left; NULL before it is over and after it is done."""

    result_key: Mapped[str | None]
    result: Mapped[dict[str, Any] | None]
    """What is known about the stored result: see db.jobs.Result."""
    error: Mapped[str | None]
    error_code: Mapped[str | None]

    __table_args__ = (
        _one_of("status", JobStatus),
        CheckConstraint("num_nonnulls(image_url, image_key) = 1", name="image"),
        # A result that the caller's upload_url refused stays readable, although its job failed by that.
        CheckConstraint(
            "CASE status WHEN 'COMPLETED' THEN result_key IS NOT NULL "
            "WHEN 'FAILED' THEN result_key IS NULL OR error_code = 'upload_failed' ELSE result_key IS NULL END",
            name="result",
        ),
        # Small ones, since only jobs that are not over are in them. Claims read the first: whose turn it is; and the
        # second: which of that key's jobs it shall be.
        Index("jobs_queued_tag_idx", "tag", "id", postgresql_where=text("status = 'QUEUED'")),
        Index(
            "jobs_queued_priority_idx",
            *("api_key_id", text("priority DESC"), "tag", "id"),
            postgresql_where=text("status = 'QUEUED'"),
        ),
        Index(
            "jobs_queued_deadline_at_idx",
            "deadline_at",
            postgresql_where=text("status = 'QUEUED' AND deadline_at IS NOT NULL"),
        ),
        Index("jobs_processing_tag_idx", "tag", postgresql_where=text("status = 'PROCESSING'")),
        # Two claims that would both take a key's last place collide here.
        Index(
            "jobs_processing_slot_key",
            *("api_key_id", "slot"),
            unique=True,
            postgresql_where=text("status = 'PROCESSING'"),
        ),
        Index(
            "jobs_image_key_idx",
            "image_key",
            postgresql_where=text("status IN ('QUEUED', 'PROCESSING') AND image_key IS NOT NULL"),
        ),
        Index("jobs_idempotency_created_at_idx", "created_at", postgresql_where=text("idempotency_key IS NOT NULL")),
        Index("jobs_purge_at_idx", "purge_at", postgresql_where=text("purge_at IS NOT NULL")),
        Index(
            "jobs_idempotency_key_key",
            *("api_key_id", "idempotency_key"),
            unique=True,
            postgresql_where=text("idempotency_key IS NOT NULL"),
        ),
        Index("jobs_api_key_id_created_at_idx", "api_key_id", text("created_at DESC"), text("id DESC")),
        # Room on the page, and a vacuum that keeps up: every job is rewritten twice.
        {
            "postgresql_with": {
                "fillfactor": "80",
                "autovacuum_vacuum_scale_factor": "0.01",
                "autovacuum_vacuum_threshold": "500",
            }
        },
    )


class Worker(Model):
    """A worker process that lives, or did a moment ago. The sweep removes those that fell silent."""

    __tablename__ = "workers"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    """Drawn anew each time the process registers: a worker that was declared dead comes back as another."""
    name: Mapped[str]
    engine: Mapped[str]
    started_at: Mapped[datetime] = mapped_column(server_default=func.now())
    beat_at: Mapped[datetime] = mapped_column(server_default=func.now())
    seconds_per_cost: Mapped[float | None]
    """How long it needed lately for a job of cost 1; NULL before its first."""

    # A beat changes no index, and finds room on its own page.
    __table_args__ = ({"postgresql_with": {"fillfactor": "50"}},)


class QueueState(Model):
    """One row that each sweep refreshes: what a submit must know of the whole queue without counting it."""

    __tablename__ = "queue_state"

    one: Mapped[bool] = mapped_column(Boolean, primary_key=True, server_default=text("true"))
    measured_at: Mapped[datetime] = mapped_column(server_default=func.now())
    virtual_time: Mapped[float] = mapped_column(server_default=text("0"))
    """No job that is yet to come gets an earlier tag; it never falls."""
    queued: Mapped[int] = mapped_column(server_default=text("0"))
    queued_cost: Mapped[float] = mapped_column(server_default=text("0"))
    workers: Mapped[int] = mapped_column(server_default=text("0"))
    cost_per_second: Mapped[float | None]
    """How much all live workers do together; NULL while nobody knows."""

    __table_args__ = (CheckConstraint("one", name="one"),)


class Tally(Model):
    """How often something happened to jobs, counted in the statement that made it happen.

    Each name is spread over several rows, so that workers seldom wait for one another's count; their sum is the tally.
    """

    __tablename__ = "tallies"

    name: Mapped[str] = mapped_column(primary_key=True)
    """submitted, or the last state in lower case."""
    shard: Mapped[int] = mapped_column(SmallInteger, primary_key=True)
    count: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = ({"postgresql_with": {"fillfactor": "10"}},)


class Upload(Model):
    """An image that a caller sent instead of naming its URL."""

    __tablename__ = "uploads"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    api_key_id: Mapped[UUID] = mapped_column(ForeignKey("api_keys.id"))
    key: Mapped[str] = mapped_column(unique=True)
    size_bytes: Mapped[int | None]
    """NULL while it is still coming in."""
    stored_at: Mapped[datetime | None]
    """When the object was seen whole, and as an image; before that it cannot be used."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime]
    purged_at: Mapped[datetime | None]
    """When the sweep deleted the object."""
    idempotency_key: Mapped[str | None]
    """Unique within its API key; it is free again once the upload has expired."""
    fingerprint: Mapped[bytes | None]
    """SHA-256 of the image that came with the idempotency key."""

    __table_args__ = (
        Index("uploads_expires_at_idx", "expires_at", postgresql_where=text("purged_at IS NULL")),
        Index(
            "uploads_idempotency_key_key",
            *("api_key_id", "idempotency_key"),
            unique=True,
            postgresql_where=text("idempotency_key IS NOT NULL"),
        ),
    )


class WebhookSecret(Model):
    """What an API key's webhooks are signed with; while a rotation overlaps there are several."""

    __tablename__ = "webhook_secrets"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    api_key_id: Mapped[UUID] = mapped_column(ForeignKey("api_keys.id"), index=True)
    secret: Mapped[bytes]
    """Sealed: see core.sealing."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime | None]
    """Set by the rotation that replaced it; NULL: the current one, of which a key has one at most."""

    __table_args__ = (
        Index("webhook_secrets_current_key", "api_key_id", unique=True, postgresql_where=text("expires_at IS NULL")),
    )


class Delivery(Model):
    """One event owed to one webhook URL."""

    __tablename__ = "deliveries"

    id: Mapped[UUID] = mapped_column(primary_key=True, server_default=func.gen_random_uuid())
    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    event: Mapped[str] = mapped_column(String(16))
    url: Mapped[str]
    receiver: Mapped[str] = mapped_column(server_default=text("''"))
    """Scheme, host and port of the URL: what is slow, or dead, as one."""
    status: Mapped[str] = mapped_column(String(16), server_default=DeliveryStatus.PENDING.value)
    attempts: Mapped[int] = mapped_column(server_default=text("0"))
    """How many attempts were begun."""
    schedule_start: Mapped[int] = mapped_column(server_default=text("0"))
    """How many attempts had been begun when the schedule of retries started: not 0 after a resend."""
    due_at: Mapped[datetime] = mapped_column(server_default=func.now())
    """When to try next; while an attempt is under way, when to presume it dead."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (
        _one_of("status", DeliveryStatus),
        _one_of("event", WebhookEvent),
        Index("deliveries_due_idx", "due_at", postgresql_where=text("status = 'pending'")),
        Index("deliveries_job_id_event_key", "job_id", "event", unique=True),
    )


class DeliveryAttempt(Model):
    """One POST of a delivery, and what came of it."""

    __tablename__ = "delivery_attempts"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    delivery_id: Mapped[UUID] = mapped_column(ForeignKey("deliveries.id", ondelete="CASCADE"), index=True)
    number: Mapped[int]
    at: Mapped[datetime] = mapped_column(server_default=func.now())
    duration_ms: Mapped[int]
    status_code: Mapped[int | None]
    excerpt: Mapped[str | None]
    """The beginning of the receiver's answer."""
    error: Mapped[str | None]
    """Why there was no answer."""

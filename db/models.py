"""The schema. ORM classes for Alembic and for naming columns; the hot paths speak Core statements."""

from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    LargeBinary,
    MetaData,
    String,
    Text,
    Uuid,
    func,
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


class DeliveryStatus(StrEnum):
    """The states of a delivery; Apiframe's `webhookStatus` shows the same words."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


class WebhookEvent(StrEnum):
    """What a caller can ask to be told."""

    PROGRESS = "progress"
    COMPLETED = "completed"
    FAILED = "failed"


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
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy's own declarative attribute
        datetime: DateTime(timezone=True),
        UUID: Uuid(),
        str: Text(),
        bytes: LargeBinary(),
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
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    revoked_at: Mapped[datetime | None]


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

    attempt: Mapped[int] = mapped_column(server_default=text("0"))
    """How many times the job was claimed; the number of the current claim is the fence."""
    worker: Mapped[str | None]
    """Who holds, or held, the current attempt: host and process id, for people."""

    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    started_at: Mapped[datetime | None]
    completed_at: Mapped[datetime | None]
    """When the job reached its last state, whichever that is."""
    expires_at: Mapped[datetime | None]
    """Until when the result can be read."""

    result_key: Mapped[str | None]
    result: Mapped[dict[str, Any] | None]
    """What is known about the stored result: see db.jobs.Result."""
    error: Mapped[str | None]
    error_code: Mapped[str | None]

    __table_args__ = (
        _one_of("status", JobStatus),
        CheckConstraint("num_nonnulls(image_url, image_key) = 1", name="image"),
        CheckConstraint("(status = 'COMPLETED') = (result_key IS NOT NULL)", name="result"),
        # Claims read this one: small, since only queued jobs are in it.
        Index("jobs_queued_idx", "created_at", "id", postgresql_where=text("status = 'QUEUED'")),
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


class Upload(Model):
    """An image that a caller sent instead of naming its URL."""

    __tablename__ = "uploads"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    api_key_id: Mapped[UUID] = mapped_column(ForeignKey("api_keys.id"))
    key: Mapped[str] = mapped_column(unique=True)
    size_bytes: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime]


class Delivery(Model):
    """One event owed to one webhook URL."""

    __tablename__ = "deliveries"

    id: Mapped[UUID] = mapped_column(primary_key=True, server_default=func.gen_random_uuid())
    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    event: Mapped[str] = mapped_column(String(16))
    url: Mapped[str]
    status: Mapped[str] = mapped_column(String(16), server_default=DeliveryStatus.PENDING.value)
    attempts: Mapped[int] = mapped_column(server_default=text("0"))
    """How many attempts were begun."""
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

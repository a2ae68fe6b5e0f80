"""leases, fairness, idempotency, webhook secrets, retention

Deploy rule: the code of the release before must run on the schema of this one. Add now, use in this release, remove in
the next.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

DOUBLE: sa.Double[float] = sa.Double()

revision: str = "20261121"
down_revision: str | None = "20261120"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "queue_state",
        sa.Column("one", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("measured_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("virtual_time", DOUBLE, server_default=sa.text("0"), nullable=False),
        sa.Column("queued", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("queued_cost", DOUBLE, server_default=sa.text("0"), nullable=False),
        sa.Column("workers", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("cost_per_second", DOUBLE, nullable=True),
        sa.CheckConstraint("one", name=op.f("queue_state_one_check")),
        sa.PrimaryKeyConstraint("one", name=op.f("queue_state_pkey")),
    )
    op.create_table(
        "tallies",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", "shard", name=op.f("tallies_pkey")),
        postgresql_with={"fillfactor": "10"},
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("engine", sa.Text(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("beat_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("seconds_per_cost", DOUBLE, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("workers_pkey")),
        postgresql_with={"fillfactor": "50"},
    )
    op.create_table(
        "webhook_secrets",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("api_key_id", sa.Uuid(), nullable=False),
        sa.Column("secret", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["api_key_id"], ["api_keys.id"], name=op.f("webhook_secrets_api_key_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("webhook_secrets_pkey")),
    )
    op.create_index(op.f("webhook_secrets_api_key_id_idx"), "webhook_secrets", ["api_key_id"], unique=False)
    op.create_index(
        "webhook_secrets_current_key",
        "webhook_secrets",
        ["api_key_id"],
        unique=True,
        postgresql_where=sa.text("expires_at IS NULL"),
    )
    op.add_column("api_keys", sa.Column("weight", DOUBLE, server_default=sa.text("1"), nullable=False))
    op.add_column("api_keys", sa.Column("max_concurrent", sa.Integer(), nullable=True))
    op.add_column("api_keys", sa.Column("max_queued", sa.Integer(), nullable=True))
    op.add_column("api_keys", sa.Column("next_tag", DOUBLE, server_default=sa.text("0"), nullable=False))
    op.add_column("api_keys", sa.Column("apiframe_digest", sa.LargeBinary(), nullable=True))
    op.add_column("deliveries", sa.Column("receiver", sa.Text(), server_default=sa.text("''"), nullable=False))
    op.add_column("deliveries", sa.Column("schedule_start", sa.Integer(), server_default=sa.text("0"), nullable=False))
    op.add_column("jobs", sa.Column("priority", sa.SmallInteger(), server_default=sa.text("0"), nullable=False))
    op.add_column("jobs", sa.Column("cost", DOUBLE, server_default=sa.text("1"), nullable=False))
    op.add_column("jobs", sa.Column("tag", DOUBLE, server_default=sa.text("0"), nullable=False))
    op.add_column("jobs", sa.Column("idempotency_key", sa.Text(), nullable=True))
    op.add_column("jobs", sa.Column("fingerprint", sa.LargeBinary(), nullable=True))
    op.add_column("jobs", sa.Column("strikes", sa.SmallInteger(), server_default=sa.text("0"), nullable=False))
    op.add_column("jobs", sa.Column("worker_id", sa.Uuid(), nullable=True))
    op.add_column("jobs", sa.Column("slot", sa.Integer(), nullable=True))
    op.add_column("jobs", sa.Column("due_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("deadline_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("cancel_requested_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("purge_at", sa.DateTime(timezone=True), nullable=True))
    op.create_check_constraint(op.f("api_keys_weight_check"), "api_keys", "weight BETWEEN 0.001 AND 1000")
    op.create_check_constraint(op.f("api_keys_max_concurrent_check"), "api_keys", "max_concurrent BETWEEN 1 AND 10000")
    op.create_check_constraint(op.f("api_keys_max_queued_check"), "api_keys", "max_queued > 0")
    op.execute("ALTER TABLE api_keys SET (fillfactor = 50)")
    op.drop_constraint("deliveries_event_check", "deliveries")
    op.create_check_constraint(
        op.f("deliveries_event_check"), "deliveries", "event IN ('progress', 'completed', 'failed', 'cancelled')"
    )
    op.drop_index(op.f("jobs_queued_idx"), table_name="jobs", postgresql_where="((status)::text = 'QUEUED'::text)")
    op.create_index(
        "jobs_idempotency_created_at_idx",
        "jobs",
        ["created_at"],
        unique=False,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    )
    op.create_index(
        "jobs_idempotency_key_key",
        "jobs",
        ["api_key_id", "idempotency_key"],
        unique=True,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    )
    op.create_index(
        "jobs_image_key_idx",
        "jobs",
        ["image_key"],
        unique=False,
        postgresql_where=sa.text("status IN ('QUEUED', 'PROCESSING') AND image_key IS NOT NULL"),
    )
    op.create_index(
        "jobs_processing_slot_key",
        "jobs",
        ["api_key_id", "slot"],
        unique=True,
        postgresql_where=sa.text("status = 'PROCESSING'"),
    )
    op.create_index(
        "jobs_processing_tag_idx", "jobs", ["tag"], unique=False, postgresql_where=sa.text("status = 'PROCESSING'")
    )
    op.create_index(
        "jobs_purge_at_idx", "jobs", ["purge_at"], unique=False, postgresql_where=sa.text("purge_at IS NOT NULL")
    )
    op.create_index(
        "jobs_queued_deadline_at_idx",
        "jobs",
        ["deadline_at"],
        unique=False,
        postgresql_where=sa.text("status = 'QUEUED' AND deadline_at IS NOT NULL"),
    )
    op.create_index(
        "jobs_queued_priority_idx",
        "jobs",
        ["api_key_id", sa.literal_column("priority DESC"), "tag", "id"],
        unique=False,
        postgresql_where=sa.text("status = 'QUEUED'"),
    )
    op.create_index(
        "jobs_queued_tag_idx", "jobs", ["tag", "id"], unique=False, postgresql_where=sa.text("status = 'QUEUED'")
    )
    op.add_column("uploads", sa.Column("purged_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("uploads", sa.Column("idempotency_key", sa.Text(), nullable=True))
    op.add_column("uploads", sa.Column("fingerprint", sa.LargeBinary(), nullable=True))
    op.create_index(
        "uploads_expires_at_idx", "uploads", ["expires_at"], unique=False, postgresql_where=sa.text("purged_at IS NULL")
    )
    op.create_index(
        "uploads_idempotency_key_key",
        "uploads",
        ["api_key_id", "idempotency_key"],
        unique=True,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    )
    op.execute("INSERT INTO queue_state DEFAULT VALUES")
    # What is there already counts too, and is to be deleted in its time.
    op.execute("UPDATE jobs SET purge_at = expires_at WHERE status = 'COMPLETED'")
    op.execute(
        "INSERT INTO tallies (name, shard, count) SELECT 'submitted', 0, count(*) FROM jobs UNION ALL"
        " SELECT lower(status), 0, count(*) FROM jobs WHERE completed_at IS NOT NULL GROUP BY status"
    )


def downgrade() -> None:
    op.drop_constraint("deliveries_event_check", "deliveries")
    op.execute("DELETE FROM deliveries WHERE event = 'cancelled'")
    op.create_check_constraint(
        op.f("deliveries_event_check"), "deliveries", "event IN ('progress', 'completed', 'failed')"
    )
    op.execute("ALTER TABLE api_keys RESET (fillfactor)")
    op.drop_index(
        "uploads_idempotency_key_key", table_name="uploads", postgresql_where=sa.text("idempotency_key IS NOT NULL")
    )
    op.drop_index("uploads_expires_at_idx", table_name="uploads", postgresql_where=sa.text("purged_at IS NULL"))
    op.drop_column("uploads", "fingerprint")
    op.drop_column("uploads", "idempotency_key")
    op.drop_column("uploads", "purged_at")
    op.drop_index("jobs_queued_tag_idx", table_name="jobs", postgresql_where=sa.text("status = 'QUEUED'"))
    op.drop_index("jobs_queued_priority_idx", table_name="jobs", postgresql_where=sa.text("status = 'QUEUED'"))
    op.drop_index(
        "jobs_queued_deadline_at_idx",
        table_name="jobs",
        postgresql_where=sa.text("status = 'QUEUED' AND deadline_at IS NOT NULL"),
    )
    op.drop_index("jobs_purge_at_idx", table_name="jobs", postgresql_where=sa.text("purge_at IS NOT NULL"))
    op.drop_index("jobs_processing_tag_idx", table_name="jobs", postgresql_where=sa.text("status = 'PROCESSING'"))
    op.drop_index("jobs_processing_slot_key", table_name="jobs", postgresql_where=sa.text("status = 'PROCESSING'"))
    op.drop_index(
        "jobs_image_key_idx",
        table_name="jobs",
        postgresql_where=sa.text("status IN ('QUEUED', 'PROCESSING') AND image_key IS NOT NULL"),
    )
    op.drop_index(
        "jobs_idempotency_key_key", table_name="jobs", postgresql_where=sa.text("idempotency_key IS NOT NULL")
    )
    op.create_index(
        op.f("jobs_queued_idx"),
        "jobs",
        ["created_at", "id"],
        unique=False,
        postgresql_where="((status)::text = 'QUEUED'::text)",
    )
    op.drop_column("jobs", "purge_at")
    op.drop_column("jobs", "cancel_requested_at")
    op.drop_column("jobs", "deadline_at")
    op.drop_column("jobs", "due_at")
    op.drop_column("jobs", "slot")
    op.drop_column("jobs", "worker_id")
    op.drop_column("jobs", "strikes")
    op.drop_column("jobs", "fingerprint")
    op.drop_column("jobs", "idempotency_key")
    op.drop_column("jobs", "tag")
    op.drop_column("jobs", "cost")
    op.drop_column("jobs", "priority")
    op.drop_column("deliveries", "schedule_start")
    op.drop_column("deliveries", "receiver")
    op.drop_column("api_keys", "apiframe_digest")
    op.drop_column("api_keys", "next_tag")
    op.drop_column("api_keys", "max_queued")
    op.drop_column("api_keys", "max_concurrent")
    op.drop_column("api_keys", "weight")
    op.drop_index(
        "webhook_secrets_current_key", table_name="webhook_secrets", postgresql_where=sa.text("expires_at IS NULL")
    )
    op.drop_index(op.f("webhook_secrets_api_key_id_idx"), table_name="webhook_secrets")
    op.drop_table("webhook_secrets")
    op.drop_table("workers")
    op.drop_table("tallies")
    op.drop_table("queue_state")

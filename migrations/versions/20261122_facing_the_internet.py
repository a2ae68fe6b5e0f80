"""scopes, expiry and rates of keys, usage, uploads that come in later, results put elsewhere, sealed secrets

Deploy rule: the code of the release before must run on the schema of this one. Add now, use in this release, remove in
the next.
"""

from collections.abc import Callable, Sequence

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import postgresql

from core.sealing import Sealer
from core.settings import load_settings

revision: str = "20261122"
down_revision: str | None = "20261121"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "usage",
        sa.Column("api_key_id", sa.Uuid(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("jobs", sa.Integer(), nullable=False),
        sa.Column("pixels", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["api_key_id"], ["api_keys.id"], name=op.f("usage_api_key_id_fkey")),
        sa.PrimaryKeyConstraint("api_key_id", "day", "shard", name=op.f("usage_pkey")),
        postgresql_with={"fillfactor": "50"},
    )
    op.add_column(
        "api_keys",
        sa.Column(
            "scopes",
            postgresql.ARRAY(sa.Text()),
            server_default=sa.text("'{jobs:write,jobs:read}'"),
            nullable=False,
        ),
    )
    op.add_column("api_keys", sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("api_keys", sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("api_keys", sa.Column("requests_per_minute", sa.Integer(), nullable=True))
    op.add_column("api_keys", sa.Column("daily_pixels", sa.BigInteger(), nullable=True))
    op.create_check_constraint(op.f("api_keys_requests_per_minute_check"), "api_keys", "requests_per_minute > 0")
    op.create_check_constraint(op.f("api_keys_daily_pixels_check"), "api_keys", "daily_pixels > 0")
    op.add_column("jobs", sa.Column("upload_url", sa.Text(), nullable=True))
    op.drop_constraint(op.f("jobs_result_check"), "jobs")
    op.create_check_constraint(
        op.f("jobs_result_check"),
        "jobs",
        "CASE status WHEN 'COMPLETED' THEN result_key IS NOT NULL "
        "WHEN 'FAILED' THEN result_key IS NULL OR error_code = 'upload_failed' ELSE result_key IS NULL END",
    )
    op.alter_column("uploads", "size_bytes", nullable=True)
    op.add_column("uploads", sa.Column("stored_at", sa.DateTime(timezone=True), nullable=True))
    op.execute("UPDATE uploads SET stored_at = created_at")
    _change_secrets(lambda sealer: sealer.seal)


def downgrade() -> None:
    _change_secrets(lambda sealer: sealer.open)
    op.execute("UPDATE uploads SET size_bytes = 0 WHERE size_bytes IS NULL")
    op.drop_column("uploads", "stored_at")
    op.alter_column("uploads", "size_bytes", nullable=False)
    op.execute("UPDATE jobs SET result_key = NULL WHERE status = 'FAILED'")
    op.drop_constraint(op.f("jobs_result_check"), "jobs")
    op.create_check_constraint(op.f("jobs_result_check"), "jobs", "(status = 'COMPLETED') = (result_key IS NOT NULL)")
    op.drop_column("jobs", "upload_url")
    op.drop_constraint(op.f("api_keys_daily_pixels_check"), "api_keys")
    op.drop_constraint(op.f("api_keys_requests_per_minute_check"), "api_keys")
    for column in ("daily_pixels", "requests_per_minute", "last_used_at", "expires_at", "scopes"):
        op.drop_column("api_keys", column)
    op.drop_table("usage")


def _change_secrets(choose: Callable[[Sealer], Callable[[bytes], bytes]]) -> None:
    """Seal, or open, what webhooks are signed with. The keys are asked for only where there is any such thing."""
    connection = op.get_bind()
    change = None
    for table, name in (("webhook_secrets", "secret"), ("api_keys", "apiframe_digest")):
        rows = sa.table(table, sa.column("id"), sa.column(name, sa.LargeBinary()))
        value = rows.c[name]
        for id, secret in connection.execute(sa.select(rows.c.id, value).where(value.is_not(None))).all():
            if change is None:
                change = choose(context.config.attributes.get("sealer") or Sealer(load_settings()))
            connection.execute(sa.update(rows).where(rows.c.id == id).values({name: change(secret)}))

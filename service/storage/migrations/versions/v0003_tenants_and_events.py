"""Tenants, tokens, audit, webhooks, events; counts and charges kept as they change; who owns a job.

SQLite deletes a table's dependants when it is rebuilt, so those of the reference networks are put aside.
"""

import uuid
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

COUNTER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TIME = sa.DateTime(timezone=True)
REFERENCE_KEY = ["data", "task", "backbone", "recipe", "epochs", "seed"]
AFFINITY_KEY = ["data", "backbone", "recipe", "epochs", "method", "tasks", "seed"]
ON_FRONT = sa.text("on_front")
STATES = ("pending", "running", "completed", "stopped", "failed", "cancelled")
BATCH = 1000  # rows held in memory


def upgrade() -> None:
    _create_tables()
    _add_columns()
    _put_tenants_into_keys()
    _count()


def _create_tables() -> None:
    op.create_table(
        "audit",
        sa.Column("position", COUNTER, nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("tenant", sa.String(length=100), nullable=False),
        sa.Column("token_id", sa.String(length=64), nullable=True),
        sa.Column("action", sa.String(length=100), nullable=False),
        sa.Column("target", sa.String(length=200), nullable=False),
        sa.Column("request_id", sa.String(length=100), nullable=True),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("position", name=op.f("pk_audit")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_audit_tenant_action_position"), "audit", ["tenant", "action", "position"])
    op.create_index(op.f("ix_audit_tenant_position"), "audit", ["tenant", "position"])
    identity = op.create_table(
        "database",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_database")),
    )
    op.bulk_insert(identity, [{"id": f"database_{uuid.uuid4().hex}"}])
    op.create_table(
        "tenant_usage",
        sa.Column("tenant", sa.String(length=100), nullable=False),
        sa.Column("month", sa.String(length=7), nullable=False),
        sa.Column("device_seconds", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "month", name=op.f("pk_tenant_usage")),
    )
    op.create_table(
        "tenants",
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("max_queued_jobs", sa.Integer(), nullable=True),
        sa.Column("max_running_jobs", sa.Integer(), nullable=True),
        sa.Column("max_device_seconds", sa.Double(), nullable=True),
        sa.Column("max_stored_bytes", sa.BigInteger(), nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_tenants")),
    )
    op.create_table(
        "tokens",
        sa.Column("position", COUNTER, nullable=False),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("tenant", sa.String(length=100), nullable=False),
        sa.Column("role", sa.String(length=20), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("expires_at", TIME, nullable=True),
        sa.Column("revoked_at", TIME, nullable=True),
        sa.PrimaryKeyConstraint("position", name=op.f("pk_tokens")),
        sa.UniqueConstraint("digest", name=op.f("uq_tokens_digest")),
        sa.UniqueConstraint("id", name=op.f("uq_tokens_id")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_tokens_tenant_position"), "tokens", ["tenant", "position"])
    op.create_table(
        "webhooks",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("tenant", sa.String(length=100), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.Column("kinds", sa.JSON(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("disabled_at", TIME, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhooks")),
    )
    op.create_index(op.f("ix_webhooks_tenant"), "webhooks", ["tenant"])
    op.create_table(
        "deliveries",
        sa.Column("position", COUNTER, nullable=False),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("webhook_id", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("due_at", TIME, nullable=True),
        sa.Column("last_status", sa.Integer(), nullable=True),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("delivered_at", TIME, nullable=True),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_deliveries_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["webhook_id"],
            ["webhooks.id"],
            name=op.f("fk_deliveries_webhook_id_webhooks"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("position", name=op.f("pk_deliveries")),
        sa.UniqueConstraint("id", name=op.f("uq_deliveries_id")),
        sa.UniqueConstraint(
            "webhook_id", "job_id", "sequence", name=op.f("uq_deliveries_webhook_id_job_id_sequence")
        ),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_deliveries_job_id"), "deliveries", ["job_id"])
    op.create_index(op.f("ix_deliveries_state_due_at"), "deliveries", ["state", "due_at"])
    op.create_index(op.f("ix_deliveries_webhook_id_position"), "deliveries", ["webhook_id", "position"])
    op.create_table(
        "events",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_events_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "sequence", name=op.f("pk_events")),
    )
    op.create_table(
        "trial_values",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("metric", sa.String(length=300), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_trial_values_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "metric", "number", name=op.f("pk_trial_values")),
    )
    op.create_index(
        op.f("ix_trial_values_job_id_metric_value_number"),
        "trial_values",
        ["job_id", "metric", "value", "number"],
    )


def _add_columns() -> None:
    counters = (sa.Column(f"trials_{s}", sa.Integer(), server_default="0", nullable=False) for s in STATES)
    columns: tuple[sa.Column[Any], ...] = (
        sa.Column("owner", sa.String(length=64), nullable=True),
        sa.Column("beats", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("last_event", sa.Integer(), server_default="0", nullable=False),
        *counters,
        sa.Column("seconds", sa.Double(), server_default="0", nullable=False),
        sa.Column("device_seconds", sa.Double(), server_default="0", nullable=False),
        sa.Column("stored_bytes", sa.BigInteger(), server_default="0", nullable=False),
    )
    for column in columns:
        op.add_column("jobs", column)
    for name in ("ix_jobs_name", "ix_jobs_state_priority_position"):
        op.drop_index(op.f(name), table_name="jobs")
    for names in (
        ["state", "position"],
        ["tenant", "name", "position"],
        ["tenant", "position"],
        ["tenant", "started_at"],
        ["tenant", "state", "position"],
    ):
        op.create_index(op.f(f"ix_jobs_{'_'.join(names)}"), "jobs", names)
    op.add_column("attempts", sa.Column("seconds", sa.Double(), server_default="0", nullable=False))
    op.add_column("attempts", sa.Column("last_write_digest", sa.String(length=64), nullable=True))
    op.add_column("attempts", sa.Column("events_before", sa.Integer(), server_default="0", nullable=False))
    op.create_index(
        "ix_trials_front", "trials", ["job_id", "number"], sqlite_where=ON_FRONT, postgresql_where=ON_FRONT
    )
    op.create_index(op.f("ix_trials_job_id_family_number"), "trials", ["job_id", "family", "number"])
    op.create_index(op.f("ix_front_history_trial_id"), "front_history", ["trial_id"])


def _put_tenants_into_keys() -> None:
    for table in ("reference_networks", "subset_networks", "affinities"):
        op.add_column(
            table, sa.Column("tenant", sa.String(length=100), server_default="default", nullable=False)
        )
    op.drop_index(
        op.f("ix_subset_networks_data_backbone_recipe_epochs_position"), table_name="subset_networks"
    )
    op.create_index(
        op.f("ix_subset_networks_tenant_data_backbone_recipe_epochs_position"),
        "subset_networks",
        ["tenant", "data", "backbone", "recipe", "epochs", "position"],
    )
    connection = op.get_bind()
    uses = connection.execute(sa.text("SELECT job_id, reference FROM job_references")).mappings().all()
    for table, key in (("reference_networks", REFERENCE_KEY), ("affinities", AFFINITY_KEY)):
        with op.batch_alter_table(table, table_kwargs={"sqlite_autoincrement": True}) as batch:
            batch.drop_constraint(op.f(f"uq_{table}_{'_'.join(key)}"), type_="unique")
            batch.create_unique_constraint(op.f(f"uq_{table}_tenant_{'_'.join(key)}"), ["tenant", *key])
    if uses and connection.dialect.name == "sqlite":
        statement = sa.text("INSERT INTO job_references (job_id, reference) VALUES (:job_id, :reference)")
        connection.execute(statement, [dict(use) for use in uses])


def _count() -> None:
    """Fill in what older versions counted anew each time, and a first event for each job.

    What progress an attempt made is told by events from now on; older ones are held against no job.
    """
    connection = op.get_bind()
    metadata = sa.MetaData()
    jobs, attempts, trials, trial_values, events = (
        sa.Table(name, metadata, autoload_with=connection)
        for name in ("jobs", "attempts", "trials", "trial_values", "events")
    )
    zero = {"seconds": 0.0, "device_seconds": 0.0, "stored_bytes": 0, **{f"trials_{s}": 0 for s in STATES}}
    totals: dict[str, dict[str, Any]] = {
        job_id: dict(zero) for job_id in connection.scalars(sa.select(jobs.c.id))
    }
    for row in connection.execute(sa.select(attempts)).mappings().all():
        seconds = max(0.0, (row["last_seen_at"] - row["started_at"]).total_seconds())  # clocks step
        totals[row["job_id"]]["seconds"] += seconds
        totals[row["job_id"]]["device_seconds"] += row["side_device_seconds"]
        same = (attempts.c.job_id == row["job_id"]) & (attempts.c.attempt == row["attempt"])
        connection.execute(sa.update(attempts).where(same).values(seconds=seconds, preempted=True))
    names = ("position", "job_id", "number", "state", "device_seconds", "values", "files")
    by_position = sa.select(*(trials.c[name] for name in names)).order_by(trials.c.position).limit(BATCH)
    after = 0
    while rows := connection.execute(by_position.where(trials.c.position > after)).mappings().all():
        after = rows[-1]["position"]
        found = []
        for row in rows:
            total = totals[row["job_id"]]
            total[f"trials_{row['state']}"] += 1
            total["device_seconds"] += row["device_seconds"]
            total["stored_bytes"] += sum(file["size"] for file in row["files"].values())
            if row["state"] in ("completed", "stopped"):
                found += [
                    {"job_id": row["job_id"], "number": row["number"], "metric": metric, "value": value}
                    for metric, value in row["values"].items()
                    if value is not None
                ]
        if found:
            connection.execute(sa.insert(trial_values), found)
    for job_id, total in totals.items():
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(**total, last_event=1))
    changed_at = sa.func.coalesce(jobs.c.ended_at, jobs.c.started_at, jobs.c.created_at)
    told = ("id", "state", "reason", "priority")
    states = connection.execute(sa.select(*(jobs.c[name] for name in told), changed_at.label("at")))
    for job in states.all():
        data = {name: getattr(job, name) for name in told}
        event = {"job_id": job.id, "sequence": 1, "kind": "job", "data": data, "at": job.at}
        connection.execute(sa.insert(events).values(event))

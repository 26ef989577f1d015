"""Subset networks, affinities, confirming runs, verdicts; which references a job uses; a trial's origin.

Nothing is rebuilt: SQLite would delete a table's dependants with it.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

COUNTER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("memory_until", sa.BigInteger(), nullable=True))
    op.add_column("jobs", sa.Column("side_setting", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("jobs", sa.Column("verdict", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("jobs", sa.Column("eta_seconds", sa.Double(), nullable=True))
    op.add_column("jobs", sa.Column("eta_at", sa.DateTime(timezone=True), nullable=True))
    op.alter_column("attempts", "reference_device_seconds", new_column_name="side_device_seconds")
    op.add_column("trials", sa.Column("origin", sa.String(length=20), server_default="", nullable=False))
    op.create_table(
        "job_references",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("reference", COUNTER, nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_job_references_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["reference"],
            ["reference_networks.position"],
            name=op.f("fk_job_references_reference_reference_networks"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("job_id", "reference", name=op.f("pk_job_references")),
    )
    op.create_table(
        "subset_networks",
        sa.Column("position", COUNTER, nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=True),
        sa.Column("run", sa.Integer(), nullable=False),
        sa.Column("data", sa.Text(), nullable=False),
        sa.Column("backbone", sa.Text(), nullable=False),
        sa.Column("recipe", sa.Text(), nullable=False),
        sa.Column("epochs", sa.Integer(), nullable=False),
        sa.Column("subset", sa.Text(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("validation", sa.JSON(), nullable=False),
        sa.Column("test", sa.JSON(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_subset_networks_job_id_jobs"), ondelete="SET NULL"
        ),
        sa.PrimaryKeyConstraint("position", name=op.f("pk_subset_networks")),
        sa.UniqueConstraint(
            "job_id", "run", "subset", "seed", name=op.f("uq_subset_networks_job_id_run_subset_seed")
        ),
        sqlite_autoincrement=True,
    )
    op.create_index(
        op.f("ix_subset_networks_data_backbone_recipe_epochs_position"),
        "subset_networks",
        ["data", "backbone", "recipe", "epochs", "position"],
        unique=False,
    )
    op.create_table(
        "affinities",
        sa.Column("position", COUNTER, nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=True),
        sa.Column("data", sa.Text(), nullable=False),
        sa.Column("backbone", sa.Text(), nullable=False),
        sa.Column("recipe", sa.Text(), nullable=False),
        sa.Column("epochs", sa.Integer(), nullable=False),
        sa.Column("method", sa.String(length=100), nullable=False),
        sa.Column("tasks", sa.Text(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("matrix", sa.JSON(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_affinities_job_id_jobs"), ondelete="SET NULL"
        ),
        sa.PrimaryKeyConstraint("position", name=op.f("pk_affinities")),
        sa.UniqueConstraint(
            "data",
            "backbone",
            "recipe",
            "epochs",
            "method",
            "tasks",
            "seed",
            name=op.f("uq_affinities_data_backbone_recipe_epochs_method_tasks_seed"),
        ),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "confirmations",
        sa.Column("trial_id", sa.String(length=100), nullable=False),
        sa.Column("role", sa.String(length=20), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("family", sa.String(length=100), nullable=False),
        sa.Column("backbone", sa.String(length=100), nullable=False),
        sa.Column("parameters", sa.JSON(), nullable=False),
        sa.Column("grouping", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("values", sa.JSON(), nullable=False),
        sa.Column("test", sa.JSON(), nullable=False),
        sa.Column("tasks", sa.JSON(), nullable=False),
        sa.Column("epochs", sa.Integer(), nullable=False),
        sa.Column("device_seconds", sa.Double(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_confirmations_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["trial_id"], ["trials.id"], name=op.f("fk_confirmations_trial_id_trials"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("trial_id", "role", "seed", name=op.f("pk_confirmations")),
    )
    op.create_index(op.f("ix_confirmations_job_id"), "confirmations", ["job_id"], unique=False)

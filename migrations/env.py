"""How Alembic runs the migrations of our own tables; ``persistence.schema`` starts it, without an ini file.

``context.config.attributes`` carries what an ini file cannot: ``dialect``, ``schema`` (the configured
Postgres schema or ``None``) and ``connect``, which opens a DBAPI connection. Going through ``connect``
and not through a URL makes every DSN form work that the driver understands.
"""

from __future__ import annotations

from typing import Any

from alembic import context
from sqlalchemy import NullPool, create_engine, event

VERSION_TABLE = "persistence_alembic_version"
ENGINE_URLS = {"sqlite": "sqlite://", "postgresql": "postgresql+psycopg://"}


def run_offline(dialect: str, options: dict[str, Any]) -> None:
    """Write the statements out instead of running them.

    ``named``: the drivers' own parameter style doubles every percent sign, in a schema's name too.
    """
    context.configure(
        dialect_name=dialect,
        as_sql=True,
        literal_binds=True,
        dialect_opts={"paramstyle": "named"},
        **options,
    )
    with context.begin_transaction():
        context.run_migrations()


def run_online(dialect: str, options: dict[str, Any]) -> None:
    """Run the migrations, all of them in one transaction."""
    engine = create_engine(
        ENGINE_URLS[dialect], creator=context.config.attributes["connect"], poolclass=NullPool
    )
    if dialect == "sqlite":
        # The driver's own transactions leave DDL out and start too late: the current revision must be
        # read under the write lock, or two processes both find the migration missing.
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    with engine.connect() as connection:
        context.configure(connection=connection, **options)
        with context.begin_transaction():
            context.run_migrations()


def main() -> None:
    """Configure Alembic for the dialect at hand and run."""
    dialect = context.config.attributes["dialect"]
    options = {
        "version_table": VERSION_TABLE,
        "version_table_schema": context.config.attributes["schema"],
        "transactional_ddl": True,
    }
    run = run_offline if context.is_offline_mode() else run_online
    run(dialect, options)


main()

"""Postgres as a side of a transfer."""

from persistence.backends.postgres.transfer_sink import PostgresSink
from persistence.backends.postgres.transfer_source import PostgresSource

__all__ = ["PostgresSink", "PostgresSource"]

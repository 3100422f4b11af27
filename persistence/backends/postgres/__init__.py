"""Postgres, through psycopg and its pool."""

"""SQLite: one file, or a database in memory."""

"""Memory: for tests, and for running without a database."""

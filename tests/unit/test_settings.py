"""Settings: where they come from, who wins, and one clear message for each mistake."""

from __future__ import annotations

import logging
import os
import pickle
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from persistence.dsn import Dsn
from persistence.errors import DsnError, SettingsError
from persistence.options import OPTIONS
from persistence.settings import DSN_OPTION_FIELDS, Settings, get_settings, variable_name

SECRET = "Zq7secret"
KEY = "base64:" + "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No settings of the machine's, and an empty folder to put ``.env`` files into."""
    for name in list(os.environ):
        if name.upper().startswith("PERSISTENCE_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


def test_defaults() -> None:
    settings = Settings()
    assert settings.resolve_dsn() is None
    assert settings.resolve_encryption_key() is None
    assert settings.use_postgres is None
    assert (settings.pool_min, settings.pool_max, settings.fallback) == (1, 10, "never")
    assert settings.sqlite_synchronous == "full"
    assert settings.enable_checkpointing
    assert settings.setup_on_open
    assert not settings.strict_msgpack


def test_the_environment_is_read_whatever_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSISTENCE_DSN", "sqlite:///chat.db")
    monkeypatch.setenv("persistence_pool_max", "20")
    monkeypatch.setenv("PERSISTENCE_SCHEMA", "Agents")
    monkeypatch.setenv("PERSISTENCE_SQLITE_SYNCHRONOUS", "NORMAL")
    monkeypatch.setenv("PERSISTENCE_PGBOUNCER", "yes")
    monkeypatch.setenv("PERSISTENCE_ALLOWED_MSGPACK", "app.models:User, app:Order")
    monkeypatch.setenv("PERSISTENCE_CONNECT_ATTEMPTS", "")  # compose's ${VAR:-}
    settings = Settings()
    assert settings.resolve_dsn() == Dsn.parse("sqlite:///chat.db")
    assert (settings.pool_max, settings.db_schema, settings.pgbouncer) == (20, "Agents", True)
    assert settings.sqlite_synchronous == "normal"
    assert settings.allowed_msgpack == ("app.models:User", "app:Order")
    assert settings.connect_attempts == 5


def test_files_then_environment_then_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text(
        "PERSISTENCE_POOL_MAX=2\nPERSISTENCE_POOL_TIMEOUT=2\nPERSISTENCE_CLOSE_TIMEOUT=2\n"
        "PERSISTENCE_CONNECT_ATTEMPTS=2\nPOOL_MIN=9\nOPENAI_API_KEY=x\n"
    )
    Path(".env.production").write_text(
        "PERSISTENCE_POOL_MAX=3\nPERSISTENCE_POOL_TIMEOUT=3\nPERSISTENCE_CLOSE_TIMEOUT=3\n"
    )
    assert Settings().pool_max == 2
    monkeypatch.setenv("PERSISTENCE_ENV", "production")
    monkeypatch.setenv("PERSISTENCE_POOL_TIMEOUT", "4")
    monkeypatch.setenv("PERSISTENCE_CLOSE_TIMEOUT", "4")
    settings = Settings(close_timeout=5)
    assert settings.connect_attempts == 2
    assert settings.pool_max == 3
    assert settings.pool_timeout == 4
    assert settings.close_timeout == 5
    assert settings.pool_min == 1
    assert Settings(_env_file=None).pool_max == 10


def test_the_name_of_the_environment_may_stand_in_the_file_or_be_an_argument() -> None:
    Path(".env").write_text("PERSISTENCE_ENV=staging\n")
    Path(".env.staging").write_text("PERSISTENCE_DSN=sqlite:///staging.db\n")
    Path(".env.test").write_text("PERSISTENCE_DSN=sqlite:///test.db\n")
    assert str(Settings().resolve_dsn()) == "sqlite:///staging.db"
    assert str(Settings(env="test").resolve_dsn()) == "sqlite:///test.db"
    assert Settings(env="none").resolve_dsn() is None


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("POOL_MAX", "many", ["PERSISTENCE_POOL_MAX='many'", "integer"]),
        ("POOL_MAX", "0", ["PERSISTENCE_POOL_MAX='0'", "greater than or equal to 1"]),
        ("POOL_MIN", "-1", ["PERSISTENCE_POOL_MIN='-1'"]),
        ("POOL_MIN", "11", ["PERSISTENCE_POOL_MIN=11", "PERSISTENCE_POOL_MAX=10"]),
        ("POOL_TIMEOUT", "nan", ["PERSISTENCE_POOL_TIMEOUT='nan'"]),
        ("POOL_MAX_IDLE", "-1", ["PERSISTENCE_POOL_MAX_IDLE='-1'"]),
        ("CONNECT_BACKOFF", "inf", ["PERSISTENCE_CONNECT_BACKOFF='inf'"]),
        ("CLOSE_TIMEOUT", "0", ["PERSISTENCE_CLOSE_TIMEOUT='0'"]),
        ("SQLITE_BUSY_TIMEOUT", "1e12", ["PERSISTENCE_SQLITE_BUSY_TIMEOUT='1e12'"]),
        ("SQLITE_SYNCHRONOUS", "none", ["PERSISTENCE_SQLITE_SYNCHRONOUS='none'", "'normal'"]),
        ("SCHEMA", "ä" * 32, ["PERSISTENCE_SCHEMA="]),
        ("FALLBACK", "sqlite", ["PERSISTENCE_FALLBACK='sqlite'", "'never' or 'memory'"]),
        ("USE_POSTGRES", "maybe", ["PERSISTENCE_USE_POSTGRES='maybe'"]),
        ("ALLOWED_MSGPACK", "app.User", ["PERSISTENCE_ALLOWED_MSGPACK", "module:Class"]),
        ("ENV", "../x", ["PERSISTENCE_ENV='../x'"]),
        ("DSN", "", ["PERSISTENCE_DSN is set, but empty"]),
        ("DSN_FILE", " ", ["PERSISTENCE_DSN_FILE is set, but empty"]),
        ("ENCRYPTION_KEY", "", ["PERSISTENCE_ENCRYPTION_KEY is set, but empty"]),
        ("ENCRYPTION_KEY", SECRET, ["PERSISTENCE_ENCRYPTION_KEY", "9 bytes", "openssl"]),
        ("ENCRYPTION_KEY", f"base64:{SECRET}", ["PERSISTENCE_ENCRYPTION_KEY", "base64"]),
        ("SCHEMA", f"postgresql://u:{SECRET}@h/{'d' * 60}", ["PERSISTENCE_SCHEMA="]),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: list[str]
) -> None:
    monkeypatch.setenv(f"PERSISTENCE_{variable}", value)
    with pytest.raises(SettingsError) as caught:
        get_settings()
    for word in words:
        assert word in str(caught.value)
    shown = "".join(traceback.format_exception(caught.value))
    assert SECRET not in shown
    assert "ValidationError" not in shown
    assert str(caught.value).isprintable()


def test_all_wrong_values_are_named_at_once() -> None:
    with pytest.raises(SettingsError, match=r"PERSISTENCE_POOL_MIN='x'.*; PERSISTENCE_POOL_MAX='y'"):
        Settings(pool_min="x", pool_max="y")


def test_a_malformed_dsn_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSISTENCE_DSN", "chat.db")
    with pytest.raises(DsnError, match=r"PERSISTENCE_DSN: .*sqlite:///chat\.db"):
        Settings().resolve_dsn()


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_secrets_from_files(tmp_path: Path, ending: str) -> None:
    dsn_file, key_file = tmp_path / "dsn", tmp_path / "key"
    dsn_file.write_bytes(f"postgresql://u:{SECRET}@h/db{ending}".encode())
    key_file.write_bytes(f"{KEY}{ending}".encode())
    settings = Settings(dsn_file=dsn_file, encryption_key_file=key_file)
    dsn = settings.resolve_dsn()
    assert dsn is not None
    assert dsn.conninfo == f"postgresql://u:{SECRET}@h/db"
    assert settings.resolve_encryption_key() == bytes(range(32))


@pytest.mark.parametrize(
    ("content", "word"), [(None, "No such file"), (b"", "empty"), (b" \n", "empty"), (b"\xff", "UTF-8")]
)
@pytest.mark.parametrize(
    ("field", "resolve"),
    [("dsn_file", Settings.resolve_dsn), ("encryption_key_file", Settings.resolve_encryption_key)],
)
def test_a_file_that_is_no_use(
    tmp_path: Path, content: bytes | None, word: str, field: str, resolve: Any
) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=f"{variable_name(field)}=.*{word}"):
        resolve(Settings(**{field: path}))


def test_a_folder_or_a_dsn_in_place_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"PERSISTENCE_DSN_FILE.*directory"):
        Settings(dsn_file=tmp_path).resolve_dsn()
    with pytest.raises(SettingsError, match="PERSISTENCE_DSN_FILE=") as caught:
        Settings(dsn_file=f"postgresql://u:{SECRET}@h/db").resolve_dsn()
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_dsn_and_a_file_contradict_each_other_unless_one_is_an_argument(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PERSISTENCE_DSN_FILE", "/nowhere")
    monkeypatch.setenv("PERSISTENCE_DSN", "memory://")
    with pytest.raises(SettingsError, match="PERSISTENCE_DSN and PERSISTENCE_DSN_FILE are both set"):
        Settings()
    assert str(Settings(dsn="sqlite://").resolve_dsn()) == "sqlite://"
    with pytest.raises(SettingsError, match="both set"):
        Settings(dsn="sqlite://", dsn_file="/nowhere")


def test_an_argument_wins_over_an_empty_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSISTENCE_DSN", "")
    assert str(Settings(dsn="sqlite://").resolve_dsn()) == "sqlite://"


@pytest.mark.parametrize("dsn", [None, "sqlite:///chat.db", "memory://"])
def test_postgres_required_without_a_postgres_dsn(dsn: str | None) -> None:
    with pytest.raises(SettingsError, match="PERSISTENCE_USE_POSTGRES is true and PERSISTENCE_DSN is"):
        Settings(use_postgres=True, dsn=dsn).resolve_dsn()


@pytest.mark.parametrize(
    "dsn", ["postgres://h/db", "postgresql+asyncpg://h/db", "postgres+embedded:///pg", "host=h"]
)
def test_postgres_required_and_there(dsn: str) -> None:
    assert Settings(use_postgres=True, dsn=dsn).resolve_dsn() == Dsn.parse(dsn)


def test_names_that_are_not_settings(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PERSISTENCE_POOL_MX", SECRET)
    monkeypatch.setenv("PERSISTENCE_TEST_POSTGRES", SECRET)
    monkeypatch.setenv("PERSISTENCE_DB_SCHEMA", "s")
    with caplog.at_level(logging.WARNING):
        assert Settings().db_schema is None
    assert "PERSISTENCE_POOL_MX is not a setting (did you mean PERSISTENCE_POOL_MAX?)" in caplog.text
    assert "PERSISTENCE_DB_SCHEMA is not a setting (did you mean PERSISTENCE_SCHEMA?)" in caplog.text
    assert "TEST_POSTGRES" not in caplog.text
    assert SECRET not in caplog.text
    Path(".env").write_text("PERSISTENCE_POOL_MN=3\nPERSISTENCE_TEST_X=1\n")
    with pytest.raises(SettingsError, match=r"PERSISTENCE_POOL_MN in the \.env file .*PERSISTENCE_POOL_MIN"):
        Settings()
    with pytest.raises(SettingsError, match=r"no such setting: pool_mx .*PERSISTENCE_POOL_MAX"):
        Settings(pool_mx=3)


def test_the_options_of_a_dsn_win() -> None:
    settings = Settings(pool_max=5, db_schema="a", sqlite_synchronous="off", pool_timeout=1)
    postgres = settings.for_dsn(Dsn.parse("postgresql://h?schema=b&pool_min=4&pgbouncer=true"))
    assert (postgres.pool_min, postgres.pool_max, postgres.db_schema, postgres.pgbouncer) == (4, 5, "b", True)
    sqlite = settings.for_dsn(Dsn.parse("sqlite:///a?synchronous=normal&busy_timeout=7&allow_plaintext=1"))
    assert (sqlite.sqlite_synchronous, sqlite.sqlite_busy_timeout, sqlite.allow_plaintext) == (
        "normal",
        7.0,
        True,
    )
    assert (settings.pool_min, settings.db_schema, settings.sqlite_synchronous) == (1, "a", "off")
    with pytest.raises(SettingsError, match="PERSISTENCE_POOL_MIN=6 is greater than PERSISTENCE_POOL_MAX=5"):
        settings.for_dsn(Dsn.parse("postgresql://h?pool_min=6"))


def test_every_option_of_a_dsn_has_its_setting() -> None:
    assert DSN_OPTION_FIELDS.keys() == OPTIONS.keys()
    assert set(DSN_OPTION_FIELDS.values()) <= Settings.model_fields.keys()


def test_settings_are_immutable_and_show_no_secret() -> None:
    settings = Settings(dsn=f"postgresql://u:{SECRET}@h/db", encryption_key=KEY)
    with pytest.raises(ValidationError):
        settings.pool_max = 3
    assert SECRET not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    assert KEY not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    assert pickle.loads(pickle.dumps(settings)).resolve_dsn() == settings.resolve_dsn()  # noqa: S301


def test_the_getter_reads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = get_settings()
    monkeypatch.setenv("PERSISTENCE_POOL_MAX", "3")
    assert get_settings() is first
    get_settings.cache_clear()
    assert get_settings().pool_max == 3


@pytest.mark.parametrize("text", ["x" * 16, "x" * 24, "ü" * 16, KEY, KEY.replace("+", "-").replace("/", "_")])
def test_encryption_keys(text: str) -> None:
    key = Settings(encryption_key=text).resolve_encryption_key()
    assert key == (bytes(range(32)) if text.startswith("base64:") else text.encode())


def test_old_encryption_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"{'x' * 16},\n {KEY}\n")
    keys = ("x" * 16).encode(), bytes(range(32))
    text = f"{'x' * 16}, {KEY}"
    assert Settings(encryption_key=KEY, encryption_old_keys=text).resolve_encryption_old_keys() == keys
    assert Settings(encryption_key=KEY, encryption_old_keys_file=path).resolve_encryption_old_keys() == keys
    assert Settings(encryption_key=KEY).resolve_encryption_old_keys() == ()
    assert KEY not in repr(Settings(encryption_key="k" * 16, encryption_old_keys=text))


@pytest.mark.parametrize("text", [f"{SECRET},{KEY}", f"{KEY},", "base64:?"])
def test_old_encryption_keys_that_are_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    for field, value in (("encryption_old_keys", text), ("encryption_old_keys_file", path)):
        with pytest.raises(SettingsError, match=f"{variable_name(field)} is not an AES key") as caught:
            Settings(encryption_key=KEY, **{field: value}).resolve_encryption_old_keys()
        assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_an_old_key_does_not_write() -> None:
    """Nothing is encrypted any more, where the key was made an old one and no other took its place."""
    for values in ({"encryption_old_keys": KEY}, {"encryption_old_keys_file": "/nowhere"}):
        with pytest.raises(SettingsError, match="OLD_KEYS is set without PERSISTENCE_ENCRYPTION_KEY"):
            Settings(**values)


EXAMPLE = (Path(__file__).parents[2] / ".env.example").read_text("utf-8")
EXAMPLE_LINES = re.findall(r"^#(PERSISTENCE_\w+=.*)$", EXAMPLE, re.MULTILINE)


def test_the_example_file_names_every_setting_once() -> None:
    names = [line.partition("=")[0] for line in EXAMPLE_LINES]
    assert names == [variable_name(field) for field in Settings.model_fields]


@pytest.mark.parametrize("line", [line for line in EXAMPLE_LINES if not re.search("openssl|OLD_KEYS", line)])
def test_every_line_of_the_example_file_works_without_its_comment_sign(line: str) -> None:
    Path(".env").write_text(EXAMPLE.replace(f"#{line}", line))
    assert Settings().model_fields_set


def test_the_example_key_is_refused() -> None:
    Path(".env").write_text(EXAMPLE.replace("#PERSISTENCE_ENCRYPTION_KEY=", "PERSISTENCE_ENCRYPTION_KEY="))
    with pytest.raises(SettingsError, match="PERSISTENCE_ENCRYPTION_KEY is not an AES key"):
        Settings()


def test_the_generated_documents_are_current() -> None:
    tool = Path(__file__).parents[2] / "tools" / "settings_table.py"
    done = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")

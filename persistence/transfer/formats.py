"""The forms that a row may hold data in, and the one that a transfer shows: today's msgpack, not encrypted.

Encrypted data are decrypted when they are read and encrypted when they are written, under the key of the
settings. So what a digest covers is the content: the same data have another ciphertext each time.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from persistence.errors import EncryptionError
from persistence.settings import Settings, variable_name
from persistence.transfer.canonical import NotCanonicalError, split_map

if TYPE_CHECKING:
    from persistence.serializer import AesCipher

Typed = tuple[str, bytes]
"""A serializer's name for the format, and the bytes."""
MSGPACK_TYPES = frozenset({"msgpack", "bytes", "bytearray", "null"})
PICKLE = "pickle"


_NIL, _NO_ITEMS = b"\xc0", b"\x90"
_SENDS_ARE_A_CHANNEL = 4
"""The version of checkpoints since when they are."""


class Row(NamedTuple):
    """A checkpoint that SQLite held in one piece."""

    fields: dict[str, msgspec.Raw]
    """As msgpack, without the channel values."""
    channels: dict[str, msgspec.Raw]
    """Values as msgpack."""
    typed: dict[str, Typed]
    """Values that were pickled, as the serializer gives them."""


class Formats:
    """What the settings allow and what they have a key for.

    Args:
        settings: What says so.
        allow_pickle: Values that are pickled are shown as they are.
        unpickle: A checkpoint of SQLite that is pickled is taken apart, which runs code.
    """

    def __init__(self, settings: Settings, *, allow_pickle: bool = False, unpickle: bool = False) -> None:
        key = settings.resolve_encryption_key()
        self._cipher: AesCipher | None = None
        if key:
            from persistence.serializer import AesCipher  # LangGraph's take a quarter of a second to import

            self._cipher = AesCipher(key, settings.resolve_encryption_old_keys())
        self._encrypted_only = key is not None and not settings.allow_plaintext
        self._allow_pickle = allow_pickle
        self._unpickle = unpickle
        self.converted = 0
        """How many values and checkpoints were JSON so far."""
        self.encrypts = self._cipher is not None
        self.plain_types = frozenset() if self._encrypted_only else MSGPACK_TYPES
        """What is shown as it is; a database may hash it itself."""

    def value(self, what: str, type_: object, data: object) -> Typed:
        """A value as it is shown.

        Raises:
            NotCanonicalError: It is encrypted under another key, damaged, in plaintext though it should not
                be, or in a format that is not known or not allowed.
        """
        if type_ in self.plain_types and isinstance(data, bytes):
            return str(type_), data
        kind, opened = self._open(what, type_, data)
        if kind == "json":
            self.converted += 1
            return _json_value(opened)
        if not is_known(kind, allow_pickle=self._allow_pickle):
            raise NotCanonicalError(unknown(what, kind))
        return kind, opened

    def row(self, type_: object, data: object) -> Row:
        """A checkpoint as SQLite stores it, taken apart.

        Raises:
            NotCanonicalError: As :meth:`value`.
        """
        kind, opened = self._open("checkpoint", type_, data)
        if kind == PICKLE and self._unpickle:
            row = _unpickled(opened)
        elif kind in ("msgpack", "json"):
            self.converted += kind == "json"
            fields = _json_fields(opened) if kind == "json" else split_map(opened)
            row = Row(fields, split_map(fields.pop("channel_values", b"\x80")), {})
        else:
            raise NotCanonicalError(unknown("checkpoint", kind))
        if bytes(row.fields.get("pending_sends", _NIL)) not in (_NIL, _NO_ITEMS):
            _move_sends(row)
        return row

    def plaintext(self, what: str) -> None:
        """A value that is stored as plain JSON.

        Raises:
            NotCanonicalError: It should be encrypted.
        """
        if self._encrypted_only:
            raise NotCanonicalError(
                f"the {what} is not encrypted although a key is set; {variable_name('allow_plaintext')}=true"
                " lets it be read"
            )

    def sealed(self, type_: str, data: bytes) -> Typed:
        """A value as it is to be stored: encrypted, if there is a key."""
        if self._cipher is None:
            return type_, data
        cipher, sealed = self._cipher.encrypt(data)
        return f"{type_}+{cipher}", sealed

    def _open(self, what: str, type_: object, data: object) -> Typed:
        if not isinstance(type_, str):
            raise NotCanonicalError(f"the {what} has the serializer type {type_!r}, which is not known")
        if not isinstance(data, bytes):
            raise NotCanonicalError(f"the {what} is stored as {type(data).__name__}, not as bytes")
        if "+" not in type_:
            self.plaintext(what)
            return type_, data
        kind, cipher = type_.split("+", 1)
        if self._cipher is None:
            raise NotCanonicalError(
                f"the {what} is encrypted (type {type_!r}), and {variable_name('encryption_key')} is not set"
            )
        try:
            return kind, bytes(self._cipher.decrypt(cipher, data))
        except EncryptionError as error:
            raise NotCanonicalError(f"the {what} cannot be decrypted: {error}") from None


# Both bring LangGraph's serializer, which takes a quarter of a second to import.
def _json_value(text: bytes) -> Typed:
    from persistence.transfer.old_json import typed_of

    return typed_of(text)


def _json_fields(text: bytes) -> dict[str, msgspec.Raw]:
    from persistence.transfer.old_json import checkpoint_of

    return checkpoint_of(text)


def is_known(type_: str, *, allow_pickle: bool) -> bool:
    """Whether a record may show this type."""
    return type_ in MSGPACK_TYPES or (allow_pickle and type_ == PICKLE)


def unknown(what: str, type_: str) -> str:
    """Why a type is refused."""
    reason = "which runs code when it is read (--allow-pickle)" if type_ == PICKLE else "which is not known"
    return f"the {what} has the serializer type {type_!r}, {reason}"


def _unpickled(data: bytes) -> Row:
    """A pickled checkpoint. This runs code: whatever the row says."""
    from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

    serde = JsonPlusSerializer(pickle_fallback=True)
    try:
        fields: dict[str, Any] = dict(pickle.loads(data))  # noqa: S301 - explicitly allowed by the user
        channels = fields.pop("channel_values", {})
        typed = {channel: serde.dumps_typed(value) for channel, value in channels.items()}
        plain = {name: msgspec.Raw(_plain(serde.dumps_typed(value))) for name, value in fields.items()}
    except Exception as error:  # noqa: BLE001 - whatever the code raises
        raise NotCanonicalError(f"the checkpoint cannot be unpickled: {error!r}") from None
    return Row(plain, {}, typed)


def _plain(typed: Typed) -> bytes:
    """A value as msgpack, as it stands within a map."""
    return _NIL if typed[0] == "null" else typed[1]


def _move_sends(row: Row) -> None:
    """``Send`` packets that wait stood in the checkpoint before version 4; since then they are a channel.

    A graph does the same when it loads the checkpoint; Postgres has no place for them where they were.
    """
    from langgraph.checkpoint.serde.types import TASKS

    try:
        version = msgspec.msgpack.decode(row.fields["v"], type=int)
        versions = msgspec.msgpack.decode(row.fields["channel_versions"], type=dict[str, str | int | float])
        if version >= _SENDS_ARE_A_CHANNEL or not versions:
            return
        versions[TASKS] = max(versions.values())
    except (KeyError, TypeError, msgspec.MsgspecError) as error:
        raise NotCanonicalError(f"the packets that wait cannot be moved: {error!r}") from None
    row.channels[TASKS] = row.fields["pending_sends"]
    row.fields["pending_sends"] = msgspec.Raw(_NO_ITEMS)
    row.fields["channel_versions"] = msgspec.Raw(msgspec.msgpack.encode(versions))

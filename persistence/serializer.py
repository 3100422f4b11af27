"""The serializer that the settings ask for: strict or not, encrypted or not, in LangGraph's own formats."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from langgraph.checkpoint.serde.base import CipherProtocol, SerializerProtocol
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from persistence.errors import EncryptionError, MissingDriverError
from persistence.settings import Settings, variable_name

_OWN_TYPES = [("builtins", "bytearray")]
"""What the SQLite savers write by name, so that a ``bytearray`` at the top of a channel stays one."""


def make_serializer(settings: Settings) -> SerializerProtocol:
    """The serializer for a saver; what it writes, LangGraph's own serializers read.

    Raises:
        SettingsError: The encryption key is not usable.
        MissingDriverError: A key is set, and the extra ``encryption`` is not installed.
    """
    key = settings.resolve_encryption_key()
    plain = CheckedSerializer(
        strict=settings.strict_msgpack, encrypted_only=key is not None and not settings.allow_plaintext
    )
    allowed = [tuple(name.split(":")) for name in settings.allowed_msgpack]
    inner = plain.with_msgpack_allowlist([*_OWN_TYPES, *allowed])
    if key is None:
        return inner
    return EncryptedSerializer(AesCipher(key, settings.resolve_encryption_old_keys()), inner)


class CheckedSerializer(JsonPlusSerializer):
    """LangGraph's serializer, which refuses what does not fit the encryption settings.

    The refusal is here and not in a subclass of ``EncryptedSerializer``, since LangGraph's
    ``with_allowlist`` makes a new ``EncryptedSerializer`` from the cipher and this one.
    """

    def __init__(self, *, strict: bool, encrypted_only: bool) -> None:
        if strict:
            super().__init__(allowed_msgpack_modules=None)
        else:
            super().__init__()  # LANGGRAPH_STRICT_MSGPACK decides
        self.encrypted_only = encrypted_only

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        """Restore a value.

        Raises:
            EncryptionError: It is encrypted and there is no key, or it is not and should be.
        """
        kind, value = data
        if kind == "msgpack" and type(value) is bytes and not self.encrypted_only:
            return JsonPlusSerializer.loads_typed(self, data)  # nearly always
        if "+" in kind:
            raise EncryptionError(
                f"a stored value is encrypted ({kind}) and no key is set",
                hint=f"set {variable_name('encryption_key')}",
            )
        if isinstance(value, _Decrypted):
            return super().loads_typed((kind, bytes(value)))
        if self.encrypted_only:
            raise EncryptionError(
                f"a stored value is not encrypted ({kind}) although a key is set",
                hint=f"set {variable_name('allow_plaintext')}=true to read what was stored before the key",
            )
        return super().loads_typed(data)


class AesCipher(CipherProtocol):
    """LangGraph's AES cipher (EAX: it also detects changed values), with errors that say what to do.

    A stored value does not say which key it is under. EAX knows whether a key is right, so they are tried.
    """

    def __init__(self, key: bytes, old_keys: Sequence[bytes] = ()) -> None:
        try:
            importlib.import_module("Crypto.Cipher.AES")
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "Crypto":
                raise
            missing = True
        else:
            missing = False
        if missing:
            raise MissingDriverError(
                "an encryption key is set, and pycryptodome is not installed",
                hint='pip install "langgraph-persistence[encryption]"',
            )
        self._cipher, *self._old = [
            EncryptedSerializer.from_pycryptodome_aes(key=each).cipher for each in (key, *old_keys)
        ]

    def encrypt(self, plaintext: bytes) -> tuple[str, bytes]:
        """The cipher's name and the encrypted value."""
        return self._cipher.encrypt(plaintext)

    def decrypt(self, ciphername: str, ciphertext: bytes) -> bytes:
        """The value, marked as one that was encrypted.

        Raises:
            EncryptionError: Another cipher, another key, or a damaged value.
        """
        if ciphername != "aes":
            raise EncryptionError(f"a stored value is encrypted with {ciphername!r}; only 'aes' is known")
        for cipher in (self._cipher, *self._old):
            try:
                return _Decrypted(cipher.decrypt(ciphername, ciphertext))
            except ValueError as error:
                reason = error
        raise EncryptionError(
            f"a stored value cannot be decrypted: {reason}",
            hint=f"it was stored under another {variable_name('encryption_key')}, or was damaged",
        )


class _Decrypted(bytes):
    """What came out of the cipher, in contrast to a row that was stored in plaintext."""

"""Values as the first versions of LangGraph's savers wrote them: JSON with constructors in it.

They become the msgpack that today's serializer writes for such values. A constructor is a name and arguments
in both, so it is carried over as data: nothing is imported and nothing is called.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import msgspec
import ormsgpack
from langchain_core.load.load import ALL_SERIALIZABLE_MAPPINGS
from langgraph.checkpoint.serde._msgpack import SAFE_MSGPACK_TYPES
from langgraph.checkpoint.serde.jsonplus import (
    EXT_CONSTRUCTOR_KW_ARGS,
    EXT_CONSTRUCTOR_POS_ARGS,
    EXT_CONSTRUCTOR_SINGLE_ARG,
    EXT_METHOD_SINGLE_ARG,
    EXT_PYDANTIC_V1,
    EXT_PYDANTIC_V2,
)

from persistence.transfer.canonical import NotCanonicalError, json_value

_PYDANTIC = {"construct": EXT_PYDANTIC_V1, "model_construct": EXT_PYDANTIC_V2}
_TIME = ("hour", "minute", "second", "microsecond", "tzinfo")
_OF_PYTHON = sys.stdlib_module_names | {"test"}
_SAFE = SAFE_MSGPACK_TYPES | {("builtins", "bytes"), ("builtins", "bytearray")}
_METHODS = (None, "fromhex", "fromisoformat")
_MOVED = dict.fromkeys([("langgraph.constants", name) for name in ("Send", "Interrupt")], "langgraph.types")


def typed_of(text: bytes) -> tuple[str, bytes]:
    """The serializer's type and bytes, today, of a value that was stored as JSON.

    Raises:
        NotCanonicalError: It is not JSON, or holds what has no msgpack form.
    """
    value = _loaded(text)
    return ("bytes", value) if isinstance(value, bytes) else json_value(value)


def checkpoint_of(text: bytes) -> dict[str, msgspec.Raw]:
    """The fields of a checkpoint that was stored as JSON, each as msgpack.

    Raises:
        NotCanonicalError: As :func:`typed_of`.
    """
    fields = _loaded(text)
    if not isinstance(fields, dict):
        raise NotCanonicalError("the checkpoint is not a JSON object")
    return {name: msgspec.Raw(_pack(value)) for name, value in fields.items()}


def _loaded(text: bytes) -> Any:
    try:
        return json.loads(text, object_hook=_constructed)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise NotCanonicalError(f"the JSON cannot be read: {error}") from None


def _constructed(value: dict[str, Any]) -> Any:
    """An object of the document, whose members are done already."""
    path = value.get("id")
    if value.get("lc") not in (1, 2) or not isinstance(path, list) or len(path) < 2:
        return value
    if not _was_constructed(path, value.get("method")):
        return value
    if value.get("type") != "constructor":
        kind = f"{value.get('type')!r} of {'.'.join(map(str, path))}"
        raise NotCanonicalError(f"the JSON holds something that LangChain could not serialise: {kind}")
    kwargs, args = value.get("kwargs") or {}, value.get("args") or []
    if value["lc"] == 1:
        *parts, name = ALL_SERIALIZABLE_MAPPINGS.get(tuple(path), path)
        return _ext(EXT_PYDANTIC_V2, ".".join(parts), name, kwargs, "model_validate_json")
    name, module = path[-1], ".".join(path[:-1])
    return _called(_MOVED.get((module, name), module), name, args, kwargs, value.get("method"))


def _was_constructed(path: Sequence[str], method: Any) -> bool:
    """Whether an old saver can have written this.

    It may also be what a user has sent, and name ``os.system``. Today's saver leaves that alone in JSON, but
    calls whatever msgpack names.
    """
    if method not in _METHODS and not isinstance(method, list):
        return False
    return path[0] not in _OF_PYTHON or (".".join(path[:-1]), path[-1]) in _SAFE


def _called(module: str, name: str, args: Sequence[Any], kwargs: dict[str, Any], method: Any) -> Any:
    if isinstance(method, list):  # the constructor, and if that fails the method
        last = method[-1]
        if last in _PYDANTIC:
            extra = ("model_validate_json",) if last == "model_construct" else ()
            return _ext(_PYDANTIC[last], module, name, kwargs, *extra)
        method = None
    if method is not None:
        if (module, method) == ("builtins", "fromhex") and len(args) == 1:
            data = bytes.fromhex(args[0])
            return data if name == "bytes" else _ext(EXT_CONSTRUCTOR_SINGLE_ARG, module, name, data)
        if len(args) != 1 or kwargs:
            raise NotCanonicalError(f"the JSON calls {module}.{name}.{method} with other than one argument")
        return _ext(EXT_METHOD_SINGLE_ARG, module, name, args[0], method)
    if (module, name) == ("langgraph.types", "Send") and kwargs.keys() == {"node", "arg"}:
        return _ext(EXT_CONSTRUCTOR_POS_ARGS, module, name, (kwargs["node"], kwargs["arg"]))
    if (module, name) == ("datetime", "time"):
        args, kwargs = (), dict(zip(_TIME, args, strict=False)) | kwargs
    if args and kwargs:
        raise NotCanonicalError(f"the JSON calls {module}.{name} with both kinds of arguments")
    if kwargs or not args:
        return _ext(EXT_CONSTRUCTOR_KW_ARGS, module, name, kwargs)
    if len(args) == 1:
        return _ext(EXT_CONSTRUCTOR_SINGLE_ARG, module, name, args[0])
    return _ext(EXT_CONSTRUCTOR_POS_ARGS, module, name, args)


def _ext(code: int, *parts: Any) -> ormsgpack.Ext:
    return ormsgpack.Ext(code, _pack(parts))


def _pack(value: Any) -> bytes:
    try:
        return ormsgpack.packb(value)
    except (ormsgpack.MsgpackEncodeError, TypeError) as error:
        raise NotCanonicalError(f"the JSON has no msgpack form: {error}") from None

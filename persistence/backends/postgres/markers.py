"""What LangGraph's layout has no place for, in a checkpoint's row: an object that it never holds otherwise.

That is a value whose channel has no version, and a value under a version that already names another value
in the blob table. Transfers read and write markers too, without LangGraph's serializers.
"""

from __future__ import annotations

import base64
from typing import Any

MARKER = "__persistence__"
NO_VALUE = {MARKER: None}
"""The marker for the absence of a value."""


def marker(value: tuple[str, bytes] | None) -> dict[str, Any]:
    """The marker for a value, or for the absence of one."""
    if value is None:
        return NO_VALUE
    return {MARKER: [value[0], base64.b64encode(value[1]).decode()]}


def is_marker(value: Any) -> bool:
    """Whether what a row holds in a channel is a marker."""
    return isinstance(value, dict) and MARKER in value


def unmark(value: Any) -> tuple[str, bytes] | None:
    """What a marker holds; ``None`` for the absence of a value."""
    if value[MARKER] is None:
        return None
    type_, text = value[MARKER]
    return type_, base64.b64decode(text)

"""The one spelling of a JSON value, so that it has one digest: sorted keys, no spaces, UTF-8."""

from __future__ import annotations

import json
from typing import Any

from fedge.errors import FormatError


def canonical(value: Any, what: str) -> bytes:
    """A value of plain JSON types as canonical bytes.

    Args:
        value: mappings, lists, text, finite numbers, booleans, None.
        what: names it in the error.

    Raises:
        FormatError: it holds what JSON cannot.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"{what}: holds what JSON cannot ({str(error)[:120]})") from error

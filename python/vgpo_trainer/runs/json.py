"""Numbers that JSON cannot hold."""

from __future__ import annotations

import math
from typing import Any


def finite(value: Any, digits: int | None = None) -> Any:
    """Return a value with None in place of every number that is not finite, in lists and dictionaries too.

    Args:
        value: What goes into a JSON file.
        digits: Decimal places that numbers are rounded to; by default none is.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else round(value, digits)
    if isinstance(value, dict):
        return {name: finite(item, digits) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item, digits) for item in value]
    return value

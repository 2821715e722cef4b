from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any


def whole(name: str, value: Any) -> int:
    """A whole number of whatever type.

    Raises:
        TypeError: it is none.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, but got {value!r:.80}") from None


def whole_ids(name: str, values: Iterable[Any]) -> list[int]:
    """The same of several.

    Raises:
        TypeError: one is none.
    """
    values = list(values)
    try:
        return list(map(operator.index, values))
    except TypeError:
        return [whole(name, value) for value in values]  # says which
